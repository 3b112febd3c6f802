# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gradients through choices
#
# A program that picks one thing out of several has no derivative: the pick does not
# move when the parameters move a little. What does have one is the *mean* over the
# picks. Two families of estimators aim at it:
#
# - `sg.sample` sends the gradient **through** the choice: the value is the hard
#   choice, the derivative that of a soft one. Little noise, but the mean is not quite
#   right.
# - `sg.score` weighs the outcome by the **probability** of the choice. The mean is
#   right, to every order, but there is a lot of noise.
#
# With few options we can list all of them and compute the true gradient. So here
# every estimator is measured against the truth: how far off is its mean (bias), and
# how far do single draws scatter (noise)?

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits

import stopgrad_jax as sg


def heading(text):
    """Print a heading line above a table."""
    print(f"{text}\n{'-' * len(text)}")


# %% [markdown]
# ## 1. One choice among six, and what it costs
#
# A choice is a one-hot vector. Three costs depend on it: a linear one, a quadratic
# one, and a strongly curved one. What counts is not the cost of the six choices (any
# six numbers could be written in either form) but how the cost continues *between*
# them, since that is where a soft choice looks.

# %%
options = 6
rng = np.random.default_rng(0)
logits = jnp.array(rng.normal(size=options), jnp.float32)
weights = jnp.array(rng.normal(size=options), jnp.float32)
square = jnp.array(rng.normal(size=(options, options)), jnp.float32)
costs = {
    "linear": lambda choice: 3 + weights @ choice,
    "quadratic": lambda choice: 3 + weights @ choice + choice @ square @ choice,
    "curved": lambda choice: 3 * jnp.exp(0.5 * weights @ choice),
}


def true_gradient(cost):
    """List all choices, and differentiate the mean cost."""
    every_cost = jax.vmap(cost)(jnp.eye(options))
    return jax.grad(lambda logits: jax.nn.softmax(logits) @ every_cost)(logits)


def through(sampler):
    """Make an estimator of a sampler with a straight-through gradient."""
    return lambda cost, key: jax.grad(lambda x: cost(sampler(key, x)))(logits)


def by_score(samples, baseline):
    """Make a likelihood-ratio estimator that averages over several samples."""

    def estimate(cost, key):
        def loss(x):
            drawn = jax.random.categorical(key, x, shape=(samples,))
            each = jax.vmap(cost)(jax.nn.one_hot(drawn, options))
            others = sg.score.leave_one_out(each) if baseline else None
            log_probs = jax.nn.log_softmax(x)[drawn]
            return sg.score.score_loss(each, log_probs, others).mean()

        return jax.grad(loss)(logits)

    return estimate


estimators = {
    "straight-through": through(sg.sample.categorical),
    "Gumbel-softmax, hard": through(lambda k, x: sg.sample.gumbel_softmax(k, x, 0.5)),
    "Gumbel-Rao, 32": through(lambda k, x: sg.sample.gumbel_rao(k, x, 0.5, 32)),
    "ReinMax": through(sg.sample.reinmax),
    "score, 1 sample": by_score(1, False),
    "score, 4 samples": by_score(4, False),
    "score, 4, leave one out": by_score(4, True),
}
draws = 10_000
keys = jax.random.split(jax.random.key(0), draws)


def measure(estimate, cost):
    """Return bias, its standard error, and noise, relative to the true gradient."""
    truth = true_gradient(cost)
    grads = jax.jit(jax.vmap(lambda key: estimate(cost, key)))(keys)
    length = jnp.linalg.norm(truth)
    noise = jnp.sqrt(jnp.sum(jnp.var(grads, axis=0))) / length
    bias = jnp.linalg.norm(grads.mean(0) - truth) / length
    return float(bias), float(noise) / draws**0.5, float(noise)


# %%
def is_seen(bias, error):
    """Tell whether a bias is more than chance (4 standard errors) and rounding."""
    return bias > 4 * error + 1e-4


