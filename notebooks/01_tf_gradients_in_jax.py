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
# # tf.gradients in JAX
#
# TensorFlow 1's `tf.gradients(ys, xs, stop_gradients=...)` has no direct match in JAX:
#
# - it differentiates *any* values by *any* other values, intermediate ones included;
# - it can hold any of them constant, for that one question;
# - it answers `None` where no gradient can flow, which is not the same as zero.
#
# `stopgrad_jax` brings all three to JAX. This notebook first answers the question that
# the project grew from, then repeats five small TensorFlow experiments and compares the
# numbers, then puts the same calls to work on a small image classifier.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import stopgrad_jax as sg


def heading(text):
    """Print a heading line above a table."""
    print(f"{text}\n{'-' * len(text)}")


# %% [markdown]
# ## 1. The question
#
# Code in the wild reads
#
# ```python
# y = xx + K.stop_gradient(rounded - xx)
# ```
#
# Why not simply `y = rounded`?
#
# Because rounding is a staircase: its slope is zero wherever it has one, so nothing in
# front of it would ever learn. In the line above the two `xx` cancel going *forward*,
# and what is left is `rounded`. Going *backward* the whole bracket counts as a
# constant, and what is left is the slope of the first `xx`, which is 1. So the value is
# that of `round` and the gradient is that of the identity.
#
# More generally, `t + stop_gradient(f(x) - t)` with `t = g(x)` has the value of `f` and
# the gradient of `g`. This is known as a straight-through estimator.


# %%
def plain(xx):
    """Round."""
    return jnp.round(xx)


def trick(xx):
    """Round, with the gradient of the identity."""
    return xx + jax.lax.stop_gradient(jnp.round(xx) - xx)


def exact(xx):
    """Round, with the gradient of the identity, by its name."""
    return sg.straight_through(jnp.round)(xx)


heading("Rounding 2.3: the value and its gradient")
print(f"{'code':<42}{'value':>6}{'jax.grad':>10}{'sg.gradients':>14}")
codes = {
    "round(xx)": plain,
    "xx + stop_gradient(round(xx) - xx)": trick,
    "sg.straight_through(jnp.round)(xx)": exact,
}
for code, fun in codes.items():
    value, slope, ours = fun(2.3), jax.grad(fun)(2.3), sg.gradients(fun, "xx")(2.3)
    print(f"{code:<42}{value:>6}{slope:>10}{ours!s:>14}")
assert sg.gradients(plain, "xx")(2.3) is None
assert sg.gradients(trick, "xx")(2.3) == 1.0
assert exact(2.3) == 2.0
assert jax.grad(exact)(2.3) == sg.gradients(exact, "xx")(2.3) == 1.0

# %% [markdown]
# `jax.grad` answers 0 for plain rounding. `sg.gradients` answers `None`: it is not that
# the gradient happens to be zero here, it can never be anything else. The last row says
# in one call what the trick means: the value of `round`, the gradient of its argument.
#
# One warning about the trick: its value is only *almost* that of `f`, because the two
# `xx` need not cancel in floating point. `sg.straight_through` subtracts nothing, and
# its value is that of `f` in every bit.

# %%
heading("Where the two xx do not cancel (float32)")
print(f"{'xx':>12}{'sign(xx)':>12}{'xx + stop_gradient(sign(xx) - xx)':>38}", end="")
print(f"{'sg.straight_through(jnp.sign)(xx)':>38}")
for xx in (3.0, 1e8, jnp.inf):
    xx = jnp.float32(xx)
    almost = xx + jax.lax.stop_gradient(jnp.sign(xx) - xx)
    exactly = sg.straight_through(jnp.sign)(xx)
    print(f"{xx:>12.0f}{jnp.sign(xx):>12}{almost:>38}{exactly:>38}")
    assert exactly == jnp.sign(xx)
    assert (almost == jnp.sign(xx)) == (xx == 3.0)

# %% [markdown]
# ## 2. Five experiments, TensorFlow beside JAX
#
# TensorFlow's numbers for A and B were recorded with TensorFlow 2.21 in graph mode on a
# CPU, and are read from `seed_golden.json`. Its answers to C, D and E are lists of
# small whole numbers, written out below.
#
# A and B fit a line to noisy points by gradient descent, one point a step. In every row
# the loss and its gradient are those before the update, `w` and `b` those after it.

# %%
golden = json.loads(Path("seed_golden.json").read_text())
xs, ys = np.float32(golden["x"]), np.float32(golden["y"])


def line_loss(w, b, x, y):
    """Squared error of the line at one of the 32 points."""
    return jnp.sum((y - (x * w + b)) ** 2) / (2 * 32)


