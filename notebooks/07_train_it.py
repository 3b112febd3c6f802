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
# # Train it: freezing, thawing, teachers, statistics, many devices
#
# `sg.train.make_step(loss, optimizer)` is the training step that one writes by hand,
# with nothing added: it differentiates only what trains, and the frozen leaves are
# handed on as the same arrays. `sg.train.fit` runs it, whole chunks of steps as one
# `lax.scan`.
#
# We train a small convolutional network on scikit-learn's digits (8 by 8 pixels),
# freeze and thaw it, give it a teacher, look at its gradients layer by layer, cut its
# batches into pieces, and run the same step on eight devices.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # for the last but one section

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import stopgrad_jax as sg

digits = load_digits()
order = np.random.RandomState(0).permutation(len(digits.target))
IMAGES = jnp.asarray(digits.images[order, ..., None] / 16.0, jnp.float32)
LABELS = jnp.asarray(digits.target[order])
TRAIN, TEST = slice(0, 1400), slice(1400, None)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def init(key, channels=(1, 8, 16)):
    """Return the weights of two convolutions and a linear head."""
    a, b, c = jax.random.split(key, 3)
    one, two, three = channels
    normal = jax.random.normal
    return {
        "conv1": normal(a, (3, 3, one, two)) * (2 / (9 * one)) ** 0.5,
        "conv2": normal(b, (3, 3, two, three)) * (2 / (9 * two)) ** 0.5,
        "head": normal(c, (16 * three, 10)) * (1 / (16 * three)) ** 0.5,
    }


def convolve(x, kernel, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=layout
    )


def network(params, x):
    x = sg.name(jax.nn.relu(convolve(x, params["conv1"])), "layer1")
    x = sg.name(jax.nn.relu(convolve(x, params["conv2"], 2)), "layer2")
    return x.reshape(len(x), -1) @ params["head"]