measured = {
    (name, kind): measure(estimate, cost)
    for kind, cost in costs.items()
    for name, estimate in estimators.items()
}
heading(f"Bias and noise, in units of the true gradient ({draws:,} draws)")
print(f"{'':<26}" + "".join(f"{kind:^18}" for kind in costs))
print(f"{'estimator':<26}" + f"{'bias':>9}{'noise':>8} " * len(costs))
for name in estimators:
    print(f"{name:<26}", end="")
    for kind in costs:
        bias, error, noise = measured[name, kind]
        shown = f"{bias:.1%}" if is_seen(bias, error) else "-"
        print(f"{shown:>9}{noise:>8.2f} ", end="")
    print()
print("\n-: no bias that this many draws could show")

unbiased = {kind: set() for kind in costs}
for (name, kind), (bias, error, _) in measured.items():
    if not is_seen(bias, error):
        unbiased[kind].add(name)
by_ratio = {name for name in estimators if name.startswith("score")}
assert unbiased["linear"] >= by_ratio | {"straight-through", "ReinMax"}
assert unbiased["quadratic"] == by_ratio | {"ReinMax"}
assert unbiased["curved"] == by_ratio
for kind in costs:
    biases = {name: measured[name, kind][0] for name in estimators}
    noises = {name: measured[name, kind][2] for name in estimators}
    assert noises["Gumbel-Rao, 32"] < 0.8 * noises["Gumbel-softmax, hard"]
    assert noises["score, 4, leave one out"] < 0.7 * noises["score, 4 samples"]
    if kind != "linear":
        assert biases["ReinMax"] < biases["straight-through"] / 2

# %%
fig, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained", sharey=True)
places = np.arange(len(estimators))
for ax, kind in zip(axes, costs, strict=True):
    bias, error, noise = np.array([measured[name, kind] for name in estimators]).T
    seen = is_seen(bias, error)
    ax.barh(places + 0.2, noise, 0.38, color="tab:blue", label="noise of one estimate")
    ax.barh(places - 0.2, bias * seen, 0.38, color="tab:orange", label="bias")
    ax.plot([0] * (~seen).sum(), (places - 0.2)[~seen], "o", color="tab:orange")
    ax.set(title=f"{kind} cost", xlabel="in units of the true gradient")
    ax.set_yticks(places, list(estimators))
    ax.grid(axis="x", alpha=0.3)
axes[0].invert_yaxis()
handles, labels = axes[0].get_legend_handles_labels()
handles.append(plt.Line2D([], [], marker="o", linestyle="", color="tab:orange"))
labels.append("no bias seen")
fig.legend(handles, labels, loc="outside lower center", ncols=3)
fig.suptitle("Bias and noise of gradients through a choice among six")
plt.show()

# %% [markdown]
# - Straight-through is right where the cost is linear, ReinMax where it is quadratic,
#   at nearly the same noise. On the curved cost both are off, ReinMax less.
# - Gumbel-Rao has the bias of Gumbel-softmax and less noise: it averages over the
#   noise that could have led to the same choice. The choice is made only once.
# - Likelihood ratios are right for every cost. A baseline takes away most of their
#   noise where the cost has a large mean.
#
# ## 2. The temperature trades one for the other
#
# Gumbel-softmax has a temperature. Low, the soft choice is nearly the hard one: the
# bias falls, but the gradient becomes rare and large.

# %%
temperatures = np.geomspace(0.1, 3, 9)
samplers = {
    "Gumbel-softmax": sg.sample.gumbel_softmax,
    "Gumbel-softmax, soft": lambda k, x, t: sg.sample.gumbel_softmax(k, x, t, False),
    "Gumbel-Rao, 32": lambda k, x, t: sg.sample.gumbel_rao(k, x, t, 32),
}


def sweep(sampler, cost):
    """Measure at every temperature: the temperature is an ordinary traced value."""
    truth = true_gradient(cost)
    length = jnp.linalg.norm(truth)

    @jax.jit
    def at(temperature):

        def sampled(x, key):
            return cost(sampler(key, x, temperature))

        grads = jax.vmap(jax.grad(sampled), (None, 0))(logits, keys)
        noise = jnp.sqrt(jnp.sum(jnp.var(grads, axis=0)))
        return jnp.linalg.norm(grads.mean(0) - truth) / length, noise / length

    return np.array([at(jnp.float32(t)) for t in temperatures])


swept = {name: sweep(sampler, costs["quadratic"]) for name, sampler in samplers.items()}

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
colors = ("tab:blue", "tab:green", "tab:orange")
for (name, values), color in zip(swept.items(), colors, strict=True):
    for ax, column in zip(axes, values.T, strict=True):
        ax.loglog(temperatures, column, "o-", color=color, label=name)
