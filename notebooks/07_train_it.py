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
        "head": normal(c, (4, 4, three, 10)) * (1 / (16 * three)) ** 0.5,
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
    return jnp.tensordot(x, params["head"], 3)  # by row, column and channel


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
assert accuracy(state.params) > 0.96

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


def working_memory(step):
    """Return the bytes that a compiled step needs beside what goes in and out."""
    program = step.lower(step.init(start), drawn(0)).compile()
    return program.memory_analysis().temp_size_in_bytes


trained, _ = sg.partition(start, "!conv*")  # a gradient is as large as what trains
cases = {"all train": (thawed, start), "convolutions frozen": (frozen, trained)}
working = {name: working_memory(made) for name, (made, _) in cases.items()}
print("bytes                    gradients   adamw's state   working memory of a step")
for name, (made, leaves) in cases.items():
    moments = size(made.init(start).opt_state)
    print(f"{name:20} {size(leaves):13,} {moments:15,} {working[name]:26,}")
assert working["convolutions frozen"] < working["all train"] / 2

# %%
state = frozen.init(start)
state, before = sg.train.fit(frozen, state, drawn, steps=150, progress=False)
same = all(np.array_equal(state.params[k], start[k]) for k in ("conv1", "conv2"))
print(f"frozen bit for bit: {same}, test accuracy {accuracy(state.params):.1%}")

state = thawed.migrate(state, frozen)
state, after = sg.train.fit(thawed, state, drawn, steps=150, progress=False)
moved = float(jnp.abs(state.params["conv1"] - start["conv1"]).max())
print(f"thawed: conv1 moved by up to {moved:.3f}, test {accuracy(state.params):.1%}")
assert same
assert before["loss"][-20:].mean() > 2 * after["loss"][-20:].mean()


# %%
def draw(axis, losses, width=10, **look):
    """Plot at each step the mean of the last ten: nothing moves before its time."""
    means = np.convolve(losses, np.ones(width) / width, "valid")
    axis.plot(np.arange(width - 1, len(losses)), means, **look)


figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
whole = np.concatenate([before["loss"], after["loss"]])
draw(axis, history["loss"], color=ORANGE, label="all train from the start")
draw(axis, whole, color=BLUE, label="convolutions frozen, then thawed")
axis.axvline(150, color="gray", linestyle=":")
axis.text(147, 0.05, "thaw", color="gray", ha="right")
axis.set(xlabel="step", ylabel="loss, mean of last 10 steps", yscale="log")
axis.set_title("Random filters get far; thawed, the loss goes on falling")
axis.legend(frameon=False, loc="upper right")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## 3. A teacher
#
# A teacher is a running average of its student. It lives in the parameters, frozen, and
# a function around the step moves it: `fit` takes any function of (state, batch). Here
# three labels in ten are drawn again, by chance. The student runs after each of them;
# the average of its last hundred steps or so does not.


# %%
NOISE = jax.random.bernoulli(jax.random.key(2), 0.3, LABELS.shape)
GUESSED = jax.random.randint(jax.random.key(3), LABELS.shape, 0, 10)
NOISY = jnp.where(NOISE, GUESSED, LABELS)  # a guess may be right
print(f"wrong labels in training: {jnp.mean((NOISY != LABELS)[TRAIN]):.1%}")


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
assert all(teacher > student for student, teacher in rows)

# %% [markdown]
# The teacher is the better one for each of the seeds, and no gradient ever reached it.
# That can be tested:

# %%
params = {"student": init(jax.random.key(0)), "teacher": init(jax.random.key(0))}
sg.assert_no_gradient(student_loss, "params/teacher")(params, noisy(0))
sg.assert_gradient(student_loss, "params/student")(params, noisy(0))

# %% [markdown]
# ## 4. Gradients, layer by layer
#
# `stats=` puts the norms of gradients at any address among the metrics, out of the same
# backward pass. Here is a plain network of 12 layers, 64 wide, in four versions: one
# that is well set up, and three that are not.


# %%
def deep(activation):
    def loss(params, batch):
        x, labels = batch
        x = x.reshape(len(x), -1)
        for w in params["layers"]:
            x = activation(x @ w)
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def deep_init(deviation):
    keys = jax.random.split(jax.random.key(0), 13)
    layers = [deviation * jax.random.normal(k, (64, 64)) for k in keys[:-1]]
    return {"layers": layers, "head": jax.random.normal(keys[-1], (64, 10)) / 8}