def compare(title, rows, expected):
    """Print our rows beside TensorFlow's, and check that they agree."""
    keys = ["w", "b", "loss", "grad_w"]
    ours = np.array([[row[key] for key in keys] for row in rows])
    theirs = np.array([[row[key] for key in keys] for row in expected])
    heading(title)
    columns = [("w", 10), ("b", 10), ("loss", 11), ("dloss/dw", 12)]
    print(f"{'':<4}" + "".join(f"{name:>{2 * width}}" for name, width in columns))
    sides = "".join(f"{'JAX':>{width}}{'TF':>{width}}" for _, width in columns)
    print(f"{'step':<4}{sides}")
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        cells = zip(mine, other, columns, strict=True)
        text = "".join(f"{m:>{n}.6f}{o:>{n}.6f}" for m, o, (_, n) in cells)
        print(f"{step:<4}{text}")

    relative = np.max(np.abs(ours - theirs)[:, :2] / np.abs(theirs[:, :2]), axis=0)
    absolute = np.max(np.abs(ours - theirs)[:, 2:], axis=0)
    print(f"\nlargest relative difference: w {relative[0]:.1e}, b {relative[1]:.1e}")
    print(f"largest difference: loss {absolute[0]:.1e}, dloss/dw {absolute[1]:.1e}")
    assert np.all(relative < 1e-5)
    assert np.all(absolute < 1e-4)


# %% [markdown]
# ### A. Read a gradient while an optimizer trains
#
# The optimizer does its work as ever. One more line asks for the gradient that we want
# to look at, by its address: the entry `w` of the argument `params`.


# %%
def params_loss(params, x, y):
    """Squared error, with the weights in one dict."""
    return line_loss(params["w"], params["b"], x, y)


optimizer = optax.sgd(0.01)


@jax.jit
def optimizer_step(params, state, x, y):
    """Take one step of the optimizer, and read the gradient of w."""
    loss, grads = jax.value_and_grad(params_loss)(params, x, y)
    grad_w = sg.gradients(params_loss, "params/w")(params, x, y)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss, grad_w


params = {"w": jnp.float32(2), "b": jnp.float32(1)}
state = optimizer.init(params)
rows = []
for x, y in zip(xs[:20], ys[:20], strict=True):
    params, state, loss, grad_w = optimizer_step(params, state, x, y)
    rows.append({**params, "loss": loss, "grad_w": grad_w})
compare("Experiment A: the gradient, read while training", rows, golden["A"])

# %% [markdown]
# ### B. Your own update
#
# `grad_w, grad_b = tf.gradients(loss, [w, b])` keeps its shape: a list in, a list out.


# %%
@jax.jit
def own_step(w, b, x, y):
    """Take one step of gradient descent by hand."""
    loss, (grad_w, grad_b) = sg.value_and_gradients(line_loss, ["w", "b"])(w, b, x, y)
    return w - 0.01 * grad_w, b - 0.01 * grad_b, loss, grad_w


w, b = jnp.float32(2), jnp.float32(1)
rows = []
for x, y in zip(xs[:20], ys[:20], strict=True):
    w, b, loss, grad_w = own_step(w, b, x, y)
    rows.append({"w": w, "b": b, "loss": loss, "grad_w": grad_w})
compare("Experiment B: your own update", rows, golden["B"])

# %% [markdown]
# ### C, D, E. Intermediate values and stops
#
# - **C** differentiates by an intermediate value. `sg.name` marks it, and does nothing
#   else. Along all paths `a` counts three times in `c`: once itself, twice through `b`.
#   With both held constant (`stop_gradients`) only what `c` uses directly remains.
# - **D** cuts one path with `stop_gradient`. No other path leads to `w1`: its gradient
#   is `None`.
# - **E** cuts a path too, but a second one goes round the cut.


# %%
def c_fun(a):
    """Compute c = a + b with b = 2a."""
    b = sg.name(2 * a, "b")
    return a + b


def d_fun(w1, w2):
    """Compute b = stop_gradient(a) * w2 with a = 3 * w1."""
    a = 3 * w1
    return jax.lax.stop_gradient(a) * w2


def e_fun(a, b):
    """Compute e = stop_gradient(c) + d with c = d = a + b."""
    c, d = a + b, a + b
    return jax.lax.stop_gradient(c) + d


def show(code, ours, tensorflow):
    """Print our list beside TensorFlow's, and check that they agree."""
    ours = [None if g is None else float(g) for g in ours]
    print(f"{code:<48}{ours!s:<14}{tensorflow!s:<14}")
    assert ours == tensorflow