def loss(params, batch):
    x, labels = batch
    logits = network(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def drawn(number, size=64, limit=1400):
    """Return the batch of a step: `fit` takes a function of the step number."""
    key = jax.random.fold_in(jax.random.key(1), number)
    index = jax.random.randint(key, (size,), 0, limit)
    return IMAGES[index], LABELS[index]


@jax.jit
def accuracy(params):
    return jnp.mean(network(params, IMAGES[TEST]).argmax(-1) == LABELS[TEST])


# %% [markdown]
# ## 1. Three lines

# %%
step = sg.train.make_step(loss, optax.adamw(3e-3))
state = step.init(init(jax.random.key(0)))
state, history = sg.train.fit(step, state, drawn, steps=300, progress=False)
print(f"loss {history['loss'][0]:.2f} -> {history['loss'][-20:].mean():.3f}")
print(f"test accuracy {accuracy(state.params):.1%}")

# %% [markdown]
# ## 2. Freeze, and thaw
#
# A convolution that was not trained at all is a set of random filters. Freeze it, and
# train the rest: its gradient is not computed, it has no state in the optimizer, and
# adamw's decay does not touch it. After 150 steps we thaw it: `migrate` keeps the
# moments of what trained already, and begins afresh for the rest.

# %%
start = init(jax.random.key(0))
frozen = sg.train.make_step(loss, optax.adamw(3e-3), frozen="conv*")
thawed = sg.train.make_step(loss, optax.adamw(3e-3))


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


state = frozen.init(start)
print(f"optimizer state: {size(state.opt_state)} bytes with the convolutions frozen,")
print(f"                 {size(thawed.init(start).opt_state)} with none")

state, before = sg.train.fit(frozen, state, drawn, steps=150, progress=False)
same = all(np.array_equal(state.params[k], start[k]) for k in ("conv1", "conv2"))
print(f"frozen bit for bit: {same}, test accuracy {accuracy(state.params):.1%}")

state = thawed.migrate(state, frozen)
state, after = sg.train.fit(thawed, state, drawn, steps=150, progress=False)
moved = float(jnp.abs(state.params["conv1"] - start["conv1"]).max())
print(f"thawed: conv1 moved by up to {moved:.3f}, test {accuracy(state.params):.1%}")


# %%
def smooth(curve, width=10):
    return np.convolve(curve, np.ones(width) / width, "valid")


figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
whole = np.concatenate([before["loss"], after["loss"]])
axis.plot(smooth(history["loss"]), color=ORANGE, label="all train from the start")
axis.plot(smooth(whole), color=BLUE, label="convolutions frozen, then thawed")
axis.axvline(150, color="gray", linestyle=":")
axis.text(153, 0.9, "thaw", color="gray", va="top")
axis.set(xlabel="step", ylabel="loss, mean of 10 steps", yscale="log")
axis.set_title("Random filters get far; thawed, the loss goes on falling")
axis.legend(frameon=False, loc="lower left")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 3. A teacher
#
# A teacher is a running average of its student. It lives in the parameters, frozen, and
# a function around the step moves it: `fit` takes any function of (state, batch). Here
# three labels in ten are wrong. The student runs after each of them; the average of its
# last hundred steps or so does not.


# %%
NOISE = jax.random.bernoulli(jax.random.key(2), 0.3, LABELS.shape)
GUESSED = jax.random.randint(jax.random.key(3), LABELS.shape, 0, 10)
NOISY = jnp.where(NOISE, GUESSED, LABELS)


def noisy(number):
    key = jax.random.fold_in(jax.random.key(4), number)
    index = jax.random.randint(key, (32,), 0, 1400)
    return IMAGES[index], NOISY[index]


def student_loss(params, batch):
    return loss(params["student"], batch)


taught = sg.train.make_step(student_loss, optax.adam(1e-2), frozen="teacher")


def taught_step(state, batch):
    state, metrics = taught(state, batch)
    student, teacher = state.params["student"], state.params["teacher"]
    teacher = optax.incremental_update(student, teacher, step_size=0.01)
    return state.replace(params={"student": student, "teacher": teacher}), metrics


rows = []
for seed in range(3):
    params = init(jax.random.key(seed))
    state = taught.init({"student": params, "teacher": params})
    state, _ = sg.train.fit(taught_step, state, noisy, steps=400, progress=False)
    rows.append([float(accuracy(state.params[k])) for k in ("student", "teacher")])
print("test accuracy with noisy labels, mean of three seeds (lowest, highest)")
for name, found in zip(["student", "teacher"], np.array(rows).T, strict=True):
    print(f"  {name:8} {found.mean():.1%}   ({found.min():.1%}, {found.max():.1%})")

# %% [markdown]
# No gradient goes to the teacher, and that is a fact that can be tested:

# %%
params = {"student": init(jax.random.key(0)), "teacher": init(jax.random.key(0))}
sg.assert_no_gradient(student_loss, "params/teacher")(params, noisy(0))
sg.assert_gradient(student_loss, "params/student")(params, noisy(0))

# %% [markdown]
# ## 4. Gradients, layer by layer
#
# `stats=` puts the norms of gradients at any address among the metrics, out of the same
# backward pass. Here is a deep network of 12 layers, in two initializations: with the
# variance that relu needs, and with half the standard deviation.


# %%
def deep(params, batch):
    x, labels = batch
    x = x.reshape(len(x), -1)
    for w in params["layers"]:
        x = jax.nn.relu(x @ w)
    logits = x @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def deep_init(scale):
    keys = jax.random.split(jax.random.key(0), 13)
    gain = scale * (2 / 64) ** 0.5
    layers = [gain * jax.random.normal(k, (64, 64)) for k in keys[:-1]]
    return {"layers": layers, "head": jax.random.normal(keys[-1], (64, 10)) / 8}


watched = sg.train.make_step(deep, optax.sgd(0.05), stats="params/layers")
norms = {}
for title, scale in {"variance 2 / n": 1.0, "half as wide": 0.5}.items():
    state = watched.init(deep_init(scale))
    state, history = sg.train.fit(watched, state, drawn, steps=200, progress=False)
    stats = history["stats"]
    norms[title] = np.stack([stats[f"params/layers/{k}"].norm for k in range(12)])
    print(f"{title:15} loss {history['loss'][0]:.2f} -> {history['loss'][-1]:.2f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for axis, (title, norm) in zip(axes, norms.items(), strict=True):
    logs = np.log10(np.maximum(norm, 1e-5))
    image = axis.imshow(logs, aspect="auto", vmin=-5, vmax=0.5, cmap="viridis")
    axis.set(title=title, xlabel="step")
axes[0].set_ylabel("layer, from the input on")
figure.colorbar(image, ax=axes, label="log10 of the gradient's norm")
figure.suptitle("A narrow initialization has no gradient to train with")
plt.show()

# %% [markdown]
# The statistics also say why a gradient is zero, if the program itself makes it so:


# %%
def cut(params, batch):
    return deep(sg.stop_gradient(params, "layers"), batch)


found = sg.gradient_stats(cut, ["params/layers/0", "params/head"])
for address, s in found(deep_init(1.0), drawn(0)).items():
    print(f"{address:16} norm {s.norm:.2f}   {(s.cause or '').split(' (')[0]}")

# %% [markdown]
# ## 5. Large batches in pieces
#
# `accumulate=4` takes a batch in four micro-batches, one after the other, and averages
# their gradients: a quarter of the memory, the same step to rounding. A gate that is
# not linear sees the gradient of its micro-batch: four small clips are not one.

# %%
whole = sg.train.make_step(loss, optax.sgd(0.1))
pieces = sg.train.make_step(loss, optax.sgd(0.1), accumulate=4)


def clipped(params, batch):
    return loss(sg.clip_gradient_norm(params, 0.5), batch)


def difference(one, other):
    a, b = (s(s.init(start), drawn(0))[0].params for s in (one, other))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


print(f"a batch against its four quarters:    {difference(whole, pieces):.1e}")
makes = (
    sg.train.make_step(clipped, optax.sgd(0.1)),
    sg.train.make_step(clipped, optax.sgd(0.1), accumulate=4),
)
print(f"with a norm clipped at the weights:   {difference(*makes):.1e}")

# %% [markdown]
# ## 6. Eight devices
#
# The same step runs wherever its arrays lie. *Data parallel*: every device has all
# parameters and an eighth of the batch. *Sharded*: the convolutions and their optimizer
# state are spread as well, some channels on each device. Nothing in the step changes,
# and every array stays where it was put.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def on(*spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


layouts = {
    "data parallel": {k: on() for k in start},
    "sharded": {
        "conv1": on(None, None, None, "data"),
        "conv2": on(None, None, None, "data"),
        "head": on(),
    },
}
batches = [jax.tree.map(np.asarray, drawn(n)) for n in range(20)]


def losses(params, place):
    state, found = step.init(params), []
    for batch in batches:
        state, metrics = step(state, jax.device_put(batch, place))
        found.append(float(metrics["loss"]))
    return np.array(found), state


alone, _ = losses(start, jax.devices()[0])
for name, layout in layouts.items():
    found, state = losses(jax.device_put(start, layout), on("data"))
    kernel = state.params["conv2"].sharding.shard_shape((3, 3, 8, 16))
    error = np.abs(found - alone).max()
    print(f"{name}: conv2 on each device {kernel}, loss differs by {error:.0e}")

# %% [markdown]
# Inside `jax.shard_map` it is the same step once more, with a `jax.lax.pmean` of the
# loss (`docs/api/train.md`).
#
# ## 7. State that has no gradient: twelve lines by hand
#
# BatchNorm's running mean is no parameter: nothing differentiates by it, and freezing
# does not hold it. For such a model one writes the step by hand. `fit` runs it as well.


# %%
def normalized(params, mean, batch):
    x, labels = batch
    hidden = convolve(x, params["conv1"])
    own = hidden.mean((0, 1, 2))  # in training: the batch's own mean, per channel
    mean = 0.9 * mean + 0.1 * jax.lax.stop_gradient(own)
    hidden = jax.nn.relu(hidden - own)
    hidden = jax.nn.relu(convolve(hidden, params["conv2"], 2))
    logits = hidden.reshape(len(x), -1) @ params["head"]
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, mean


optimizer = optax.adamw(3e-3)


def step_by_hand(state, batch):
    params, opt_state, mean = state
    differentiate = jax.value_and_grad(normalized, has_aux=True)
    (value, mean), gradients = differentiate(params, mean, batch)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, mean), {"loss": value}


state = (start, optimizer.init(start), jnp.zeros(8))
state, history = sg.train.fit(step_by_hand, state, drawn, steps=100, progress=False)
print(f"loss {history['loss'][0]:.2f} -> {history['loss'][-10:].mean():.2f}")
now = convolve(IMAGES[TRAIN], state[0]["conv1"]).mean((0, 1, 2))
far = float(jnp.abs(state[2] - now).max() / jnp.abs(now).max())
print(f"the running means are within {far:.0%} of those of all training images")

# %% [markdown]
# ## What to take along
#
# - `make_step` and `fit` are plain functions on a pytree: save the state with pickle or
#   orbax, and go on where it ended. Ctrl-C returns what there is.
# - Frozen means bit for bit, without gradient and without optimizer state. Thaw with
#   `migrate`.
# - Whatever moves beside the gradient (teachers, running means) goes into a function
#   around the step.
# - Look at gradients layer by layer before you change the learning rate.
