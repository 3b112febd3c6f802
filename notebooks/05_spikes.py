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
# # Spikes: learning through a step that has no derivative
#
# A spiking neuron adds up what it is given. When its *potential* passes a threshold it
# sends out a 1, a *spike*, and otherwise a 0. So the value that goes forward is a step
# of the potential, and the derivative of a step is 0 wherever there is one: nothing is
# learned through it.
#
# The way out is a *surrogate*: the step goes forward, and the derivative of some
# smoother function comes back. In this notebook we
#
# 1. look at surrogates,
# 2. train a small spiking network to read digits, with several of them,
# 3. measure what they do to the gradient on its way back through time,
# 4. cut that way short, as is done for long sequences (`truncated_scan`).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits

import stopgrad_jax as sg

surrogate = sg.surrogate


def heading(text):
    """Print a heading line above a table."""
    print(f"{text}\n{'-' * len(text)}")


# %% [markdown]
# ## 1. One step, many derivatives
#
# `sg.surrogate.spike(x, derivative)` is 1 where `x` is positive and 0 where it is
# negative. `derivative` is any function of `x`. There are factories for the well-known
# ones, and your own will do as well: the last one below is the true derivative of a
# step, 0.

# %%
derivatives = {
    "sigmoid(4)": surrogate.sigmoid(4.0),
    "sigmoid(25)": surrogate.sigmoid(25.0),
    "fast_sigmoid(25)": surrogate.fast_sigmoid(25.0),
    "triangle()": surrogate.triangle(),
    "identity()": surrogate.identity(),
    "jnp.zeros_like": jnp.zeros_like,
}
colors = dict(zip(derivatives, plt.cm.tab10.colors, strict=False))
x = jnp.linspace(-1.5, 1.5, 601)
slopes = {}
for name, derivative in derivatives.items():
    value, back = jax.vjp(lambda x, d=derivative: surrogate.spike(x, d), x)
    slopes[name] = back(jnp.ones_like(x))[0]
    np.testing.assert_array_equal(value, x >= 0)  # 1 at 0: the default, at_zero=1
    np.testing.assert_allclose(slopes[name], derivative(x), rtol=1e-6)

# %%
fig, axes = plt.subplots(1, 7, figsize=(14, 2.9), layout="constrained", sharex=True)
axes[0].plot(x, surrogate.spike(x, jnp.zeros_like), color="black", linewidth=2)
axes[0].set(title="forward, for all", ylim=(-0.1, 1.1))
for ax, (name, slope) in zip(axes[1:], slopes.items(), strict=True):
    ax.plot(x, slope, color=colors[name], linewidth=2)
    ax.fill_between(x, 0, slope, color=colors[name], alpha=0.2)
    ax.set(title=name, ylim=(-0.1, 7 if name == "sigmoid(25)" else 1.2))
for ax in axes:
    ax.title.set_size(10)
    ax.grid(alpha=0.3)
axes[3].set_xlabel("Potential above the threshold")
axes[0].set_ylabel("Spike")
axes[1].set_ylabel("Derivative")
fig.suptitle("What goes forward, and what the gradient is multiplied by (mind the 7)")
plt.show()

# %% [markdown]
# ## 2. A spiking network reads digits
#
# The images have 8 rows and 8 columns. The network is not shown an image at once: it
# gets the first row and the first column, then the second ones, and so on, two time
# steps for each. It answers after the last. So it has to remember, and whatever its
# early spikes should have been must be learned back through time.
#
# At each step the potential of a neuron decays a little, gains what comes in (from the
# image, and from last step's spikes of the others) and loses 1 if the neuron fires. The
# neurons decay at different speeds. The answer adds up the spikes, each with a weight.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = jnp.array(digits.images[order] / 16, jnp.float32)
labels = jnp.array(digits.target[order])
train_count = 1300
test_images, test_labels = images[train_count:], labels[train_count:]

steps, neurons = 16, 64
decay = jnp.linspace(0.6, 0.98, neurons)


def init(key):
    """Draw the weights."""
    shapes = {"in": (16, neurons), "rec": (neurons, neurons), "out": (neurons, 10)}
    sizes = {"in": 0.5, "rec": 0.3 / neurons**0.5, "out": 1 / neurons**0.5}
    keys = jax.random.split(key, len(shapes))
    params = {
        name: sizes[name] * jax.random.normal(key, shapes[name])
        for name, key in zip(shapes, keys, strict=True)
    }
    return {**params, "bias": jnp.zeros(neurons)}


def in_time(images):
    """Turn images into what is shown at each step: a row and a column, twice."""
    rows, columns = images.transpose(1, 0, 2), images.transpose(2, 0, 1)
    return jnp.repeat(jnp.concatenate([rows, columns], axis=2), 2, axis=0)