heading("Experiments C, D and E: lists of gradients")
print(f"{'':<48}{'JAX':<14}{'TensorFlow':<14}")
ab, w12 = ["a", "b"], ["w1", "w2"]
show("C  gradients(c, [a, b])", sg.gradients(c_fun, ab)(0.0), [3.0, 1.0])
held = sg.gradients(c_fun, ab, stop_gradients=ab)(0.0)
show("C  gradients(c, [a, b], stop_gradients=[a, b])", held, [1.0, 1.0])
show("D  gradients(b, [w1, w2])", sg.gradients(d_fun, w12)(2.0, 2.0), [None, 6.0])
show("E  gradients(e, [a, b])", sg.gradients(e_fun, ab)(1.0, 1.0), [1.0, 1.0])

# %% [markdown]
# ## 3. The same calls on an image classifier
#
# The data are scikit-learn's handwritten digits, 8 by 8 pixels each. The network has
# three convolutions, and a last layer that reads a pooled copy of *each* of them. The
# three feature maps and the class scores (`logits`) get names.

# %%
digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
)
print(f"{len(train_x)} images to train on, {len(test_x)} to test on")


def conv(x, kernel):
    """Convolve, keeping height and width."""
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=dims
    )


def pool(x):
    """Average each square of 2 by 2, then flatten."""
    n, height, width, channels = x.shape
    squares = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return squares.mean((2, 4)).reshape(n, -1)


def network(params, images):
    """Score each image for each of the ten digits."""
    conv1 = sg.name(jax.nn.relu(conv(images, params["conv1"])), "conv1")
    conv2 = sg.name(jax.nn.relu(conv(conv1, params["conv2"])), "conv2")
    features = sg.name(jax.nn.relu(conv(conv2, params["conv3"])), "features")
    pooled = [pool(conv1), pool(conv2), pool(features)]
    return sg.name(jnp.concatenate(pooled, 1) @ params["dense"], "logits")