VERSIONS = {
    "tanh": (jnp.tanh, 1 / 8),
    "tanh, weights x 4": (jnp.tanh, 4 / 8),
    "relu, weights x 1/2": (jax.nn.relu, 0.5 * (2 / 64) ** 0.5),
    "sigmoid": (jax.nn.sigmoid, 1 / 8),
}
norms, ends = {}, {}
print("12 layers              loss, first   last 10    norm at layer 1   at layer 12")
for title, (activation, deviation) in VERSIONS.items():
    watched = sg.train.make_step(
        deep(activation), optax.sgd(0.05), stats="params/layers"
    )
    state = watched.init(deep_init(deviation))
    state, history = sg.train.fit(watched, state, drawn, steps=200, progress=False)
    stats = history["stats"]
    norms[title] = np.stack([stats[f"params/layers/{k}"].norm for k in range(12)])
    first, ends[title] = history["loss"][0], history["loss"][-10:].mean()
    low, high = norms[title][[0, -1], 0]
    print(f"{title:20} {first:13.2f} {ends[title]:9.2f} {low:18.1e} {high:13.1e}")
assert ends["tanh"] < 0.5 < 1 < min(v for k, v in ends.items() if k != "tanh")
assert min(ends["relu, weights x 1/2"], ends["sigmoid"]) > 2.25

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3), layout="constrained", sharey=True)
for axis, (title, norm) in zip(axes, norms.items(), strict=True):
    image = axis.imshow(
        np.log10(norm),
        aspect="auto",
        vmin=-5,
        vmax=1,
        cmap="viridis",
        extent=(0, 200, 12.5, 0.5),
    )
    axis.set(title=title, xlabel="step")
axes[0].set(ylabel="layer (1: at the input)", yticks=[1, 4, 8, 12])
figure.colorbar(image, ax=axes, label="log10 of gradient norm", extend="both")
figure.suptitle("Three ways to go wrong leave three different pictures")
plt.show()

# %% [markdown]
# The gradient comes from layer 12. Well set up, all layers get about the same. Too
# wide, it *grows* on its way to the input, and the loss comes down slowly. With
# sigmoid, whose derivative is at most 1/4, it *vanishes* on the way: the last layers
# have a gradient, the first ones none to speak of. The narrow relu net has small
# gradients *everywhere alike*: what goes forward shrinks from layer to layer just as
# what comes back does, and the gradient of a weight is the product of both. The last
# two do not learn: their loss ends at that of guessing, which is log 10, or 2.30.

# %% [markdown]
# The statistics also say why a gradient is zero, if the program itself makes it so:


# %%
def cut(params, batch):
    return deep(jnp.tanh)(sg.stop_gradient(params, "layers"), batch)


found = sg.gradient_stats(cut, ["params/layers/0", "params/head"])
for address, s in found(deep_init(1 / 8), drawn(0)).items():
    print(f"{address:16} norm {s.norm:.2f}   {(s.cause or '').split(' (')[0]}")

# %% [markdown]
# ## 5. Large batches in pieces
#
# `accumulate=4` takes a batch in four micro-batches, one after the other, and averages
# their gradients: the memory of one of them, the same step to rounding. A gate that is
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


for name, made in {"one batch of 64": whole, "four of 16": pieces}.items():
    print(f"working memory, {name:16} {working_memory(made):9,} bytes")
print("largest difference of a weight after one step:")
print(f"  a batch against its four quarters   {difference(whole, pieces):.1e}")
makes = (
    sg.train.make_step(clipped, optax.sgd(0.1)),
    sg.train.make_step(clipped, optax.sgd(0.1), accumulate=4),
)
print(f"  with a norm clipped at the weights  {difference(*makes):.1e}")
assert difference(whole, pieces) < 1e-6 < 1e-4 < difference(*makes)

# %% [markdown]
# ## 6. Eight devices
#
# The same step runs wherever its arrays lie. *Data parallel*: every device has all
# parameters and an eighth of the batch. *Sharded* (as in FSDP): each device has an
# eighth of every parameter as well, and of its optimizer state. Nothing in the step
# changes, and every array stays where it was put.

# %%
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def on(*spec):
    return NamedSharding(mesh, PartitionSpec(*spec))


layouts = {
    "data parallel": {k: on() for k in start},
    "sharded": {
        "conv1": on(None, None, None, "data"),
        "conv2": on(None, None, None, "data"),
        "head": on(None, None, "data"),
    },
}
batches = [jax.tree.map(np.asarray, drawn(n)) for n in range(20)]


