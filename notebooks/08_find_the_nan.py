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
# # Find the NaN: four bugs, located and mended
#
# A training run prints `nan`, and from then on everything is `nan`. Where was the first
# one born? `jax.debug_nans` stops at the first `nan` of all: also at one that is masked
# later and does no harm, and in the backward pass of a jitted function without a line.
#
# `sg.find_nonfinite(loss)(params, batch)` works the other way round. It looks at what
# is nonfinite *in the end*, the result or the gradient, and walks back to the operation
# that made it so. It tells the line, the expression, the operands, the step of a `scan`
# and the example of a `vmap`, and what to write instead.
#
# Here are four bugs that are met in practice. The losses are small, and each of them
# has been written like this by somebody.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import stopgrad_jax as sg

digits = load_digits()
IMAGES = jnp.asarray(digits.images.reshape(-1, 64) / 16.0, jnp.float32)
LABELS = jnp.asarray(digits.target)
BLUE, ORANGE = "#0072B2", "#D55E00"


def train(loss, params, batch, steps=100, rate=0.1):
    """Run gradient descent on one batch; return the losses, one for each step."""
    step = sg.train.make_step(loss, optax.sgd(rate), nonfinite="report")
    state = step.init(params)
    _, history = sg.train.fit(
        step, state, lambda number: batch, steps=steps, progress=False
    )
    bad = np.any(list(history["nonfinite"].values()), axis=0)
    first = f"first nonfinite gradient at step {bad.argmax()}" if bad.any() else "fine"
    print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, {first}")
    return history["loss"]


# %% [markdown]
# ## 1. A norm at zero
#
# A triplet loss: an image shall be nearer to another one of its class (`positive`) than
# to one of another class. The author knows that the norm has no derivative at zero, and
# has masked that case. In this batch one image is its own `positive`: the distance is
# exactly 0, the mask is at work, the loss is finite.


# %%
def distance(a, b):
    difference = a - b
    close = jnp.sum(difference**2, axis=-1) == 0.0
    return jnp.where(close, 0.0, jnp.linalg.norm(difference, axis=-1))


def triplet_loss(w, batch):
    anchor, positive, negative = (x @ w for x in batch)
    margin = distance(anchor, positive) - distance(anchor, negative) + 0.5
    return jnp.mean(jax.nn.relu(margin))


def triples():
    """Return 32 triples of images, the sixth with its own anchor as positive."""
    order = jnp.argsort(LABELS)
    a, p = order[:32], order[1:33]
    return IMAGES[a], IMAGES[p].at[5].set(IMAGES[a][5]), IMAGES[order[-32:]]


W = jax.random.normal(jax.random.key(0), (64, 8)) / 8
batch = triples()
print(f"loss {triplet_loss(W, batch):.3f}, so far so good")
gradient = jax.grad(triplet_loss)(W, batch)
print(f"{int(jnp.isnan(gradient).sum())} of {gradient.size} entries are nan")

# %%
print(sg.find_nonfinite(jax.jit(triplet_loss))(W, batch))

# %% [markdown]
# It is the `jnp.where` itself: it masks the *value*. In the backward pass the norm's
# derivative is computed all the same, for all examples; where the distance is zero it
# is infinite, and it is multiplied by the mask's zero: `0 * inf` is `nan`. The remedy
# is the *double where*: make the operand safe first, then the norm never sees a zero.


# %%
def distance(a, b):
    difference = a - b
    square = jnp.sum(difference**2, axis=-1)
    close = square == 0.0
    return jnp.where(close, 0.0, jnp.sqrt(jnp.where(close, 1.0, square)))


print(sg.find_nonfinite(triplet_loss)(W, batch))
losses = {"1. triplet loss": train(triplet_loss, W, batch)}

# %% [markdown]
# ## 2. A masked logarithm
#
# The entropy of a distribution is $-\sum p \log p$, and $0 \log 0$ counts as 0. So the
# author takes the sum over positive $p$ only. In the forward pass `log(0)` is `-inf`,
# masked, and does no harm. In the backward pass it does: the product rule multiplies
# the mask's zero by it, and `0 * inf` is `nan` again.


# %%
def entropy(p):
    return -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0.0), axis=-1)


def confident(w, x):
    scores = x @ w
    sparse = jax.nn.relu(scores - scores.mean(axis=-1, keepdims=True))
    p = sparse / jnp.sum(sparse, axis=-1, keepdims=True)
    return jnp.mean(entropy(p))


V = jax.random.normal(jax.random.key(1), (64, 10)) / 8
print(sg.find_nonfinite(confident)(V, IMAGES[:32]))


# %%
def entropy(p):
    safe = jnp.where(p > 0, p, 1.0)
    return -jnp.sum(safe * jnp.log(safe), axis=-1)


print(sg.find_nonfinite(confident)(V, IMAGES[:32]))
losses["2. entropy"] = train(confident, V, IMAGES[:32], rate=0.5)

# %% [markdown]
# ## 3. An overflow in a scan
#
# Attention over a sequence, one element after the other: the scan carries the sum of
# the weighted values and the sum of the weights `exp(score)`. It works until a score is
# above 88: then `exp` leaves the range of a float32, and `inf / inf` is `nan`. The loss
# is `nan`; its place is inside of a jitted scan, some steps before the end.


# %%
def attend(query, keys, values):
    def step(carry, pair):
        total, weights = carry
        key, value = pair
        weight = jnp.exp(jnp.dot(query, key))
        return (total + weight * value, weights + weight), None

    start = jnp.zeros_like(values[0]), 0.0
    (total, weights), _ = jax.lax.scan(step, start, (keys, values))
    return total / weights


