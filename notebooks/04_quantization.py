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
# # Quantization: coarse values, useful gradients
#
# A quantizer is a staircase. Its derivative is 0 on every step, so nothing in front of
# it would ever learn. The way out is to have *two values*: forward the staircase,
# exactly; backward the derivative of something smooth. `sg.quantize` has the quantizers
# that are in use, each with the backward pass that its paper gives it.
#
# 1. The staircases and their gradients, drawn.
# 2. Networks with weights and activations of 8, 4, 2 bits and of 1, on real digits.
# 3. A VQ-VAE: vectors quantized to a codebook, straight through and by rotation.

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
# ## 1. Staircases
#
# For each quantizer the upper picture shows the value that goes forward, and the lower
# one the gradient that comes back for a gradient of 1. The dashed line is the input.

# %%
x = jnp.linspace(-3, 3, 1201)
blue, orange = "tab:blue", "tab:orange"
quantizers = {
    "round(x)": sg.quantize.round,
    "clip(x, -1, 1)": lambda x: sg.quantize.clip(x, -1.0, 1.0),
    "fake_quant(x, -2, 2, 2 bits)": lambda x: sg.quantize.fake_quant(x, -2.0, 2.0, 2),
    "lsq(x, 0.5, -4, 3)": lambda x: sg.quantize.lsq(x, 0.5, -4, 3, num_elements=1),
    "fsq(x, 5 levels)": lambda x: sg.quantize.fsq(x[:, None], [5])[:, 0],
}
fig, axes = plt.subplots(2, 5, figsize=(14, 5.6), layout="constrained", sharex=True)
slopes = {}
for (upper, lower), (call, quantizer) in zip(axes.T, quantizers.items(), strict=True):
    value, back = jax.vjp(quantizer, x)
    slopes[call] = np.asarray(back(jnp.ones_like(x))[0])
    upper.plot(x, x, color="0.6", linestyle="--")
    upper.plot(x, value, color=blue, linewidth=2)
    lower.plot(x, slopes[call], color=orange, linewidth=2)
    upper.set(title=call, ylim=(-3.1, 3.1))
    lower.set(xlabel="x", ylim=(-0.1, 1.2), xlim=(-3, 3), xticks=range(-3, 4))
    for ax in (upper, lower):
        ax.grid(alpha=0.3)
        ax.title.set_size(11)
axes[0, 0].set_ylabel("Value forward")
axes[1, 0].set_ylabel("Gradient backward")
plt.show()
assert np.all(slopes["round(x)"] == 1)
assert np.all(slopes["clip(x, -1, 1)"] == 1)
inside = (x > -2) & (x < 1.5)
assert np.all(slopes["lsq(x, 0.5, -4, 3)"] == inside)

# %% [markdown]
# `round` and `clip` let every gradient pass. `fake_quant` and `lsq` let it pass inside
# their range; what falls outside goes to the ends of the range, or to the step, which
# learn by it. `fsq` first bounds its input smoothly, and has the slope of that bound.
# (The four levels of 2 bits from -2 to 2 are nudged so that 0 is one of them.)
#
# ## 2. Networks of few bits
#
# The task: 1,797 pictures of digits, 8 by 8 pixels. The network has one hidden layer of
# 128 and is trained five times, from five seeds, on 1,297 of the pictures; the other
# 500 are to test on. Every seed has its own split.
#
# In the 8-, 4- and 2-bit networks all weights, and the activations of the hidden layer,
# are quantized by `sg.quantize.lsq`, each array with a step that learns. In the binary
# network they are signs: `lfq` of a clipped value, where the clip is `jnp.clip`, so
# that the gradient ends where a value has left [-1, 1]. Signs of weights are scaled by
# one number per layer, the mean size of its weights.

# %%
digits = load_digits()
images = jnp.array(digits.data / 16, jnp.float32)
labels = jnp.array(digits.target)
hidden, steps, batch_size, seeds = 128, 1000, 64, 5


