"""Weighted means over micro-batches and devices: divided once, whatever the pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import f32, instructions_of

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
BEATS = r"[\s\S]*\n  got:   {}[\s\S]*\n  write: {}"
RNG = np.random.default_rng(0)
X = np.asarray(RNG.normal(size=(8, 3)), np.float32)
Y = np.asarray(RNG.normal(size=8), np.float32)
# Of four micro-batches, examples i and i + 4: the third has none, the last has both.
MASK = np.array([1, 0, 0, 1, 0, 1, 0, 1], bool)
W = f32(0.5, -1.0, 2.0)
BATCH = (jnp.asarray(X), jnp.asarray(Y), jnp.asarray(MASK))


def masked(w, batch):
    x, y, mask = batch
    return jnp.sum((x @ w - y) ** 2 * mask), jnp.sum(mask)


def by_parameters(w, batch):
    """Weights that are functions of the parameters, as in importance sampling."""
    x, y, mask = batch
    weights = jnp.exp(x @ w / 4) * mask
    return jnp.sum((x @ w - y) ** 2 * weights), jnp.sum(weights)


def in_halves(w, batch):
    """Weights in float16, a sum in float32."""
    x, y, mask = batch
    half = jnp.where(mask, 0.5, 0.0).astype(jnp.float16)
    return jnp.sum((x @ w - y) ** 2 * half), jnp.sum(half)


def counted(w, batch):
    """All examples, counted in Python."""
    x, y, _ = batch
    return jnp.sum((x @ w - y) ** 2), len(y)


def expected(loss):
    """The mean and its gradient in float64: (S' W - S W') / W**2."""
    x, y, w = X.astype(float), Y.astype(float), np.array(W, float)
    z = x @ w
    squares, slopes = (z - y) ** 2, 2 * (z - y)[:, None] * x
    weights = np.exp(z / 4) * MASK if loss is by_parameters else 1.0 * MASK
    if loss is counted:
        weights = np.ones(8)
    total, weight = weights @ squares, weights.sum()
    moves = loss is by_parameters
    d_weight = weights @ x / 4 if moves else np.zeros(3)
    d_total = weights @ slopes + (weights * squares @ x / 4 if moves else 0)
    return total / weight, (d_total * weight - total * d_weight) / weight**2


LOSSES = (masked, by_parameters, in_halves, counted)
NAMES = [loss.__name__ for loss in LOSSES]


def gradient(loss, batch=BATCH, optimizer=None, **options):
    """Take a step of rate 1: the parameters move by minus the gradient."""
    step = make_step(loss, optimizer or optax.sgd(1.0), weighted=True, **options)
    state, metrics = step(step.init(W), batch)
    return metrics["loss"], W - state.params


def assert_agrees(found, loss):
    value, grad = expected(loss)
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    # A difference of parameters of size 2: their rounding.
    np.testing.assert_allclose(found[1], grad, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_the_gradient_is_that_of_the_whole(loss, k):
    assert_agrees(gradient(loss, accumulate=k), loss)


@pytest.mark.filterwarnings(r"ignore:[\s\S]*divides by a number")
def test_averages_are_another_gradient():
    """What averages make of it, and of a micro-batch that has no weight."""
    mean = lambda w, batch: masked(w, batch)[0] / masked(w, batch)[1]
    value, grad = expected(masked)
    step = make_step(mean, optax.sgd(1.0), accumulate=2)
    state, metrics = step(step.init(W), BATCH)
    assert abs(metrics["loss"] - value) > 0.1
    assert np.abs(W - state.params - grad).max() > 0.1
    step = make_step(mean, optax.sgd(1.0), accumulate=4)
    assert jnp.isnan(step(step.init(W), BATCH)[1]["loss"])


@pytest.mark.parametrize("loss", [masked, by_parameters], ids=NAMES[:2])
@pytest.mark.parametrize("k", [1, 4])
def test_a_batch_of_no_weight_teaches_nothing(loss, k):
    nothing = (*BATCH[:2], BATCH[2] & False)
    value, grad = gradient(loss, nothing, accumulate=k)
    assert jnp.isnan(value)
    np.testing.assert_array_equal(grad, 0)
    # Then it goes on.
    step = make_step(loss, optax.sgd(1.0), accumulate=k, weighted=True)
    state, _ = step(step.init(W), nothing)
    state, _ = step(state, BATCH)
    np.testing.assert_allclose(W - state.params, expected(loss)[1], atol=5e-7)


def test_a_gate_on_an_example_sees_what_it_sees_in_the_whole():
    """By averages it sees k times as much: the mean is over fewer."""
    clipped = lambda w, b: (
        jnp.sum((sg.clip_gradient(b[0] @ w, -0.2, 0.2) - b[1]) ** 2 * b[2]),
        jnp.sum(b[2]),
    )
    z, n = X @ np.array(W), MASK.sum()
    cotangents = np.clip(2 * (z - Y) * MASK / n, -0.2, 0.2)
    assert (np.abs(2 * (z - Y) * MASK / n) > 0.2).any()
    for k in (1, 2, 4):
        _, grad = gradient(clipped, accumulate=k)
        np.testing.assert_allclose(grad, cotangents @ X, atol=5e-7)


def test_aux_keys_and_statistics():
    def noisy(w, batch, key):
        total, weight = masked(w, batch)
        return (total + 0 * jax.random.normal(key), weight), jax.random.key_data(key)

    step = make_step(
        noisy, optax.sgd(1.0), weighted=True, has_aux=True, accumulate=4, stats="w"
    )
    key = jax.random.key(3)
    state, metrics = step(step.init(W), BATCH, key)
    assert_agrees((metrics["loss"], W - state.params), masked)
    keys = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(4)]
    np.testing.assert_array_equal(metrics["aux"], keys)
    # Of each share of the whole: the derivative of its part of the sum by the total.
    slopes = 2 * (X @ np.array(W) - Y)[:, None] * X * MASK[:, None] / MASK.sum()
    norms = [np.linalg.norm(slopes[i::4].sum(0)) for i in range(4)]
    np.testing.assert_allclose(metrics["stats"]["w"].norm, norms, rtol=1e-5)
    whole = make_step(masked, optax.sgd(1.0), weighted=True, stats="w")
    _, metrics = whole(whole.init(W), BATCH)
    norm = metrics["stats"]["w"].norm
    np.testing.assert_allclose(norm, np.linalg.norm(slopes.sum(0)), rtol=1e-5)


def test_a_search_along_a_line_goes_by_the_whole():
    losses = {}
    for k in (1, 4):
        step = make_step(by_parameters, optax.lbfgs(), weighted=True, accumulate=k)
        state, losses[k] = step.init(W), []
        for _ in range(3):
            state, metrics = step(state, BATCH)
            losses[k].append(metrics["loss"])
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-4)
    assert losses[4][2] < losses[4][0] / 2


def test_narrow_sums_are_added_in_float32():
    """1,024 micro-batches of sum 1 and weight 1: bfloat16 would stop at 256."""
    loss = lambda w, x: (jnp.sum(w * x), jnp.sum(x))
    step = make_step(loss, optax.sgd(1.0), weighted=True, accumulate=1024)
    start = step.init(jnp.bfloat16(1.0))
    state, metrics = step(start, jnp.ones(1024, jnp.bfloat16))
    assert (metrics["loss"], metrics["loss"].dtype) == (1.0, jnp.float32)
    assert (state.params, state.params.dtype) == (0.0, jnp.bfloat16)


def by_hand(accumulate):
    """Weights first, as those do who have found out; then the shares."""

    def step(w, opt_state, count, batch):
        split = lambda x: x.reshape(-1, accumulate, *x.shape[1:])
        micro = jax.tree.map(split, batch)
        pick = lambda i: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), micro
        )
        rounds = jnp.arange(accumulate)
        weight = jnp.sum(jax.lax.map(lambda i: masked(w, pick(i))[1], rounds))
        none = weight == 0
        scale = jnp.where(none, 0, 1 / jnp.where(none, 1, weight.astype(w.dtype)))

        def add(sums, i):
            share = lambda w: (masked(w, pick(i))[0] * scale, masked(w, pick(i))[0])
            (_, total), grad = jax.value_and_grad(share, has_aux=True)(w)
            return sums + grad, total

        grad, totals = jax.lax.scan(add, jnp.zeros_like(w), rounds)
        updates, opt_state = optax.adam(1e-2).update(grad, opt_state, w)
        loss = jnp.sum(totals) / weight
        return optax.apply_updates(w, updates), opt_state, count + 1, loss

    args = W, optax.adam(1e-2).init(W), jnp.int32(0), BATCH
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(*args)


def test_no_instruction_more_than_by_hand():
    """A mask's sums alone come first: nothing else of the loss is evaluated twice."""
    step = make_step(masked, optax.adam(1e-2), weighted=True, accumulate=4)
    ours = step.lower(step.init(W), BATCH)
    assert instructions_of(ours) <= instructions_of(by_hand(4))