def attention_loss(query, sequence):
    answer = attend(query, sequence, sequence)
    return jnp.mean((answer - sequence[0]) ** 2)


SEQUENCE = jax.random.normal(jax.random.key(2), (12, 8)).at[7].multiply(12.0)
QUERY = SEQUENCE[7] / 4
print(f"loss {jax.jit(attention_loss)(QUERY, SEQUENCE)}")
report = sg.find_nonfinite(jax.jit(attention_loss))(QUERY, SEQUENCE)
print(report)

# %% [markdown]
# The report is an object too: `report.step` is the step of the scan, `report.operands`
# the numbers. The score of step 7 is far too large for `exp`. The usual remedy is to
# carry the largest score so far as well, and to take it off: nothing above `exp(0)` is
# ever computed.

# %%
print(f"step {report.step}: exp({report.operands[0]:.1f})")


def attend(query, keys, values):
    def step(carry, pair):
        total, weights, largest = carry
        key, value = pair
        score = jnp.dot(query, key)
        new = jnp.maximum(largest, score)
        shrink, weight = jnp.exp(largest - new), jnp.exp(score - new)
        total, weights = total * shrink + weight * value, weights * shrink + weight
        return (total, weights, new), None

    start = jnp.zeros_like(values[0]), 0.0, -1e9
    (total, weights, _), _ = jax.lax.scan(step, start, (keys, values))
    return total / weights


print(sg.find_nonfinite(attention_loss)(QUERY, SEQUENCE))
# From this query on, one weight is 1 and all others are 0, and nothing is learned. So
# we train from a smaller one.
losses["3. attention"] = train(attention_loss, QUERY / 50, SEQUENCE, rate=0.01)

# %% [markdown]
# ## 4. Zero over zero in a clip
#
# Gradient clipping by hand, the way it is often written: divide by the norm where that
# is too large. Here it is in a training step that takes its gradient itself; the report
# then speaks of the step's own results. All goes well as long as no gradient is zero.
# That of a weight vector whose units are all dead *is* zero, and `0 / 0` is `nan`. The
# clip does not even mean to change it.


# %%
def clip(gradient, limit):
    norm = jnp.sqrt(jnp.sum(gradient**2))
    return jnp.minimum(limit, norm) * (gradient / norm)


def network(params, x):
    hidden = jax.nn.relu(x @ params["in"])
    return hidden @ params["out"]


def step(params, batch):
    def loss(params):
        x, y = batch
        return jnp.mean((network(params, x) - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    clipped = jax.tree.map(lambda g: clip(g, 1.0), gradients)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, clipped), value


PARAMS = {"in": -jnp.ones((64, 4)) / 64, "out": jnp.ones((4, 1))}
DATA = IMAGES[:32], LABELS[:32, None] / 10.0
print(sg.find_nonfinite(jax.jit(step))(PARAMS, DATA))

# %% [markdown]
# The gradients of `in` and `out` are zero, since all units are dead; the report names
# both, and the line of the division. `sg.clip_gradient_norm` is the same clip without
# the trap: it never divides by a norm of zero. It is put on the *value*: the parameters
# are used as they are, and what comes back to them is clipped.


# %%
def mended(params, batch):
    def loss(params):
        params = {k: sg.clip_gradient_norm(v, 1.0) for k, v in params.items()}
        x, y = batch
        return jnp.mean((network(params, x) - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients), value


print(sg.find_nonfinite(mended)(PARAMS, DATA))

# %% [markdown]
# No `nan` any more. But this network still does not learn, and no search for nonfinite
# numbers can tell: its units are dead. `sg.gradient_stats` shows it: all entries of
# both gradients are zero, and there is no structural cause (`None`), so it is the
# numbers.

# %%
stats = sg.gradient_stats(lambda p, x: jnp.mean(network(p, x) ** 2), "p")
for name, found in stats(PARAMS, IMAGES[:32]).items():
    share = f"{float(found.zero_fraction):.0%} zeros"
    print(f"{name:6} norm {found.norm:.1f}, {share}, cause {found.cause}")

alive = {**PARAMS, "in": -PARAMS["in"]}
values = []
for _ in range(100):
    alive, value = jax.jit(mended)(alive, DATA)
    values.append(float(value))
losses["4. regression"] = np.array(values)
print(f"with living units: loss {values[0]:.3f} -> {values[-1]:.3f}")

# %% [markdown]
# ## All four, mended
#
# Each of these curves ended at its first step before.

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
for axis, (title, curve) in zip(axes, losses.items(), strict=True):
    axis.plot(curve, color=BLUE)
    axis.set(title=title, xlabel="step", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("loss")
figure.suptitle("The mended losses train")
plt.show()

# %% [markdown]
# ## What to take along
#
# - `nan` gradients with a finite loss are mostly a mask that comes too late. Mask the
#   operand, not (only) the result.
# - `sg.find_nonfinite(fun)(*args)` is for a function that you can call once more with
#   the arguments that failed. It runs the function compiled, and only if something is
#   nonfinite step by step, as far as needed.
# - In a training run, `make_step(..., nonfinite="report")` tells which leaves got a
#   nonfinite gradient at which step, and `"skip"` leaves such steps out.
# - `sg.replace_nonfinite_gradient(x)` keeps `nan` from spreading. It treats the
#   symptom: find the line first.