def classifier_loss(params, images, labels):
    """Mean cross-entropy."""
    scores = network(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean()


def init(key):
    """Draw the weights at random."""
    shapes = {
        "conv1": (3, 3, 1, 8),
        "conv2": (3, 3, 8, 16),
        "conv3": (3, 3, 16, 32),
        "dense": (4 * 4 * (8 + 16 + 32), 10),
    }
    keys = jax.random.split(key, len(shapes))
    draw = jax.nn.initializers.he_normal()
    return {name: draw(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


# %% [markdown]
# ### Gradients of activations, inside the training step
#
# One query asks for the gradients of the weights *and* of the named values. They come
# out of one backward pass, inside `jax.jit`, and `network` did not have to return them.

# %%
layers = ["conv1", "conv2", "features", "logits"]
optimizer = optax.adam(2e-3)


@jax.jit
def train_step(params, state, images, labels):
    """Take one step; return the loss and the gradient norm at each named layer."""
    wanted = {"params": "params", "layers": {layer: layer for layer in layers}}
    query = sg.value_and_gradients(classifier_loss, wanted)
    loss, grads = query(params, images, labels)
    updates, state = optimizer.update(grads["params"], state)
    norms = jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, grads["layers"]))
    return optax.apply_updates(params, updates), state, loss, norms


epochs, batch_size = 20, 64
params = init(jax.random.key(0))
state = optimizer.init(params)
order = np.random.default_rng(0)
history = []
for epoch in range(1, epochs + 1):
    batches = order.permutation(len(train_x))
    batches = batches[: len(batches) // batch_size * batch_size]
    steps = []
    for batch in batches.reshape(-1, batch_size):
        params, state, loss, norms = train_step(
            params, state, train_x[batch], train_y[batch]
        )
        steps.append({"loss": loss, **norms})
    history.append({key: np.mean([s[key] for s in steps]) for key in steps[0]})
    if epoch == 1 or epoch % 5 == 0:
        print(f"epoch {epoch:>2} of {epochs}: training loss {history[-1]['loss']:.3f}")

# %%
predicted = np.argmax(network(params, test_x), axis=1)
accuracy = np.mean(predicted == test_y)
heading("The classifier on the test images")
print(f"accuracy: {accuracy:.1%} of {len(test_x)} images")
assert accuracy > 0.95

# %%
fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
for layer, marker in zip(layers, "os^D", strict=True):
    norms = [row[layer] for row in history]
    ax.plot(range(1, epochs + 1), norms, marker=marker, markersize=4, label=layer)
ax.set_yscale("log")
ax.set_xticks(range(2, epochs + 1, 2))
ax.set_title("How strongly the loss pulls on each named layer")
ax.set_xlabel("Passes over the training images")
ax.set_ylabel("Size of the gradient\n(norm, mean of each pass, log scale)")
ax.grid(alpha=0.3)
ax.legend(title="Named layer")
plt.show()
assert all(history[-1][layer] < history[0][layer] for layer in layers)

# %% [markdown]
# As the network gets more training images right, the loss has less left to pull for:
# at every layer the gradient ends smaller than it began.
#
# ### Where does the network look?
#
# The gradient of *one class score* by the feature map says which features raise that
# score, and where. Multiplied by the features themselves and summed over channels it
# becomes a heat map. (Grad-CAM does the same, with the gradient averaged over the image
# first.) `sg.capture` reads the feature map and `sg.gradients` its gradient, both by
# the name `"features"`.


# %%
def class_scores(params, images, labels):
    """Add up the score of each image for its own label."""
    return jnp.take_along_axis(network(params, images), labels[:, None], 1).sum()


@jax.jit
def heat_maps(params, images, labels):
    """Show where the feature map raises the score: one map for each image."""
    _, values = sg.capture(class_scores, "features")(params, images, labels)
    slope = sg.gradients(class_scores, "features")(params, images, labels)
    heat = jax.nn.relu((values["features"] * slope).sum(-1))
    return heat / heat.max((1, 2), keepdims=True)


chosen = np.array([np.flatnonzero(test_y == digit)[0] for digit in range(10)])
heat = heat_maps(params, test_x[chosen], predicted[chosen])

fig, axes = plt.subplots(2, 10, figsize=(12, 3.6), layout="constrained")
for column, k in enumerate(chosen):
    top, bottom = axes[:, column]
    top.imshow(test_x[k, ..., 0], cmap="gray_r")
    top.set_title(f"is {test_y[k]},\nread as {predicted[k]}", fontsize=11)
    shown = bottom.imshow(heat[column], cmap="magma", vmin=0, vmax=1)
    for ax in (top, bottom):
        ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("Image", fontsize=11)
axes[1, 0].set_ylabel("Heat map", fontsize=11)
fig.suptitle("Test images, and where the feature map raises the score of the answer")
fig.supxlabel("Left to right and top to bottom: the 8 by 8 pixels of the image")
bar = fig.colorbar(shown, ax=axes[1, :], pad=0.01, ticks=[0, 0.5, 1])
bar.set_label("Part of the\nstrongest spot", labelpad=10)
plt.show()

# %% [markdown]
# ### Total and partial derivatives
#
# `conv1` acts on the loss in two ways: *directly*, because the last layer reads it, and
# *through* `conv2` and `features`, which are computed from it.
#
# - The **total** derivative counts all paths. It is what `sg.gradients` gives.
# - The **partial** derivative counts the direct path only, as if the other named
#   layers did not move. Holding every layer that we ask for constant,
#   `stop_gradients=xs`, gives it.
#
# This is experiment C again, on a trained network.

# %%
maps = ["conv1", "conv2", "features"]


def norms_at(xs, **options):
    """Norms of the gradients of the test loss; None stays None."""
    grads = sg.gradients(classifier_loss, xs, **options)(params, test_x, test_y)
    return [None if g is None else float(jnp.linalg.norm(g.ravel())) for g in grads]


total = norms_at(maps)
partial = norms_at(maps, stop_gradients=maps)
behind = norms_at(maps, stop_gradients="logits")

heading("Size of the gradient of the test loss at each layer")
print(f"{'layer':<10}{'total':>10}{'partial':>10}{'logits held':>14}")
for layer, t, p, none in zip(maps, total, partial, behind, strict=True):
    print(f"{layer:<10}{t:>10.5f}{p:>10.5f}{none!s:>14}")
np.testing.assert_allclose(total[-1], partial[-1], rtol=1e-5)
assert behind == [None, None, None]

# %%
fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
places = np.arange(len(maps))
bars = {"total: along all paths": total, "partial: the direct path only": partial}
for shift, (label, sizes) in zip((-0.2, 0.2), bars.items(), strict=True):
    drawn = ax.bar(places + shift, sizes, 0.38, label=label)
    ax.bar_label(drawn, fmt="%.4f", padding=2)
ax.set_xticks(places, maps)
ax.margins(y=0.15)
ax.set_title("Total and partial derivatives on the trained network")
ax.set_xlabel("Named layer, from the image to the scores")
ax.set_ylabel("Size of the gradient of the test loss (norm)")
ax.legend()
plt.show()

# %% [markdown]
# At `features` the bars are equal: neither of the other two layers is computed from it,
# so the direct path is its only one. At `conv1` and `conv2` the total also counts what
# flows through the layers that follow. And with `logits` held constant every path is
# cut, so the answer is `None`, as in experiment D.