def read(params, images, derivative, every=steps):
    """Return a score for each of ten digits, and all spikes."""

    def step(carry, shown):
        potential, spikes = carry
        gained = shown @ params["in"] + spikes @ params["rec"] + params["bias"]
        potential = sg.name(decay * potential + gained, "potential")
        spikes = surrogate.spike(potential - 1, derivative)
        return (potential - spikes, spikes), spikes

    silent = jnp.zeros((len(images), neurons))
    shown = in_time(images)
    _, spikes = sg.recurrent.truncated_scan(step, (silent, silent), shown, every=every)
    return spikes.sum(axis=0) @ params["out"] / 4, spikes


def loss(params, images, labels, derivative, every=steps):
    """Mean cross-entropy after the last step."""
    scores, _ = read(params, images, derivative, every)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


# %% [markdown]
# We train it with each of the derivatives, from the same three seeds, all three at once
# by `vmap`. Nothing but the derivative differs.

# %%
training_steps, batch = 300, 64
seeds = (0, 1, 2)
keys = jnp.stack([jax.random.key(seed) for seed in seeds])


def start(key):
    """Draw the first weights of a seed, and the images of all its batches."""
    first, rest = jax.random.split(key)
    chosen = jax.random.randint(rest, (training_steps, batch), 0, train_count)
    return init(first), chosen


starts = jax.lax.map(start, keys)