def init(key):
    """Return the weights and, for quantized networks, the steps."""
    key1, key2 = jax.random.split(key)
    w1 = jax.random.normal(key1, (64, hidden)) * np.sqrt(2 / 64)
    w2 = jax.random.normal(key2, (hidden, 10)) * np.sqrt(1 / hidden)
    b1, b2 = jnp.zeros(hidden), jnp.zeros(10)
    log_steps = {"w1": 0.0, "w2": 0.0, "h": 0.0}
    return {"w1": w1, "w2": w2, "b1": b1, "b2": b2, "log_steps": log_steps}


def with_steps(params, bits):
    """Choose the first steps as the paper of lsq says."""
    weights = 2 ** (bits - 1) - 1
    h = jax.nn.relu(images[:256] @ params["w1"])
    first = {
        "w1": sg.quantize.lsq_init(params["w1"], weights),
        "w2": sg.quantize.lsq_init(params["w2"], weights),
        "h": sg.quantize.lsq_init(h, 2**bits - 1),
    }
    return {**params, "log_steps": jax.tree.map(jnp.log, first)}


def float_network(params, x):
    """Score each image for each digit, without quantization."""
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    return h @ params["w2"] + params["b2"]


def lsq_network(bits):
    """Return the network with weights and activations of a few bits."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def network(params, x):
        step = jax.tree.map(jnp.exp, params["log_steps"])
        w1, w2 = params["w1"], params["w2"]
        w1 = sg.quantize.lsq(w1, step["w1"], low, high, num_elements=w1.size)
        w2 = sg.quantize.lsq(w2, step["w2"], low, high, num_elements=w2.size)
        h = jax.nn.relu(x @ w1 + params["b1"])
        h = sg.quantize.lsq(h, step["h"], 0, 2**bits - 1, num_elements=hidden)
        return h @ w2 + params["b2"]

    return network


def signs(x):
    """Take signs; the gradient is that of a clip."""
    return sg.quantize.lfq(jnp.clip(x, -1, 1))


def binary_network(params, x):
    """Score with weights and activations that are signs."""
    w1, w2 = (signs(w) * jnp.mean(jnp.abs(w)) for w in (params["w1"], params["w2"]))
    h = signs(x @ w1 + params["b1"])
    return h @ w2 + params["b2"]


networks = {
    "float": (float_network, None),
    "8 bits": (lsq_network(8), 8),
    "4 bits": (lsq_network(4), 4),
    "2 bits": (lsq_network(2), 2),
    "1 bit": (binary_network, None),
}

# %% [markdown]
# What is a weight worth? Let us see the numbers themselves: the different values among
# the 8,192 weights of the first layer.

# %%
start = init(jax.random.key(0))
heading("Different values of a weight of the first layer")
counts = {}
for name, (_, bits) in networks.items():
    w1 = start["w1"]
    if bits:
        step = jnp.exp(with_steps(start, bits)["log_steps"]["w1"])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        w1 = sg.quantize.lsq(w1, step, low, high, num_elements=w1.size)
    elif name == "1 bit":
        w1 = signs(w1)
    counts[name] = len(np.unique(w1))
    print(f"{name:<8}{counts[name]:>8,}")
assert counts["2 bits"] == 4
assert counts["1 bit"] == 2
assert counts["8 bits"] <= 256


# %%
def start_of(key):
    """Draw first weights, the images of all batches, and those kept for the test."""
    key1, key2, key3 = jax.random.split(key, 3)
    order = jax.random.permutation(key1, len(images))
    test, rest = order[:500], order[500:]
    chosen = jax.random.randint(key3, (steps, batch_size), 0, len(rest))
    return init(key2), rest[chosen], test


starts = jax.lax.map(start_of, jax.random.split(jax.random.key(1), seeds))


def train(network, bits):
    """Train from each seed at once; return the test accuracies."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def loss(params, batch):
        scores = network(params, images[batch])
        ce = optax.softmax_cross_entropy_with_integer_labels
        return ce(scores, labels[batch]).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    def run(params, batches, test):
        params = with_steps(params, bits) if bits else params
        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, batches)
        guesses = jnp.argmax(network(params, images[test]), 1)
        return jnp.mean(guesses == labels[test])

    return jax.jit(jax.vmap(run))(*starts)