def losses(params, place):
    state, found = step.init(params), []
    for batch in batches:
        state, metrics = step(state, jax.device_put(batch, place))
        found.append(float(metrics["loss"]))
    return np.array(found), state


def on_each(state):
    """Return how many bytes of a state one device holds."""
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves)


alone, state = losses(start, jax.devices()[0])
print("20 steps         bytes of state per device   largest difference of a loss")
print(f"{'one device':14} {on_each(state):27,}")
for name, layout in layouts.items():
    found, state = losses(jax.device_put(start, layout), on("data"))
    error = np.abs(found - alone).max()
    print(f"{name:14} {on_each(state):27,} {error:30.0e}")
    assert error < 1e-5
    assert state.params["conv2"].sharding.is_equivalent_to(layout["conv2"], 4)

# %% [markdown]
# Inside `jax.shard_map` it is the same step once more, with a `jax.lax.pmean` of the
# loss (`docs/api/train.md`).
#
# ## 7. State that has no gradient: twelve lines by hand
#
# BatchNorm normalizes by the mean and variance of its batch, and keeps running averages
# of both for later, when there is no batch. They are no parameters: nothing
# differentiates by them, and yet they move. Here is the step for such a model without
# `make_step`, and `fit` runs it like any other. (With `make_step` it goes as the
# teacher does: frozen in the parameters, the batch's own statistics by `has_aux=True`.)


# %%
def batchnorm(model, x, running=None):
    """Return logits, and the statistics of this batch; use these, or running ones."""
    hidden = convolve(x, model["conv1"])
    own = {"mean": hidden.mean((0, 1, 2)), "variance": hidden.var((0, 1, 2))}
    used = own if running is None else running
    hidden = (hidden - used["mean"]) * jax.lax.rsqrt(used["variance"] + 1e-5)
    hidden = jax.nn.relu(hidden * model["scale"] + model["shift"])
    hidden = jax.nn.relu(convolve(hidden, model["conv2"], 2))
    return jnp.tensordot(hidden, model["head"], 3), own


def batchnorm_loss(model, batch):
    x, labels = batch
    logits, own = batchnorm(model, x)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, own


model = {**start, "scale": jnp.ones(8), "shift": jnp.zeros(8)}
fresh = {"mean": jnp.zeros(8), "variance": jnp.ones(8)}

# %% [markdown]
# The twelve lines:

# %%
optimizer = optax.adamw(3e-3)
params = {"model": model, "running": fresh}
state = sg.train.State(params, optimizer.init(model), jnp.int32(0))


def step_by_hand(state, batch):
    model, running = state.params["model"], state.params["running"]
    differentiate = jax.value_and_grad(batchnorm_loss, has_aux=True)
    (value, own), gradients = differentiate(model, batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state, model)
    model = optax.apply_updates(model, updates)
    running = optax.incremental_update(own, running, 0.1)
    params = {"model": model, "running": running}
    return sg.train.State(params, opt_state, state.step + 1), {"loss": value}


# %%
state, history = sg.train.fit(step_by_hand, state, drawn, steps=200, progress=False)
print(f"loss {history['loss'][0]:.2f} -> {history['loss'][-10:].mean():.2f}")

model, running = state.params["model"], state.params["running"]
answer = jax.jit(batchnorm)
right = {}
for name, used in {"running": running, "fresh": fresh}.items():
    logits, _ = answer(model, IMAGES[TEST], used)
    right[name] = float(jnp.mean(logits.argmax(-1) == LABELS[TEST]))
    print(f"test accuracy with {name:7} statistics: {right[name]:.1%}")
_, whole = answer(model, IMAGES[TRAIN])
for name, found in running.items():
    far = float(jnp.abs(found / whole[name] - 1).max())
    print(f"running {name:8}: within {far:.0%} of that of all training images")
assert right["running"] > max(0.95, right["fresh"] + 0.02)

# %% [markdown]
# ## What to take along
#
# - `make_step` and `fit` are plain functions on a pytree: save the state with pickle or
#   orbax, and go on where it ended. Ctrl-C returns what there is.
# - Frozen means bit for bit, without gradient and without optimizer state. Thaw with
#   `migrate`.
# - Whatever moves beside the gradient (teachers, running statistics) goes into a
#   function around the step, or a step of your own: `fit` runs any.
# - Look at gradients layer by layer before you change the learning rate.
# - Micro-batches and devices change no result but for rounding; a nonlinear gate sees
#   its own micro-batch.