bias, _, noise = measured["ReinMax", "quadratic"]
axes[1].axhline(noise, color="0.4", linestyle="--", label="ReinMax (no temperature)")
axes[0].set(title="Bias", xlabel="temperature", ylabel="in units of the true gradient")
axes[1].set(title="Noise", xlabel="temperature")
for ax in axes:
    ax.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
axes[1].legend()
fig.suptitle("Gumbel-softmax on the quadratic cost")
plt.show()
plain, soft, rao = swept.values()
assert np.all(np.diff(soft[:, 1]) < 0)  # noise falls with the temperature
assert soft[0, 0] < soft[-1, 0] / 3  # and the bias grows
assert np.all(rao[:, 1] < plain[:, 1])

# %% [markdown]
# A noise of 5 leaves a chance of 5% in the mean of 10,000 draws, so the bias at the
# lowest temperatures may be smaller than it looks. Gumbel-Rao has less noise at each
# of these temperatures.
#
# ## 3. Second and third derivatives: DiCE
#
# Meta-learning, curvature and games against a learning opponent need derivatives of
# derivatives. The well-known surrogate `log_prob * stop_gradient(cost)` is right once
# and wrong ever after. `sg.score.magic_box(log_prob)` is 1, with the derivatives of
# the probability over itself, so that its product with a cost is right to every
# order.
#
# First a coin, for which two lines of enumeration tell the truth.

# %%
coin_costs = jnp.array([0.47, 1.76])


def log_prob(theta, face):
    """Log-probability of a face of a coin; 1 has probability sigmoid(theta)."""
    return jax.nn.log_sigmoid(jnp.where(face == 1, theta, -theta))


def derivative(f, order):
    """Differentiate by the first argument, several times."""
    for _ in range(order):
        f = jax.grad(f)
    return f


def mean_cost(theta):
    """Mean cost of the coin."""
    return jax.nn.sigmoid(jnp.array([-theta, theta])) @ coin_costs


surrogates = {
    "log_prob * stop(cost)": lambda t, face: (
        log_prob(t, face) * jax.lax.stop_gradient(coin_costs[face])
    ),
    "magic_box(log_prob) * cost": lambda t, face: (
        sg.score.magic_box(log_prob(t, face)) * coin_costs[face]
    ),
}
theta = 1.0
chances = jax.nn.sigmoid(jnp.array([-theta, theta]))
heading("Mean of the derivatives, a coin")
print(f"{'':<28}{'first':>10}{'second':>10}{'third':>10}")
truths = [float(derivative(mean_cost, order)(theta)) for order in (1, 2, 3)]
print(f"{'the truth':<28}" + "".join(f"{value:>10.3f}" for value in truths))
means = {}
for name, surrogate in surrogates.items():
    means[name] = [
        float(sum(chances[k] * derivative(surrogate, order)(theta, k) for k in (0, 1)))
        for order in (1, 2, 3)
    ]
    print(f"{name:<28}" + "".join(f"{value:>10.3f}" for value in means[name]))
naive, boxed = means.values()
np.testing.assert_allclose(boxed, truths, atol=1e-6)
assert abs(naive[0] - truths[0]) < 1e-6
assert abs(naive[1] - truths[1]) > 0.1

# %% [markdown]
# Then a walk of eight steps. At each the walker goes up or down; the policy looks at
# its height, and the cost is the height squared, discounted. `sg.score.dice` takes
# the log-probabilities and the costs of a walk, and gives its discounted cost all the
# derivatives of the mean. With a `baseline` (the mean cost to come, for each step) it
# is Loaded DiCE: the same means, with less noise in every derivative.

# %%
steps, discount = 8, 0.9


def walk(theta, moves):
    """Log-probabilities and costs of a walk, given its moves (+1 or -1)."""
    before = jnp.cumsum(moves) - moves
    up = theta - 0.5 * before  # a policy that likes to come home
    return jax.nn.log_sigmoid(moves * up), (before + moves) ** 2