accuracies = {name: np.asarray(train(*pair)) for name, pair in networks.items()}
heading(f"Accuracy on 500 test images, {seeds} seeds")
print(f"{'':<10}{'mean':>8}{'worst':>9}{'best':>9}{'below float':>14}")
mean = {name: runs.mean() for name, runs in accuracies.items()}
for name, runs in accuracies.items():
    print(f"{name:<10}{mean[name]:>8.1%}{runs.min():>9.1%}{runs.max():>9.1%}", end="")
    print(f"{100 * (mean['float'] - mean[name]):>z7.1f} points")
assert mean["float"] > 0.96
assert mean["float"] - mean["8 bits"] < 0.01
assert mean["float"] - mean["4 bits"] < 0.01
assert mean["float"] - mean["1 bit"] < 0.03

# %%
fig, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
for place, (name, runs) in enumerate(accuracies.items()):
    color = "0.4" if name == "float" else blue
    ax.plot([place] * seeds, 100 * runs, "o", color=color, alpha=0.5)
    ax.plot([place - 0.2, place + 0.2], [100 * runs.mean()] * 2, color=color, lw=3)
ax.axhline(100 * mean["float"], color="0.6", linestyle="--")
ax.set_xticks(range(len(networks)), list(networks))
ax.set_ylim(90, 100)
ax.set_title("Test accuracy by the bits of weights and activations")
ax.set_xlabel("Bits (a dot is one seed, a line their mean)")
ax.set_ylabel("Test accuracy, %")
ax.grid(alpha=0.3, axis="y")
plt.show()

# %% [markdown]
# With 8 and with 4 bits the network reads as well as in float: what is left between
# them is less than between two seeds. With 2 bits, four values per weight, little is
# lost, and with 1 bit one or two points, in a network that has neither a float weight
# nor a float activation inside.
#
# ## 3. A VQ-VAE
#
# An encoder turns each picture into four vectors of 4 numbers. Each is replaced by the
# nearest of 64 codes, and a decoder paints the picture again from the four codes alone.
# So a picture of 64 pixels becomes four numbers from 0 to 63: 24 bits.
#
# `sg.quantize.vector_quantize` returns the codes, their indices and two losses. The
# first, `codebook_loss`, moves codes to the vectors they stand for; the second,
# `commitment_loss`, keeps vectors near their codes. The gradient of the painting goes
# to the encoder, either straight through, or turned as the vector was turned onto its
# code.

# %%
count, parts, width = 64, 4, 4
vq_steps = 1000


