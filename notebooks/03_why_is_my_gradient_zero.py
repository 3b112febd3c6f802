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
# # Why is my gradient zero?
#
# A weight does not learn, and `jax.grad` says that its gradient is zero. Is that zero
# by chance, for these inputs? Or can it never be anything else, because somewhere on
# the way the gradient was cut? And where?
#
# `sg.flow(fun)(*args)` answers without running the function: it looks at the operations
# that JAX traces, and asks for each whether a gradient can pass. What it hands back can
# be looked at in four ways:
#
# - `print(flow)`: a table of which input trains which part of a loss, and of the cuts;
# - `flow.source()`: your own code with the gradient drawn in its margin;
# - `flow.explain("params/w")`: where one input's gradient goes, and where and why it
#   ends;
# - `flow.focus("params/w")`: a picture of that, with the explanation below it.
#
# In a notebook, `flow` by itself shows the whole picture above the table. Pictures are
# laid out by Graphviz, which `pip install stopgrad_jax[viz]` brings along.
#
# Section 1 has eight zeros with eight causes. Sections 2 to 5 are four mistakes of the
# kind that no error message reports, section 6 puts numbers to who trains what.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import stopgrad_jax as sg


def heading(text):
    """Print a heading line above a table."""
    print(f"{text}\n{'-' * len(text)}")


# %% [markdown]
# ## 1. Eight zeros
#
# Each of these functions has a gradient of zero at `w = 2`.

# %%
key = jax.random.key(0)
causes = {
    "unused": lambda w: jnp.float32(6.0),
    "stop_gradient": lambda w: jax.lax.stop_gradient(3 * w) ** 2,
    "round": lambda w: jnp.round(3.3 * w) ** 2,
    "integer": lambda w: (3.3 * w).astype(int).astype(float),
    "argmax": lambda w: jnp.argmax(jnp.stack([w, 1.0])).astype(float),
    "sample": lambda w: jax.random.categorical(key, jnp.stack([w, 0.0])) * 1.0,
    "overwritten": lambda w: jnp.zeros(2).at[0].set(w).at[0].set(1.0).sum(),
    "dead relu": lambda w: jax.nn.relu(w - 3.0),
}
print("jax.grad:", [float(jax.grad(fun)(2.0)) for fun in causes.values()])
assert all(jax.grad(fun)(2.0) == 0 for fun in causes.values())

# %% [markdown]
# Eight times the same answer. `sg.flow` tells them apart. A line of a notebook is
# written as the number of its cell and of the line in it, as in IPython's own errors.

# %%
flows = {cause: sg.flow(fun)(2.0) for cause, fun in causes.items()}


def words(flow):
    """Say in words why the gradient is zero: the cut, or else the verdict."""
    verdict = flow.explain("w").plain.splitlines()[0].partition(": ")[2]
    return flow.cuts[0].words if flow.cuts else verdict


heading("Eight zeros, eight causes")
print(f"{'cause':<15}{'sg.gradients':<14}{'sg.flow says':<65}{'line'}")
for cause, flow in flows.items():
    gradient = sg.gradients(causes[cause], "w")(2.0)
    sites = [f"{cut.site.file}:{cut.site.line}" for cut in flow.cuts]
    line = sites[0] if sites else flow.place
    print(f"{cause:<15}{gradient!s:<14}{words(flow):<65}{line}")
    assert (gradient is None) == (cause != "dead relu")
    assert flow.connected("w") == (cause == "dead relu")
    assert line.endswith(f":{causes[cause].__code__.co_firstlineno}")
assert len({words(flow) for flow in flows.values()}) == len(causes)

# %% [markdown]
# Seven of the eight can never be anything but zero, whatever `w` is; `sg.gradients`
# answers `None` for these. The `relu` is different: nothing is cut there, it just has
# a slope of zero at this `w`. At `w = 4` the gradient is 1. Since `sg.flow` runs
# nothing, it cannot know which `w` you will bring, and says so.
#
# `explain` shows the place. Where the cut is likely to be an oversight it also says
# what could be done about it.

# %%
assert jax.grad(causes["dead relu"])(4.0) == 1
flows["round"].explain("w")

# %%
flows["overwritten"].explain("w")