def draw_walk(theta, key):
    """Draw the moves of a walk."""

    def step(height, key):
        up = jax.random.bernoulli(key, jax.nn.sigmoid(theta - 0.5 * height))
        move = jnp.where(up, 1.0, -1.0)
        return height + move, move

    return jax.lax.scan(step, 0.0, jax.random.split(key, steps))[1]


every_walk = jnp.array(
    [[1 - 2 * (n >> k & 1) for k in range(steps)] for n in range(2**steps)], jnp.float32
)
powers = discount ** jnp.arange(steps)


def true_mean(theta):
    """Mean discounted cost over all 256 walks."""
    log_probs, costs = jax.vmap(walk, (None, 0))(theta, every_walk)
    return jnp.exp(log_probs.sum(1)) @ (costs @ powers)


theta = 0.3
walks = jax.vmap(draw_walk, (None, 0))(theta, keys)
seen_costs = jax.vmap(walk, (None, 0))(theta, walks)[1]
to_come = jnp.cumsum((seen_costs * powers)[:, ::-1], 1)[:, ::-1] / powers
mean_to_come = to_come.mean(0)


def total(theta, moves, baseline, is_naive):
    """Discounted cost of a walk, with one of three gradients."""
    log_probs, costs = walk(theta, moves)
    if is_naive:
        return log_probs.sum() * jax.lax.stop_gradient(costs @ powers)
    return sg.score.dice(log_probs, costs, discount=discount, baseline=baseline)


recipes = {
    "log_probs * stop(cost)": (None, True),
    "dice": (None, False),
    "dice with a baseline": (mean_to_come, False),
}
moments = {}
for name, recipe in recipes.items():
    for order in (1, 2, 3):
        f = derivative(lambda t, moves, r=recipe: total(t, moves, *r), order)
        each = np.float64(jax.jit(jax.vmap(f, (None, 0)))(theta, walks))
        moments[name, order] = each.mean(), each.std()
truths = {order: float(derivative(true_mean, order)(theta)) for order in (1, 2, 3)}

heading(f"Derivatives of the mean cost of a walk: mean and noise of {draws:,} walks")
print(f"{'':<26}{'first':^18}{'second':^18}{'third':^18}")
print(f"{'the truth':<26}" + "".join(f"{truths[k]:>8.1f}{'':10}" for k in truths))
for name in recipes:
    cells = (moments[name, order] for order in truths)
    print(f"{name:<26}" + "".join(f"{m:>8.1f}{s:>8.0f}  " for m, s in cells))
for (name, order), (mean, noise) in moments.items():
    error = abs(mean - truths[order]) / (noise / draws**0.5)
    is_right = order == 1 or not recipes[name][1]
    assert (error < 5) if is_right else (error > 20)
for order in truths:
    assert moments["dice with a baseline", order][1] < moments["dice", order][1]

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
colors = ("tab:red", "tab:blue", "tab:green")
for ax, order in zip(axes, truths, strict=True):
    for k, (name, color) in enumerate(zip(recipes, colors, strict=True)):
        mean, noise = moments[name, order]
        bar = 5 * noise / draws**0.5
        ax.errorbar(k, mean, bar, fmt="o", color=color, capsize=6, lw=2, label=name)
    ax.axhline(truths[order], color="0.4", linestyle="--", label="the truth")
    ax.set(title=("First", "Second", "Third")[order - 1] + " derivative")
    ax.set(xlim=(-0.5, 2.5), xticks=[])
    ax.grid(alpha=0.3)
handles, labels = axes[0].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=4)
fig.suptitle(f"Derivatives of a mean, from {draws:,} walks (bars: 5 standard errors)")
plt.show()

# %% [markdown]
# ## 4. Where to look: hard attention
#
# Now a network that must choose. A digit lies in one of nine places of a larger
# canvas; the rest is noise. The network sees the canvas only as a blur of 4 by 4
# averages. From that it chooses one place to look at, and reads an 8 by 8 glimpse
# there. Nobody tells it where the digit is: the choice is trained by the reading alone.