# Devices ----------------------------------------------------------------------------


def mesh(explicit=False):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


@pytest.mark.parametrize("explicit", [False, True], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("loss", [masked, by_parameters], ids=NAMES[:2])
def test_over_devices_by_sharding(loss, k, explicit):
    m = mesh(explicit)
    batch = jax.device_put(BATCH, NamedSharding(m, P("d")))
    with jax.set_mesh(m):
        step = make_step(loss, optax.sgd(1.0), weighted=True, accumulate=k)
        start = step.init(jax.device_put(W, NamedSharding(m, P())))
        state, metrics = step(start, batch)
    assert_agrees((metrics["loss"], W - state.params), loss)


def alone(loss):
    return loss


def added(loss):
    return lambda w, batch: jax.lax.psum(loss(w, batch), "d")


@pytest.mark.parametrize("whose", [alone, added], ids=["each its own", "added up"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("loss", [masked, by_parameters], ids=NAMES[:2])
def test_over_devices_in_shard_map(loss, k, whose):
    """Device i has examples 2 i and 2 i + 1: one of them has no weight at all."""
    fun = whose(loss)
    step = make_step(fun, optax.sgd(1.0), weighted=True, accumulate=k)
    specs = {"in_specs": (P(), P("d")), "out_specs": P()}
    sharded = jax.jit(jax.shard_map(step, mesh=mesh(), **specs))
    state, metrics = sharded(step.init(W), BATCH)
    assert_agrees((metrics["loss"], W - state.params), loss)
    state, history = fit(
        sharded, step.init(W), lambda n: BATCH, steps=1, progress=False
    )
    assert_agrees((history["loss"][0], W - state.params), loss)


def half_added(w, batch):
    total, weight = masked(w, batch)
    return total, jax.lax.psum(weight, "d")


def test_what_is_unclear_over_devices_is_refused():
    step = make_step(half_added, optax.sgd(1.0), weighted=True)
    specs = {"in_specs": (P(), P("d")), "out_specs": P()}
    came = 'a sum that differs over "d", and a weight that is one'
    write = r'return jax\.lax\.psum\(sum, "d"\), jax\.lax\.psum\(weight, "d"\)'
    with pytest.raises(ValueError, match="of each device" + BEATS.format(came, write)):
        jax.shard_map(step, mesh=mesh(), **specs)(step.init(W), BATCH)
    # A length counted in Python is the same everywhere: is it one device's?
    step = make_step(counted, optax.sgd(1.0), weighted=True)
    with pytest.raises(ValueError, match="of each device" + BEATS.format(came, write)):
        jax.shard_map(step, mesh=mesh(), **specs)(step.init(W), BATCH)
    # Parameters that differ as well: parts of one model, or four models?
    step = make_step(masked, optax.sgd(1.0), weighted=True)
    run = jax.shard_map(
        lambda w, batch: step(step.init(w), batch)[0].params,
        mesh=mesh(),
        in_specs=(P("d"), P("d")),
        out_specs=P("d"),
    )
    came = 'parts that differ over "d", as parameters do'
    with pytest.raises(ValueError, match="of each device" + BEATS.format(came, write)):
        run(jnp.tile(W, 4), BATCH)


# What is refused, and what is told ---------------------------------------------------

WRONG = {
    "with weighted, the loss returns a pair": (
        (r"f32\[\]", r"return jnp\.sum\(losses \* mask\), jnp\.sum\(mask\)"),
        {"loss": lambda w, batch: masked(w, batch)[0]},
    ),
    "with weighted, the loss returns": (
        (r"tuple of f32\[\], (i32|i64)\[\], f32\[\]", "return jnp"),
        {"loss": lambda w, batch: (*masked(w, batch), w[0])},
    ),
    r"the loss returns a pair \(\(sum, weight\), aux\)": (
        ("tuple of", r"return \(sum, weight\), aux"),
        {"loss": lambda w, batch: (*masked(w, batch), w), "has_aux": True},
    ),
    "the loss is a scalar": (
        (r"f32\[3\]", r"jnp\.sum\(\.\.\.\) of it"),
        {"loss": lambda w, batch: (w, 1.0)},
    ),
    "the weight is a real scalar": (
        (r"(i32|bool)\[8\]", r"jnp\.sum\(mask\), or the number of examples"),
        {"loss": lambda w, batch: (masked(w, batch)[0], batch[2])},
    ),
    "the weight is a real": (
        (r"c64\[\]", r"jnp\.sum\(mask\)"),
        {"loss": lambda w, batch: (masked(w, batch)[0], jnp.complex64(1j))},
    ),
    "with weighted, the weight": (
        ("dict of", r"jnp\.sum\(mask\)"),
        {"loss": lambda w, batch: (masked(w, batch)[0], {"n": 1})},
    ),
    r"weighted is True for a loss that returns \(sum, weight\), or False": (
        ("'mean'", "weighted=True"),
        {"loss": masked, "weighted": "mean"},
    ),
    "the loss returns one scalar": (
        ("tuple of", r"[^\n]*weighted=True for \(sum, weight\)"),
        {"loss": masked, "weighted": None},
    ),
}


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize(("words", "case"), WRONG.items(), ids=range(len(WRONG)))
def test_wrong_returns(words, case):
    (came, write), options = case
    options = {"weighted": True, "optimizer": optax.sgd(1.0)} | options
    with pytest.raises(TypeError, match=words + BEATS.format(came, write)):
        steps(make_step, options)


def steps(make, options):
    step = make(**options)
    for _ in range(2):
        state, _ = step(step.init(W), BATCH)
    return state


def where_mean(w, batch):
    return jnp.mean((batch[0] @ w) ** 2, where=batch[2])


def clamped(w, batch):
    total, weight = masked(w, batch)
    return total / jnp.maximum(weight, 1)


def guarded(w, batch):
    total, weight = masked(w, batch)
    return jnp.where(weight > 0, total / weight, 0.0)


def by_reciprocal(w, batch):
    total, weight = masked(w, batch)
    return total * (1.0 / weight) + 0.1 * jnp.sum(w**2)


def averaged(w, batch):
    return jnp.average((batch[0] @ w) ** 2, weights=batch[2])


def in_a_branch(w, batch):
    total, weight = masked(w, batch)
    return jax.lax.cond(weight > 0, lambda: total / weight, lambda: 0.0)


def jitted(w, batch):
    return -jax.jit(lambda total, weight: total / weight)(*masked(w, batch))


def in_a_scan(w, batch):
    step = lambda c, _: (c + clamped(w, batch), None)
    return jax.lax.scan(step, 0.0, None, length=2)[0]


DIVIDES = [
    where_mean,
    clamped,
    guarded,
    by_reciprocal,
    averaged,
    in_a_branch,
    jitted,
    in_a_scan,
]


@pytest.mark.parametrize("loss", DIVIDES, ids=lambda f: f.__name__)
def test_a_mean_that_divides_by_the_batch_is_told_once(loss):
    here = r"test_train_weighted\.py:\d+\): each micro-batch counts the same"
    options = {"loss": loss, "optimizer": optax.sgd(0.1), "accumulate": 2}
    with pytest.warns(UserWarning, match=here) as caught:
        steps(make_step, options)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # Nothing is said where its user has, or where there is one micro-batch.
    for options in ({"accumulate": 2, "weighted": False}, {"accumulate": 1}):
        step = make_step(loss, optax.sgd(0.1), **options)
        step(step.init(W), BATCH)


def plain_mean(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) + 1e-3 * jnp.sum(w**2)


def mean_of_rows(w, batch):
    """Each example divides by its own: their mean is over equal ones."""
    x, _, mask = batch
    rows = (x * w) ** 2 * mask[:, None]
    return jnp.mean(jnp.sum(rows, 1) / (1 + jnp.sum(x**2, 1)))


def by_a_parameter(w, batch):
    return jnp.mean(batch[0] @ w) / (1.0 + jnp.sum(w**2))


def behind_a_logarithm(w, batch):
    """No mean at all, of the batch or of a part."""
    return jnp.log(clamped(w, batch))


def for_the_value_alone(w, batch):
    return plain_mean(w, batch) * 1.0 + 0 * len(batch)


@pytest.mark.parametrize(
    "loss",
    [plain_mean, mean_of_rows, by_a_parameter, behind_a_logarithm, for_the_value_alone],
    ids=lambda f: f.__name__,
)
def test_other_divisions_are_not_told(loss):
    step = make_step(loss, optax.sgd(0.1), accumulate=2)
    step(step.init(W), BATCH)


@pytest.mark.parametrize("k", [1, 4])
def test_what_the_warning_says_to_write_is_right(k):
    """`return jnp.sum(losses * mask), jnp.sum(mask)`, pasted."""

    def loss(w, batch):
        x, y, mask = batch
        losses = (x @ w - y) ** 2
        return jnp.sum(losses * mask), jnp.sum(mask)

    assert_agrees(gradient(loss, accumulate=k), masked)


def test_a_weighted_loss_trains_in_a_loop_of_steps():
    step = make_step(masked, optax.adam(0.1), weighted=True, accumulate=4)
    whole = make_step(masked, optax.adam(0.1), weighted=True)
    run = functools.partial(fit, batches=lambda n: BATCH, steps=20, progress=False)
    (state, history), (other, losses) = (run(s, s.init(W)) for s in (step, whole))
    np.testing.assert_allclose(history["loss"], losses["loss"], rtol=1e-4)
    np.testing.assert_allclose(state.params, other.params, rtol=1e-3)
    assert history["loss"][-1] < history["loss"][0] / 2