# %% [markdown]
# ## 2. A codebook that never learns
#
# A vector-quantised autoencoder (VQ-VAE) writes an image as a short list of entries of
# a *codebook*. Here the encoder makes eight vectors from each image, each of them is
# replaced by the nearest of the codebook's 32 vectors, and the decoder must restore the
# image from these. Picking the nearest vector has no gradient. So the decoder's
# gradient is passed straight through to the encoder, and two more terms of the loss
# pull the vectors of the codebook and those of the encoder towards each other.
#
# We train it on the 8 by 8 digits of scikit-learn.

# %%
images = jnp.float32(load_digits().data / 16)
train_images, test_images = images[:1500], images[1500:]
slots, width, codes = 8, 4, 32
layers = {
    "encoder": {"hidden": (64, 64), "out": (64, slots * width)},
    "decoder": {"hidden": (slots * width, 64), "out": (64, 64)},
}


def init(key, shapes):
    """Draw the weights of dense layers at random."""
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": draw(k, shape), "b": jnp.zeros(shape[-1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def mlp(params, x):
    """Apply a hidden layer and one more."""
    hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def encode(params, x):
    """Make eight vectors of each image."""
    return mlp(params["encoder"], x).reshape(len(x), slots, width)


def decode(params, z):
    """Restore images."""
    return mlp(params["decoder"], z.reshape(len(z), slots * width))


def nearest(codebook, z):
    """Find the number of the nearest vector."""
    distances = jnp.sum((z[..., None, :] - codebook) ** 2, axis=-1)
    return jnp.argmin(distances, axis=-1)


def mean_square(x):
    """Mean of the squares."""
    return jnp.mean(x**2)


# %% [markdown]
# The loss below looks right, and it runs. `sg.name` gives a name to each of its three
# terms. It changes nothing else, and section 6 asks for gradients by these names.


# %%
def vqvae_loss(params, x):
    """Loss of an autoencoder with a codebook. It has a mistake."""
    z_e = encode(params, x)
    z_q = params["codebook"][nearest(params["codebook"], z_e)]
    z_q = z_e + jax.lax.stop_gradient(z_q - z_e)  # straight through
    x_hat = decode(params, z_q)
    recon = sg.name(mean_square(x_hat - x), "recon")
    pull_codes = sg.name(mean_square(jax.lax.stop_gradient(z_e) - z_q), "pull_codes")
    pull_encoder = sg.name(
        mean_square(z_e - jax.lax.stop_gradient(z_q)), "pull_encoder"
    )
    return recon + pull_codes + 0.25 * pull_encoder


optimizer = optax.adam(3e-3)
steps, batch_size = 600, 64


def start(key):
    """Draw all parameters."""
    keys = jax.random.split(key, 3)
    return {
        "encoder": init(keys[0], layers["encoder"]),
        "codebook": 0.3 * jax.random.normal(keys[1], (codes, width)),
        "decoder": init(keys[2], layers["decoder"]),
    }


def fit(loss, key):
    """Train; return the parameters before and after."""

    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, train_images, (batch_size,))
        grads = jax.grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    key1, key2 = jax.random.split(key)
    params = start(key1)
    carry = params, optimizer.init(params)
    (trained, _), _ = jax.lax.scan(step, carry, jax.random.split(key2, steps))
    return params, trained


def restored(params, x):
    """Send images through the codebook; return them and the numbers of its vectors."""
    numbers = nearest(params["codebook"], encode(params, x))
    return decode(params, params["codebook"][numbers]), numbers


def report(loss, seeds=3):
    """Train for several seeds, print how it went; return the first seed's outcome."""
    train = jax.jit(lambda key: fit(loss, key))
    print(f"{'seed':<6}{'codebook moved by':>18}{'vectors in use':>18}", end="")
    print(f"{'error on test images':>24}")
    runs, rows = [], []
    for seed in range(seeds):
        before, after = train(jax.random.key(seed))
        moved = float(jnp.max(jnp.abs(after["codebook"] - before["codebook"])))
        again, numbers = restored(after, test_images)
        used = len(np.unique(numbers))
        error = float(mean_square(again - test_images))
        print(f"{seed:<6}{moved:>18.3f}{used:>12} of {codes}{error:>24.4f}")
        runs.append((before, after))
        rows.append((moved, used, error))
    return *runs[0], np.array(rows)


average = train_images.mean(axis=0)
chance = float(mean_square(test_images - average))
heading(f"The autoencoder after {steps} steps")
initial, stuck, stuck_rows = report(vqvae_loss)
print(f"\nthe average image, as an answer to every image: error {chance:.4f}")
assert np.all(stuck_rows[:, 0] == 0)
assert np.all(stuck_rows[:, 1] < codes / 2)
assert np.all(stuck_rows[:, 2] > 0.95 * chance)