# %%
digits = load_digits()
pictures = jnp.array(digits.images / 16, jnp.float32)
labels = jnp.array(digits.target)
order = np.random.default_rng(0).permutation(len(pictures))
train_rows, test_rows = jnp.array(order[:1300]), jnp.array(order[1300:])
offsets = jnp.array([(4 * (k // 3), 4 * (k % 3)) for k in range(9)])


def canvas(key, picture):
    """Put a picture in one of nine places of a noisy canvas."""
    key1, key2 = jax.random.split(key)
    place = jax.random.randint(key1, (), 0, 9)
    noise = 0.4 * jax.random.uniform(key2, (16, 16))
    corner = offsets[place]
    return jax.lax.dynamic_update_slice(noise, picture, (corner[0], corner[1])), place


def glimpses(image):
    """Cut the nine glimpses out of a canvas."""
    return jax.vmap(
        lambda at: jax.lax.dynamic_slice(image, (at[0], at[1]), (8, 8)).ravel()
    )(offsets)


def dense(layer, x):
    """One dense layer."""
    return x @ layer["w"] + layer["b"]


def init(key):
    """Draw weights: one layer to look, two layers to read."""
    shapes = {"look": (16, 9), "read1": (64, 64), "read2": (64, 10)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {
            "w": jax.random.normal(k, shape) * shape[0] ** -0.5,
            "b": jnp.zeros(shape[1]),
        }
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def look(params, image):
    """Score the nine places, from a blur of the canvas."""
    blur = image.reshape(4, 4, 4, 4).mean((1, 3)).ravel()
    return dense(params["look"], (blur - 0.2) * 10)


def read(params, glimpse):
    """Score the ten digits."""
    return dense(params["read2"], jax.nn.relu(dense(params["read1"], glimpse)))


def reading_loss(params, image, label, choice):
    """Cross-entropy of the reading at the chosen place."""
    scores = read(params, choice @ glimpses(image))
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


# %% [markdown]
# The ways to train it differ in one line: where the choice comes from. The first
# never trains the choice: its gradient is stopped. The likelihood ratios look four
# times at each image while training, the others once.

# %%
once = {
    "the choice not trained": lambda key, x: sg.sample.categorical(
        key, sg.stop_gradient(x)
    ),
    "straight-through": sg.sample.categorical,
    "Gumbel-softmax": lambda key, x: sg.sample.gumbel_softmax(key, x, 1.0),
    "Gumbel-Rao, 8": lambda key, x: sg.sample.gumbel_rao(key, x, 1.0, 8),
    "ReinMax": sg.sample.reinmax,
}


def sampled_loss(sampler):
    """Loss with the gradient through the choice."""

    def loss(params, image, label, key):
        choice = sampler(key, look(params, image))
        return reading_loss(params, image, label, choice)

    return loss


def scored_loss(baseline):
    """Loss with the gradient by likelihood ratio, over four choices."""

    def loss(params, image, label, key):
        scores = look(params, image)
        drawn = jax.random.categorical(key, scores, shape=(4,))
        each = jax.vmap(reading_loss, (None, None, None, 0))(
            params, image, label, jax.nn.one_hot(drawn, 9)
        )
        others = sg.score.leave_one_out(each) if baseline else None
        log_probs = jax.nn.log_softmax(scores)[drawn]
        return sg.score.score_loss(each, log_probs, others).mean()

    return loss


losses = {name: sampled_loss(sampler) for name, sampler in once.items()}
losses["score, no baseline"] = scored_loss(False)
losses["score, leave one out"] = scored_loss(True)
optimizer = optax.adam(3e-3)
blocks, block_steps, batch_size, seeds = 20, 35, 64, 3


test_canvases = jax.vmap(canvas)(
    jax.random.split(jax.random.key(99), len(test_rows)), pictures[test_rows]
)


def test(params, images, places):
    """Part of the test digits found, and part read, at the best place."""

    def one(image, place, label):
        at = jnp.argmax(look(params, image))
        answer = jnp.argmax(read(params, glimpses(image)[at]))
        return at == place, answer == label

    found, right = jax.vmap(one)(images, places, labels[test_rows])
    return found.mean(), right.mean()


def batch(key):
    """Draw fresh canvases, their labels, and a key for each choice."""
    key1, key2, key3 = jax.random.split(key, 3)
    rows = jax.random.choice(key1, train_rows, (batch_size,))
    images, _ = jax.vmap(canvas)(jax.random.split(key2, batch_size), pictures[rows])
    return images, labels[rows], jax.random.split(key3, batch_size)


def start(key):
    """Draw the first weights of a seed, and all its batches."""
    key1, key2 = jax.random.split(key)
    keys = jax.random.split(key2, (blocks, block_steps))
    return init(key1), jax.lax.map(lambda keys: jax.lax.map(batch, keys), keys)


starts = jax.lax.map(start, jax.random.split(jax.random.key(1), seeds))


def train(loss):
    """Train on the batches; return what is found and read, by seed and block."""

    def step(carry, data):
        params, state = carry

        def batch_loss(params):
            return jax.vmap(loss, (None, 0, 0, 0))(params, *data).mean()

        updates, state = optimizer.update(jax.grad(batch_loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def block(carry, data):
        carry, _ = jax.lax.scan(step, carry, data)
        return carry, test(carry[0], *test_canvases)

    def run(params, data):
        carry = params, optimizer.init(params)
        (params, _), results = jax.lax.scan(block, carry, data)
        return params, results

    return jax.jit(jax.vmap(run))(*starts)


trained = {name: train(loss) for name, loss in losses.items()}

# %%
heading(f"Test digits after {blocks * block_steps:,} steps (mean of {seeds} seeds)")
print(f"{'how the choice is trained':<28}{'found':>9}{'read':>9}")
ends = {}
for name, (_, results) in trained.items():
    found, right = (float(np.asarray(r)[:, -1].mean()) for r in results)
    ends[name] = found, right
    print(f"{name:<28}{found:>9.1%}{right:>9.1%}")
for name in ("straight-through", "ReinMax", "Gumbel-Rao, 8", "score, leave one out"):
    assert ends[name][0] > ends["the choice not trained"][0] + 0.3
    assert ends[name][1] > ends["the choice not trained"][1] + 0.2

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
done = np.arange(1, blocks + 1) * block_steps
for k, (name, (_, results)) in enumerate(trained.items()):
    style = {"color": "0.5" if not k else f"C{k - 1}", "ls": "--" if not k else "-"}
    for ax, result in zip(axes, results, strict=True):
        ax.plot(done, np.asarray(result).mean(0), label=name, lw=2, **style)
axes[0].set(title="Digits found", xlabel="Training steps", ylabel="Test digits")
axes[1].set(title="Digits read", xlabel="Training steps")
for ax in axes:
    ax.set(ylim=(0, 1), xlim=(0, done[-1]))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(alpha=0.3)
handles, names = axes[0].get_legend_handles_labels()
fig.legend(handles, names, loc="outside lower center", ncols=4)
fig.suptitle(f"A network that must choose where to look (mean of {seeds} seeds)")
plt.show()

# %%
params = jax.tree.map(lambda x: x[0], trained["ReinMax"][0])
shown = test_rows[:8]
images, places = jax.vmap(canvas)(
    jax.random.split(jax.random.key(5), len(shown)), pictures[shown]
)
fig, axes = plt.subplots(2, 8, figsize=(13, 3.9), layout="constrained")
for column, (image, label) in enumerate(zip(images, labels[shown], strict=True)):
    scores = look(params, image)
    at = int(jnp.argmax(scores))
    answer = int(jnp.argmax(read(params, glimpses(image)[at])))
    top, bottom = axes[:, column]
    top.imshow(image, cmap="gray", vmin=0, vmax=1)
    y, x = (int(v) - 0.5 for v in offsets[at])
    color = "tab:green" if answer == int(label) else "tab:red"
    top.add_patch(plt.Rectangle((x, y), 8, 8, fill=False, ec=color, lw=2.5))
    top.set_title(f"{int(label)}, read as {answer}", color=color, fontsize=11)
    bottom.imshow(jax.nn.softmax(scores).reshape(3, 3), cmap="Blues", vmin=0, vmax=1)
    for ax in (top, bottom):
        ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("where it looks")
axes[1, 0].set_ylabel("probability\nof each place")
fig.suptitle("The network trained with ReinMax, on test digits")
plt.show()

# %% [markdown]
# - A place next to the right one shows half of the digit. That is often enough to read
#   it, so more digits are read than found.
# - Plain straight-through learns fastest here: little noise is worth more to this task
#   than little bias, and ReinMax has more of the first and less of the second.
# - Without a baseline the likelihood ratio learns slowly. With the other three samples
#   as its baseline it keeps up, and it never differentiates the reading by the choice:
#   the glimpse could come from a camera.