def train(derivative, every=steps):
    """Train; return test accuracy and the part of neurons that fire, by seed."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, training_steps))

    def step(carry, chosen):
        params, state = carry
        data = images[chosen], labels[chosen]
        grads = jax.grad(loss)(params, *data, derivative, every)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def run(params, chosen):
        carry = params, optimizer.init(params)
        (params, _), _ = jax.lax.scan(step, carry, chosen)
        scores, spikes = read(params, test_images, derivative)
        right = jnp.argmax(scores, axis=1) == test_labels
        return right.mean(), spikes.mean()

    accuracy, firing = jax.jit(jax.vmap(run))(*starts)
    return np.asarray(accuracy), np.asarray(firing)


results = {name: train(derivative) for name, derivative in derivatives.items()}

# %%
heading(f"Accuracy on {len(test_labels)} test images, seeds {seeds}")
print(f"{'derivative':<20}{'mean':>8}", end="")
print("".join(f"{f'seed {seed}':>10}" for seed in seeds), f"{'neurons firing':>17}")
for name, (accuracy, firing) in results.items():
    cells = "".join(f"{a:>10.1%}" for a in accuracy)
    print(f"{name:<20}{accuracy.mean():>8.1%}{cells} {firing.mean():>17.0%}")
mean = {name: accuracy.mean() for name, (accuracy, _) in results.items()}
assert mean["sigmoid(4)"] > 0.95
assert results["sigmoid(4)"][0].min() > 0.95
assert mean["sigmoid(4)"] > mean["jnp.zeros_like"] + 0.05
assert mean["sigmoid(4)"] > mean["identity()"] + 0.2

# %% [markdown]
# Nothing but the derivative differs, and it decides. With a derivative of 0 only the
# weights of the answer learn, from spikes that never change: that is the mark to beat.
# A surrogate of the right width beats it by far. A narrow one of great height
# (`sigmoid(25)`) hardly does, and the identity, which lets everything pass at every
# step, ends far below: a wrong gradient can be worse than none.
#
# ## 3. The gradient on its way back
#
# Why? We look at the gradient of the loss by the potentials, which `sg.name` has named,
# at each of the steps. `sg.gradients` gives all of them at once: one axis for time, one
# for images, one for neurons. The network is the untrained one of the first seed.

# %%
sample = images[:200], labels[:200]
untrained = init(jax.random.split(keys[0])[0])


def size_in_time(derivative, every=steps):
    """Measure the gradient by the potentials, step by step."""
    of_potential = sg.gradients(loss, "potential")
    grads = jax.jit(lambda p: of_potential(p, *sample, derivative, every))(untrained)
    assert grads.shape == (steps, 200, neurons)
    return np.asarray(jnp.linalg.norm(grads.reshape(steps, -1), axis=1))


sizes = {name: size_in_time(derivative) for name, derivative in derivatives.items()}
heading("Size of the gradient by the potentials, untrained network")
print(f"{'derivative':<20}{'last step':>12}{'first step':>12}{'first / last':>14}")
for name, size in sizes.items():
    growth = f"{size[0] / size[-1]:.3g}" if size[-1] else "-"
    print(f"{name:<20}{size[-1]:>12.2g}{size[0]:>12.2g}{growth:>14}")
assert np.all(sizes["jnp.zeros_like"] == 0)
growths = {name: size[0] / max(size[-1], 1e-9) for name, size in sizes.items()}
assert growths.pop("sigmoid(25)") > 50
assert max(growths.values()) < 3

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
numbers = np.arange(1, steps + 1)
for name in list(derivatives)[:-1]:  # 0 has no place on a log scale
    look = "D-" if name == "sigmoid(4)" else "o-"  # triangle() lies upon it
    size = 10 if name == "sigmoid(4)" else 5
    axes[0].plot(numbers, sizes[name], look, ms=size, color=colors[name], label=name)
axes[0].set(yscale="log", xlabel="Step (the gradient comes from the right)")
axes[0].set(ylabel="Norm of the gradient", title="Gradient through time, untrained")
axes[0].legend()
axes[0].grid(alpha=0.3)
for row, name in enumerate(reversed(derivatives)):
    accuracy = results[name][0]
    axes[1].barh(row, accuracy.mean(), color=colors[name], alpha=0.5)
    axes[1].plot(accuracy, [row] * len(seeds), "o", color=colors[name])
axes[1].set_yticks(range(len(derivatives)), list(reversed(derivatives)))
axes[1].axvline(0.1, color="0.5", linestyle="--", label="guessing")
axes[1].set(xlim=(0, 1), xlabel="Test accuracy", title="After training (dots: seeds)")
axes[1].xaxis.set_major_formatter(PercentFormatter(1))
axes[1].legend(loc="lower right", bbox_to_anchor=(1, 0.18))
plt.show()

# %% [markdown]
# A neuron that fires is reset: what it keeps is `potential - spike`. So on the way back
# each step multiplies the gradient by the decay and by `1 - derivative`, and that
# explains two of the curves:
#
# - `sigmoid(25)` is 6.25 at its highest, which makes a factor of -5.25. Some neurons
#   are near their threshold at some steps, and the gradient grows a hundredfold.
# - `identity()` makes a factor of 0. Nothing comes back through the potential, which is
#   the memory of the neuron, for any neuron and any step.
#
# The others stay between, and their gradients keep about their size.
#
# ## 4. Cutting the way short
#
# For long sequences one does not go all the way back. `sg.recurrent.truncated_scan` is
# `jax.lax.scan` forward, bit for bit, with a stop at the carry every so many steps. The
# weights still learn from every step; only what a step does to those after a stop is
# no longer seen. (That is why `read` adds up the spikes outside of the loop: a sum in
# the carry would be stopped with it.)

# %%
derivative = derivatives["sigmoid(4)"]
lengths = (1, 4, 16)
whole, _ = read(untrained, sample[0], derivative)
cut_sizes, cut_results = {}, {}
for every in lengths:
    same, _ = read(untrained, sample[0], derivative, every)
    assert np.asarray(same).tobytes() == np.asarray(whole).tobytes()
    cut_sizes[every] = size_in_time(derivative, every)
    known = every == steps
    cut_results[every] = results["sigmoid(4)"] if known else train(derivative, every)
np.testing.assert_array_equal(cut_sizes[16], sizes["sigmoid(4)"])

heading(f"sigmoid(4), the carry stopped every so many of {steps} steps")
print(f"{'every':<20}{'mean':>8}", end="")
print("".join(f"{f'seed {seed}':>10}" for seed in seeds))
for every, (accuracy, _) in cut_results.items():
    cells = "".join(f"{a:>10.1%}" for a in accuracy)
    print(f"{every:<20}{accuracy.mean():>8.1%}{cells}")
assert cut_results[16][0].mean() > cut_results[1][0].mean() > mean["jnp.zeros_like"]

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
shades = plt.cm.viridis(np.linspace(0, 0.85, len(lengths)))
for every, shade in zip(lengths, shades, strict=True):
    label = f"every {every}" if every < steps else f"{steps}: no stop"
    axes[0].plot(numbers, cut_sizes[every], "o-", color=shade, label=label)
axes[0].set(ylim=(0, 0.0135), xlabel="Step (the gradient comes from the right)")
axes[0].set(ylabel="Norm of the gradient", title="Gradient through time, untrained")
axes[0].legend(loc="lower left", ncols=3)
axes[0].grid(alpha=0.3)
for place, (every, shade) in enumerate(zip(lengths, shades, strict=True)):
    accuracy = cut_results[every][0]
    axes[1].plot([place] * len(seeds), accuracy, "o", color=shade, markersize=8)
    axes[1].plot(place, accuracy.mean(), "_", color=shade, ms=60, markeredgewidth=3)
still = mean["jnp.zeros_like"]
axes[1].axhline(still, color="0.5", linestyle="--", label="derivative 0")
axes[1].set_xticks(range(len(lengths)), [str(every) for every in lengths])
axes[1].set(ylim=(0.85, 1), xlabel="Steps from one stop to the next")
axes[1].set(ylabel="Test accuracy", title="After training (dots: seeds, bar: mean)")
axes[1].set(xlim=(-0.5, len(lengths) - 0.5))
axes[1].grid(alpha=0.3)
axes[1].yaxis.set_major_formatter(PercentFormatter(1))
axes[1].legend(loc="upper left")
plt.show()

# %% [markdown]
# Here the price is small: with a stop at every step each step still learns from what
# its own spikes add to the answer, and that alone is far above the mark. What it loses
# is what the way back adds: it learns nothing of what a step does to later ones.