# %% [markdown]
# The codebook has not moved at all, and the images are restored no better than by the
# average image. No error was raised. Let us ask for the table.

# %%
flow = sg.flow(vqvae_loss, "params")(initial, test_images)
print(flow)
assert {row.path: row.status for row in flow.inputs}["params/codebook"] == "cut"

# %% [markdown]
# The row of the codebook says `cut` in every column: no term trains it. There is a
# second surprise: `pull_codes` should train the codebook and nothing else, and it
# trains the encoder instead. The source shows both.

# %%
flow.source()

# %%
flow.focus("params/codebook")

# %%
explanation = flow.explain("params/codebook")
assert flow.focus("params/codebook").text == explanation
cut, stop = flow.cuts[:2]
assert (cut.reason, stop.reason) == ("integer", "stop_gradient")

# %% [markdown]
# The straight-through line gives its result the name `z_q` again. From there on `z_q`
# is the encoder's output as far as gradients go, and the vectors of the codebook are
# constants. `pull_codes` comes after that line, so it cannot reach the codebook.
#
# It reaches the encoder instead, and with the wrong sign: it pushes the encoder's
# vectors *away* from the codebook, exactly as hard as `pull_encoder` would pull, and
# that one counts only a quarter.

# %%
push, pull = (
    sg.gradients(vqvae_loss, "params/encoder", ys=term)(initial, test_images)
    for term in ("pull_codes", "pull_encoder")
)
rest = jax.tree.map(jnp.add, push, pull)
assert optax.global_norm(rest) < 1e-5 * optax.global_norm(pull)
print("norm of the encoder's gradient")
print(f"from pull_codes:   {optax.global_norm(push):.4f}")
print(f"from pull_encoder: {optax.global_norm(pull):.4f}")
print(f"of their sum:      {optax.global_norm(rest):.4f}")

# %% [markdown]
# A test of one line finds this on the day it is written. `sg.assert_gradient` asserts
# that a gradient can reach every weight below an address, and when it fails its message
# is the explanation.


# %%
def message(check, *args):
    """Return the message of a contract that does not hold."""
    try:
        check(*args)
    except AssertionError as error:
        return str(error)
    raise RuntimeError("the contract holds")


check = sg.assert_gradient(vqvae_loss, "params/codebook")
print(message(check, initial, test_images))

# %% [markdown]
# The fix is a new name for the straight-through value.


# %%
def fixed_vqvae_loss(params, x):
    """Loss of an autoencoder with a codebook."""
    z_e = encode(params, x)
    z_q = params["codebook"][nearest(params["codebook"], z_e)]
    z_st = z_e + jax.lax.stop_gradient(z_q - z_e)  # straight through
    x_hat = decode(params, z_st)
    recon = sg.name(mean_square(x_hat - x), "recon")
    pull_codes = sg.name(mean_square(jax.lax.stop_gradient(z_e) - z_q), "pull_codes")
    pull_encoder = sg.name(
        mean_square(z_e - jax.lax.stop_gradient(z_q)), "pull_encoder"
    )
    return recon + pull_codes + 0.25 * pull_encoder


sg.assert_gradient(fixed_vqvae_loss, "params")(initial, test_images)
sg.assert_no_gradient(fixed_vqvae_loss, "params/encoder", ys="pull_codes")(
    initial, test_images
)
flow = sg.flow(fixed_vqvae_loss, "params")(initial, test_images)
print(flow)

# %%
flow.focus("params/codebook")

# %% [markdown]
# Now `pull_codes` trains the codebook and only the codebook. The two other terms do not
# train it, as it should be. The same training, with the same seeds:

# %%
heading(f"The autoencoder after {steps} steps, fixed")
_, trained, rows = report(fixed_vqvae_loss)
print(f"\nthe average image, as an answer to every image: error {chance:.4f}")
assert np.all(rows[:, 0] > 0.1)
assert np.all(rows[:, 1] >= codes - 4)
assert np.all(rows[:, 2] < 0.4 * stuck_rows[:, 2])

# %%
targets = load_digits().target[1500:]
shown = test_images[np.array([np.argmax(targets == digit) for digit in range(10)])]
rows = {
    "test image": shown,
    "codebook\nnever trained": restored(stuck, shown)[0],
    "fixed": restored(trained, shown)[0],
}
fig, axes = plt.subplots(3, 10, figsize=(10, 3.6), layout="constrained")
for row, (name, row_images) in zip(axes, rows.items(), strict=True):
    for ax, image in zip(row, row_images, strict=True):
        ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