def layers(key, sizes):
    """Return dense layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        (jax.random.normal(k, (m, n)) * np.sqrt(1 / m), jnp.zeros(n))
        for k, m, n in pairs
    ]


def mlp(params, x):
    """Apply dense layers, with gelu between them."""
    for w, b in params[:-1]:
        x = jax.nn.gelu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def encode(params, x):
    """Return four vectors per image."""
    return mlp(params["encoder"], x).reshape(-1, parts, width)


def autoencode(params, x, gradient):
    """Paint images from their codes."""
    codes = sg.quantize.vector_quantize(
        encode(params, x), params["codebook"], gradient=gradient
    )
    painted = mlp(params["decoder"], codes.quantized.reshape(-1, parts * width))
    return painted, codes


def vq_loss(params, x, gradient):
    """Error of the painting, and the two losses of the codes."""
    painted, codes = autoencode(params, x, gradient)
    error = jnp.mean((painted - x) ** 2)
    return error + codes.codebook_loss + 0.25 * codes.commitment_loss


def vq_init(key, x):
    """Return the layers, and a codebook of vectors that the encoder makes at first."""
    key1, key2, key3 = jax.random.split(key, 3)
    params = {
        "encoder": layers(key1, (64, 128, parts * width)),
        "decoder": layers(key2, (parts * width, 128, 64)),
    }
    vectors = encode(params, x).reshape(-1, width)
    return {**params, "codebook": jax.random.choice(key3, vectors, (count,), False)}


# %% [markdown]
# Before training, a contract: each part must learn. It holds for both gradients. It
# would not, had we computed the codebook's loss from `codes.quantized`, where the
# gradient of the codebook is zero: the classic silent bug of VQ-VAEs.

# %%
params = vq_init(jax.random.key(0), images)
for gradient in ("straight_through", "rotation"):
    sg.assert_gradient(vq_loss, "params")(params, images[:8], gradient)


def buggy_loss(params, x):
    """As `vq_loss`, with the loss of the codebook taken too late."""
    painted, codes = autoencode(params, x, "straight_through")
    codebook_loss = jnp.mean(
        (jax.lax.stop_gradient(encode(params, x)) - codes.quantized) ** 2
    )
    return jnp.mean((painted - x) ** 2) + codebook_loss + 0.25 * codes.commitment_loss


try:
    sg.assert_gradient(buggy_loss, "params")(params, images[:8])
except AssertionError as error:
    print(str(error).split(" (")[0])
else:
    raise AssertionError("the bug was not found")


# %%
def vq_start(key):
    """Draw the first parameters, all batches, and the images kept for the test."""
    key1, key2, key3 = jax.random.split(key, 3)
    order = jax.random.permutation(key1, len(images))
    test, rest = order[:500], order[500:]
    chosen = jax.random.randint(key3, (vq_steps, 128), 0, len(rest))
    return vq_init(key2, images[rest]), rest[chosen], test, images[rest].mean(0)


vq_starts = jax.lax.map(vq_start, jax.random.split(jax.random.key(2), seeds))


def vq_train(gradient):
    """Train from each seed at once; return errors, code use, and some images."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, vq_steps))

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(vq_loss)(params, images[batch], gradient)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    def run(params, batches, test, middle):
        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, batches)
        test = images[test]
        painted, codes = autoencode(params, test, gradient)
        used = jnp.zeros(count).at[codes.indices].add(1)
        error = jnp.mean((painted - test) ** 2)
        spread = jnp.mean((test - middle) ** 2)
        return error / spread, used, painted[:10], test[:10]

    out = jax.jit(jax.vmap(run))(*vq_starts)
    return [np.asarray(part) for part in out]


results = {g: vq_train(g) for g in ("straight_through", "rotation")}
heading(f"500 test images, {seeds} seeds: mean (worst seed)")
print(f"{'gradient':<20}{'variance not explained':>24}{'codes used':>22}")
for gradient, (errors, used, _, _) in results.items():
    part = np.mean(used > 0, 1)
    cells = f"{errors.mean():.1%} ({errors.max():.1%})"
    print(f"{gradient:<20}{cells:>24}{f'{part.mean():.0%} ({part.min():.0%})':>22}")
    assert part.min() > 0.8
    assert errors.max() < 0.35

# %%
fig, axes = plt.subplots(3, 10, figsize=(11, 3.9), layout="constrained")
rows = {
    "test images": results["rotation"][3][0],
    "straight through": results["straight_through"][2][0],
    "rotation": results["rotation"][2][0],
}
for row, (name, pictures) in zip(axes, rows.items(), strict=True):
    for ax, picture in zip(row, pictures, strict=True):
        ax.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
fig.suptitle("Ten test images, and each painted from four codes of 64 (24 bits)")
plt.show()

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
for ax, (gradient, (_, used, _, _)) in zip(axes, results.items(), strict=True):
    ax.bar(range(count), -np.sort(-used[0]), color=blue)
    ax.set_title(f"{gradient}: {np.sum(used[0] > 0)} of {count} codes used")
    ax.set_xlabel("Codes, most used first")
    ax.grid(alpha=0.3, axis="y")
axes[0].set_ylabel("Times used by 500 test images")
fig.suptitle("How often each code is used (first seed)")
plt.show()

# %% [markdown]
# Both gradients train the encoder, the codebook and the decoder, and both use most of
# the codes. On this small task straight-through does better than rotation: its pictures
# are closer, and it uses the codes more evenly. The paper of the rotation trick reports
# the opposite for large models, so try both: it is one argument.
#
# Four numbers per vector were chosen after a look at these very results. With eight,
# rotation used only about three quarters of the codes.