fig.suptitle("Ten test images, each restored from eight entries of the codebook")
plt.show()

# %% [markdown]
# ## 3. A target that must not learn
#
# In deep Q-learning a network learns to predict a reward plus the prediction for the
# next state. That second prediction is left to a copy of the network, the *target*,
# which follows slowly. In double Q-learning the *online* network picks the next action
# and the target rates it.
#
# Where both networks are parts of one tree of parameters, the optimizer changes the
# target too if a gradient reaches it, and the goal moves towards the guess.
#
# We have no data yet, and need none: shapes will do.


# %%
def shape(*sizes, dtype=jnp.float32):
    """Stand in for an array of this shape."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def network(inputs, outputs, hidden=32):
    """Stand in for the parameters of `mlp`."""
    return {
        "hidden": {"w": shape(inputs, hidden), "b": shape(hidden)},
        "out": {"w": shape(hidden, outputs), "b": shape(outputs)},
    }


def chosen(q, action):
    """Take the entry of each row that an action names."""
    return jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]


def ddqn_loss(params, batch):
    """Loss of double Q-learning."""
    q = chosen(mlp(params["online"], batch["state"]), batch["action"])
    best = jnp.argmax(mlp(params["online"], batch["next_state"]), axis=1)
    q_next = chosen(mlp(params["target"], batch["next_state"]), best)
    goal = batch["reward"] + 0.99 * q_next
    error = q - jax.lax.stop_gradient(goal)
    return mean_square(error)


batch = {
    "state": shape(16, 4),
    "next_state": shape(16, 4),
    "action": shape(16, dtype=jnp.int32),
    "reward": shape(16),
}
networks = {"online": network(4, 3), "target": network(4, 3)}
sg.assert_gradient(ddqn_loss, "params/online")(networks, batch)
sg.assert_no_gradient(ddqn_loss, "params/target")(networks, batch)
flow = sg.flow(ddqn_loss, "params")(networks, batch)
print(flow)

# %%
flow.source()

# %% [markdown]
# Both contracts hold. The online network trains, although one of its two uses is cut:
# picking the best action is an `argmax`. That is as it should be. The target's only use
# ends at the stop.

# %%
flow.focus("params/target")


# %% [markdown]
# Now the same loss without the stop. Its value is the same for every batch, so no test
# of values finds the difference.


# %%
def unstopped_ddqn_loss(params, batch):
    """Loss of double Q-learning without the stop. It has a mistake."""
    q = chosen(mlp(params["online"], batch["state"]), batch["action"])
    best = jnp.argmax(mlp(params["online"], batch["next_state"]), axis=1)
    q_next = chosen(mlp(params["target"], batch["next_state"]), best)
    goal = batch["reward"] + 0.99 * q_next
    error = q - goal
    return mean_square(error)


def drawn(tree, seed=0):
    """Draw numbers for shapes: small ones, and whole ones below 3."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [
        0.5 * jax.random.normal(key, leaf.shape)
        if leaf.dtype == jnp.float32
        else jax.random.randint(key, leaf.shape, 0, 3)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


numbers = drawn(networks), drawn(batch, seed=1)
assert ddqn_loss(*numbers) == unstopped_ddqn_loss(*numbers)

check = sg.assert_no_gradient(unstopped_ddqn_loss, "params/target")
print(message(check, networks, batch))

# %%
flow = sg.flow(unstopped_ddqn_loss, "params")(networks, batch)
assert flow.connected("params/target")
flow.focus("params/target")

# %% [markdown]
# ## 4. An actor that trains its critic
#
# An actor-critic has two networks. The *value* network predicts how well things will
# go. The *policy* network picks actions, and an action that went better than predicted
# (its *advantage* is positive) is made more likely. Each has its own term of the loss.


# %%
def actor_critic_loss(params, batch):
    """Loss of an actor and a critic. It has a mistake."""
    value = mlp(params["value"], batch["state"])[:, 0]
    next_value = mlp(params["value"], batch["next_state"])[:, 0]
    goal = batch["reward"] + 0.99 * jax.lax.stop_gradient(next_value)
    advantage = goal - value
    logits = mlp(params["policy"], batch["state"])
    log_prob = chosen(jax.nn.log_softmax(logits), batch["action"])
    policy_loss = sg.name(-jnp.mean(log_prob * advantage), "policy_loss")
    value_loss = sg.name(mean_square(advantage), "value_loss")
    return policy_loss + value_loss


params = {"policy": network(4, 3), "value": network(4, 1)}
flow = sg.flow(actor_critic_loss, "params")(params, batch)
print(flow)

# %% [markdown]
# The row of the value network should say `flows` under `value_loss` only. It says so
# under `policy_loss` too: the policy's term falls if the critic merely predicts more,
# whatever the reward was. The stop at `next_value` is there, and it is not the one that
# is missing.

# %%
flow.source()

# %% [markdown]
# `flow.between` shows the leak alone: from the value network to the policy's term.

# %%
flow.between("params/value", "policy_loss")


# %% [markdown]
# A contract for each term: `ys` says which.

# %%
check = sg.assert_no_gradient(actor_critic_loss, "params/value", ys="policy_loss")
print(message(check, params, batch))


# %%
def fixed_actor_critic_loss(params, batch):
    """Loss of an actor and a critic."""
    value = mlp(params["value"], batch["state"])[:, 0]
    next_value = mlp(params["value"], batch["next_state"])[:, 0]
    goal = batch["reward"] + 0.99 * jax.lax.stop_gradient(next_value)
    advantage = goal - value
    weight = jax.lax.stop_gradient(advantage)
    logits = mlp(params["policy"], batch["state"])
    log_prob = chosen(jax.nn.log_softmax(logits), batch["action"])
    policy_loss = sg.name(-jnp.mean(log_prob * weight), "policy_loss")
    value_loss = sg.name(mean_square(advantage), "value_loss")
    return policy_loss + value_loss


for network_, own, other in (
    ("params/policy", "policy_loss", "value_loss"),
    ("params/value", "value_loss", "policy_loss"),
):
    sg.assert_gradient(fixed_actor_critic_loss, network_, ys=own)(params, batch)
    sg.assert_no_gradient(fixed_actor_critic_loss, network_, ys=other)(params, batch)
flow = sg.flow(fixed_actor_critic_loss, "params")(params, batch)
print(flow)

# %%
flow.focus("params/value")

# %% [markdown]
# ## 5. A teacher that is taught
#
# BYOL learns from images without labels. The *online* network must predict what the
# *target* network, its own moving average, says about another view of the same image.
# Each view is once the question and once the answer, so the loss has two halves. If a
# gradient reaches the target, the two can agree to say the same about every image: a
# loss of zero, and nothing learned.


# %%
def normalised(x):
    """Scale each row to length 1."""
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def predicted(online, view):
    """Predict what the target network says about the other view."""
    return normalised(mlp(online["predictor"], mlp(online["encoder"], view)))


def taught(target, view):
    """Say what is to be predicted."""
    return normalised(mlp(target["encoder"], view))


def byol_loss(params, view1, view2):
    """Loss of a pair of networks. It has a mistake."""
    guess1 = predicted(params["online"], view1)
    guess2 = predicted(params["online"], view2)
    teach1 = taught(params["target"], view1)
    teach2 = taught(params["target"], view2)
    half1 = mean_square(guess1 - jax.lax.stop_gradient(teach2))
    half2 = mean_square(guess2 - teach1)
    return half1 + half2


pair = {
    "online": {"encoder": network(64, 16), "predictor": network(16, 16)},
    "target": {"encoder": network(64, 16)},
}
views = shape(32, 64), shape(32, 64)
flow = sg.flow(byol_loss, "params")(pair, *views)
print(flow)

# %% [markdown]
# One half has its stop, the other does not: the row of the target says `cut` and
# `flows`.

# %%
assert list(flow.inputs[1].terms.values()) == ["cut", "flows"]
flow.source()

# %%
flow.focus("params/target")

# %%
check = sg.assert_no_gradient(byol_loss, "params/target")
print(message(check, pair, *views))

# %% [markdown]
# The fix puts the stop where it cannot be forgotten: into the target's own function.


# %%
def constant(target, view):
    """Say what is to be predicted; a constant for gradients."""
    return jax.lax.stop_gradient(normalised(mlp(target["encoder"], view)))


def fixed_byol_loss(params, view1, view2):
    """Loss of a pair of networks."""
    guess1 = predicted(params["online"], view1)
    guess2 = predicted(params["online"], view2)
    teach1 = constant(params["target"], view1)
    teach2 = constant(params["target"], view2)
    half1 = mean_square(guess1 - teach2)
    half2 = mean_square(guess2 - teach1)
    return half1 + half2


sg.assert_gradient(fixed_byol_loss, "params/online")(pair, *views)
sg.assert_no_gradient(fixed_byol_loss, "params/target")(pair, *views)
flow = sg.flow(fixed_byol_loss, "params")(pair, *views)
print(flow)

# %%
flow.focus("params/target")

# %% [markdown]
# ## 6. Who trains what, in numbers
#
# The tables above say where gradients *can* flow. `sg.gradients` measures how large
# they are: for each part of the parameters, and for each term by its name. Where it
# answers `None`, the table says whether the gradient was cut on the way or the term
# does not use the part at all.


# %%
def who_trains_what(ax, title, loss, *args):
    """Draw the norm of each gradient: inputs down, terms of the loss across."""
    flow = sg.flow(loss, "params")(*args)
    rows = [row for row in flow.inputs if row.status != "data"]
    norms = np.full((len(rows), len(flow.terms)), np.nan)
    for j, term in enumerate(flow.terms):
        addresses = [row.path for row in rows]
        for i, gradient in enumerate(sg.gradients(loss, addresses, ys=term)(*args)):
            word = rows[i].terms[term]
            assert (word == "flows") == bool(jax.tree.leaves(gradient))
            if word == "flows":
                norms[i, j] = optax.global_norm(gradient)
                dark = np.log10(norms[i, j]) < -0.25
                color, text = "white" if dark else "black", f"{norms[i, j]:#.2g}"
            elif word == "cut":
                color, text = "black", "cut"
                place = (j - 0.5, i - 0.5)
                hatch = plt.Rectangle(
                    place, 1, 1, fill=False, hatch="///", ec="#D55E00"
                )
                ax.add_patch(hatch)
            else:
                color, text = "0.4", "not used"
            back = {"facecolor": "white", "edgecolor": "none", "pad": 2}
            back = back if word == "cut" else None
            ax.text(j, i, text, ha="center", va="center", color=color, bbox=back)
    drawing = ax.imshow(
        np.log10(norms), cmap="cividis", vmin=-1.5, vmax=1, aspect="auto"
    )
    ax.set_title(title, pad=8)
    ax.set_xticks(range(len(flow.terms)), flow.terms)
    ax.set_yticks(range(len(rows)), [row.path for row in rows])
    ax.set_xticks(np.arange(0.5, len(flow.terms) - 1), minor=True)
    ax.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=3)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_color("0.5")
    return drawing, norms


actor_critic = drawn(params, seed=2), drawn(batch, seed=3)
fig, axes = plt.subplots(
    2, 2, figsize=(12, 5.8), layout="constrained", height_ratios=[3, 2]
)
fig.get_layout_engine().set(hspace=0.08, h_pad=0.08)
panels = [
    ("VQ-VAE, with the mistake", vqvae_loss, initial, test_images),
    ("VQ-VAE, fixed", fixed_vqvae_loss, initial, test_images),
    ("actor and critic, with the mistake", actor_critic_loss, *actor_critic),
    ("actor and critic, fixed", fixed_actor_critic_loss, *actor_critic),
]
norms = []
for ax, panel in zip(axes.ravel(), panels, strict=True):
    drawing, measured = who_trains_what(ax, *panel)
    norms.append(measured)
bar = fig.colorbar(drawing, ax=axes, label="log10 of the norm", aspect=30)
bar.outline.set_visible(False)
fig.suptitle("Who trains what: the norm of each term's gradient, by part of the model")
plt.show()

# %%
for before, after in (norms[:2], norms[2:]):
    both = ~np.isnan(before) & ~np.isnan(after)
    np.testing.assert_allclose(before[both], after[both], rtol=1e-5)
leak, own = norms[2][1]
print(f"value network, with the mistake: {own:.2f} from value_loss, its own term")
print(f"                                 {leak:.2f} from policy_loss")
more = sg.gradients(actor_critic_loss, "params/value/out/b", ys="policy_loss")
assert more(*actor_critic) < 0  # policy_loss falls if the critic predicts more

# %% [markdown]
# A hatched field is a zero that no input can change; it tells at a glance whether a
# loss trains what it was meant to. Where a gradient flows before and after the fix it
# is the same: the fixes changed which gradients exist, and none of their sizes.
