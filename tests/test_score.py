"""Likelihood ratios: derivatives of means by enumeration, to third order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import assert_same_bits, every_value, f32, instructions, mesh

import stopgrad_jax as sg

ORDERS = (1, 2, 3)


def derivative(f, order):
    """Differentiate in reverse mode, then in forward mode."""
    for k in range(order):
        f = jax.jacfwd(f) if k else jax.grad(f)
    return f


# The box ----------------------------------------------------------------------------


def test_box_is_one_with_the_derivatives_of_a_ratio(run):
    """The n-th derivative is that of p, over p: here a power's."""
    log_prob = lambda x: 2.5 * jnp.log(x)
    box = run(lambda x: sg.score.magic_box(log_prob(x)))
    assert box(2.0) == 1
    expected = 1.0
    for order in ORDERS:
        expected *= (3.5 - order) / 2.0
        for f in (box, jax.checkpoint(box)):
            np.testing.assert_allclose(derivative(f, order)(2.0), expected, rtol=1e-5)
        mapped = jax.vmap(derivative(box, order))(f32(2.0, 2.0))
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_box_of_every_value(dtype):
    x = every_value(dtype)
    one = sg.score.magic_box(x)
    assert one.dtype == dtype
    assert_same_bits(jnp.isnan(one), jnp.isnan(x))
    assert jnp.all((one == 1) | jnp.isnan(x))
    usual = jnp.exp(x - lax.stop_gradient(x))
    assert jnp.isnan(usual[jnp.isinf(x)]).all()
    slope = jax.grad(lambda x: jnp.sum(sg.score.magic_box(x)))(jnp.zeros_like(x))
    assert slope.dtype == dtype
    at_infinity = jax.grad(sg.score.magic_box)(jnp.asarray(-jnp.inf, dtype))
    assert at_infinity == 1


# One choice -------------------------------------------------------------------------


def bernoulli(theta):
    """Return probabilities and log-probabilities of 0 and of 1."""
    logits = jnp.stack([-theta, theta])
    return jax.nn.sigmoid(logits), jax.nn.log_sigmoid(logits)


def enumerated(surrogate, order, theta):
    """Mean of a derivative of the surrogate, over both values."""
    p, _ = bernoulli(theta)
    each = lambda theta: surrogate(theta, bernoulli(theta)[1])
    return p @ derivative_of_each(each, order)(theta)


def derivative_of_each(f, order):
    for _ in range(order):
        f = jax.jacfwd(f)
    return f


COSTS = {
    "fixed": lambda theta: f32(0.47, 1.76),
    "learned": lambda theta: jnp.stack([jnp.sin(theta), theta**3]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_bernoulli_to_third_order(costs, order):
    theta = jnp.float32(1.0)
    truth = derivative(lambda t: bernoulli(t)[0] @ costs(t), order)(theta)
    surrogates = {
        "box": lambda t, log: sg.score.magic_box(log) * costs(t),
        "loss": lambda t, log: sg.score.score_loss(costs(t), log),
        "baseline": lambda t, log: sg.score.score_loss(costs(t), log, 0.9),
        "dice": lambda t, log: sg.score.dice(log[None], costs(t)[None]),
        "loaded": lambda t, log: sg.score.dice(
            log[None], costs(t)[None], baseline=0.9, discount=0.5
        ),
    }
    for surrogate in surrogates.values():
        np.testing.assert_allclose(
            enumerated(surrogate, order, theta), truth, rtol=1e-4, atol=1e-5
        )


def test_the_naive_surrogate_has_a_wrong_second_derivative():
    theta, costs = jnp.float32(1.0), COSTS["fixed"]
    naive = lambda t, log: log * costs(t)
    box = lambda t, log: sg.score.magic_box(log) * costs(t)
    first = [enumerated(f, 1, theta) for f in (naive, box)]
    np.testing.assert_allclose(*first, rtol=1e-5)
    second = [round(float(enumerated(f, 2, theta)), 3) for f in (naive, box)]
    assert second == [-0.278, -0.117]


def test_gradient_of_score_loss(run):
    cost, log, b = f32(1.0, 4.0), f32(-1.0, -2.0), f32(2.0, 3.0)
    loss = run(
        lambda cost, log, b: jnp.sum(f32(1, 10) * sg.score.score_loss(cost, log, b))
    )
    grads = jax.grad(loss, (0, 1, 2))(cost, log, b)
    np.testing.assert_array_equal(grads[0], [1, 10])
    np.testing.assert_array_equal(grads[1], [-1, 10])
    np.testing.assert_array_equal(grads[2], [0, 0])
    forward = jax.jacfwd(loss, 1)(cost, log, b)
    np.testing.assert_array_equal(forward, grads[1])
    at_zero = jax.grad(loss, 1)(cost, f32(-jnp.inf, 0.0), b)
    np.testing.assert_array_equal(at_zero, grads[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_score_loss_is_the_cost(dtype, run):
    cost = every_value(dtype)
    loss = run(lambda cost: sg.score.score_loss(cost, jnp.zeros_like(cost), 0.3))
    assert_same_bits(loss(cost), cost)
    counts = sg.score.score_loss(jnp.arange(3), jnp.zeros(3, dtype))
    assert counts.dtype == dtype
    wider = sg.score.score_loss(jnp.zeros(3, dtype), jnp.zeros(3, jnp.float32))
    assert wider.dtype == "float32"


def test_a_baseline_of_the_mean_lowers_the_variance():
    theta, costs = jnp.float32(0.3), f32(10.0, 11.0)
    p, _ = bernoulli(theta)

    def variance(baseline, order):
        f = lambda t: sg.score.score_loss(costs, bernoulli(t)[1], baseline)
        each = derivative_of_each(f, order)(theta)
        return p @ (each - p @ each) ** 2

    for order in ORDERS:
        assert variance(float(p @ costs), order) < variance(None, order) / 10


# Leave one out ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_leave_one_out(dtype, run):
    costs = jnp.array([[1, 10], [2, 20], [6, 60], [7, 70]], dtype)
    out = run(sg.score.leave_one_out)(costs)
    assert out.dtype == (jnp.zeros(()).dtype if dtype == "int32" else dtype)
    x = np.float64(costs)
    expected = np.stack([np.delete(x, k, 0).mean(0) for k in range(4)])
    np.testing.assert_allclose(np.float64(out), expected, rtol=1e-2)
    other = run(lambda c: sg.score.leave_one_out(c.T, axis=-1))(costs)
    np.testing.assert_array_equal(np.float64(other.T), np.float64(out))


def test_leave_one_out_sums_in_float32_and_has_no_gradient():
    costs = jnp.full(4096, 3.0, jnp.bfloat16)
    np.testing.assert_array_equal(np.float32(sg.score.leave_one_out(costs)), 3)
    grad = jax.jacrev(sg.score.leave_one_out)(f32(1.0, 2.0))
    np.testing.assert_array_equal(grad, 0)
    assert np.isnan(sg.score.leave_one_out(f32(1.0, jnp.nan, 2.0))).all()


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_leave_one_out_is_unbiased_and_helps(samples, order):
    """Over all samples of several independent choices."""
    theta, costs = jnp.float32(0.4), f32(5.0, 6.0)
    truth = derivative(lambda t: bernoulli(t)[0] @ costs, order)(theta)
    p, _ = bernoulli(theta)
    every = np.array(list(itertools.product([0, 1], repeat=samples)))
    weights = np.prod(np.array(p)[every], 1)

    def of(index, baseline):
        def loss(t):
            drawn = costs[index]
            b = sg.score.leave_one_out(drawn) if baseline else None
            return jnp.mean(sg.score.score_loss(drawn, bernoulli(t)[1][index], b))

        return derivative(loss, order)(theta)

    with_, without = (
        np.array([of(jnp.array(index), b) for index in every]) for b in (True, False)
    )
    np.testing.assert_allclose(weights @ with_, truth, atol=1e-4)
    spread = lambda x: weights @ (x - weights @ x) ** 2
    assert spread(with_) < spread(without) / 2


# Trajectories -----------------------------------------------------------------------

GAMMA = 0.9
THETA = f32(0.5, -0.3)
TRAJECTORIES = np.array(list(itertools.product([0, 1], repeat=3)))


def trajectory(theta, actions):
    """Log-probabilities and costs of three steps; each depends on those before."""
    a = [jnp.asarray(x, jnp.float32) for x in actions]
    logits = [theta[0], theta[1] + a[0], theta[0] * theta[1] - a[1] + a[0]]
    logs = [
        jax.nn.log_sigmoid(jnp.where(x > 0, z, -z))
        for x, z in zip(a, logits, strict=True)
    ]
    costs = [1 + a[0], theta[0] * a[1] + 2 * a[0], a[2] - 3 * a[1] * a[0]]
    return jnp.stack(logs), jnp.stack(costs)


def truth(theta):
    logs, costs = jax.vmap(trajectory, (None, 0))(theta, jnp.array(TRAJECTORIES))
    discounts = f32(1.0, GAMMA, GAMMA**2)
    return jnp.exp(logs.sum(1)) @ (costs @ discounts)


def values(actions):
    """A baseline that knows the past alone."""
    a = jnp.asarray(actions, jnp.float32)
    return jnp.stack([1.5 + 0 * a[0], 1 + 0.5 * a[0], 0.3 - a[0] * a[1]])


def dice_of(theta, actions, baseline, decay=1.0):
    logs, costs = trajectory(theta, actions)
    b = values(actions) if baseline else None
    return sg.score.dice(logs, costs, discount=GAMMA, baseline=b, decay=decay)


def every_derivative(order, baseline, decay=1.0):
    f = lambda theta, actions: dice_of(theta, actions, baseline, decay)
    each = derivative(f, order)
    return jax.jit(jax.vmap(each, (None, 0)))(THETA, jnp.array(TRAJECTORIES))


def weights():
    logs, _ = jax.vmap(trajectory, (None, 0))(THETA, jnp.array(TRAJECTORIES))
    return jnp.exp(logs.sum(1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("baseline", [False, True])
def test_dice_to_third_order(order, baseline):
    mean = jnp.tensordot(weights(), every_derivative(order, baseline), 1)
    np.testing.assert_allclose(mean, derivative(truth, order)(THETA), atol=1e-4)


def test_a_baseline_lowers_the_variance_of_every_order():
    for order in ORDERS:
        spread = []
        for baseline in (False, True):
            each = every_derivative(order, baseline)
            centered = each - jnp.tensordot(weights(), each, 1)[None]
            spread.append(float(jnp.sum(jnp.tensordot(weights(), centered**2, 1))))
        assert spread[1] < 0.8 * spread[0], (order, spread)


def test_decay_leaves_the_first_derivative_and_biases_the_second():
    one = every_derivative(1, True)
    for decay in (0.0, 0.5):
        np.testing.assert_allclose(every_derivative(1, True, decay), one, rtol=1e-5)
        mean = jnp.tensordot(weights(), every_derivative(2, True, decay), 1)
        assert np.abs(mean - derivative(truth, 2)(THETA)).max() > 0.02
    nearly = every_derivative(2, True, 1 - 1e-7)  # by the scan, not the sum
    np.testing.assert_allclose(nearly, every_derivative(2, True), rtol=1e-3, atol=1e-4)


def test_first_derivative_of_dice(run):
    logs = f32(-1.0, -jnp.inf, -0.5)
    costs, b = f32(1.0, 2.0, 4.0), f32(1.0, 0.0, 3.0)
    total = run(
        lambda logs, costs, b: sg.score.dice(logs, costs, discount=0.5, baseline=b)
    )
    assert total(logs, costs, b) == 3
    grads = jax.grad(total, (0, 1, 2))(logs, costs, b)
    np.testing.assert_array_equal(grads[0], [2, 2, 0.25])
    np.testing.assert_array_equal(grads[1], [1, 0.5, 0.25])
    np.testing.assert_array_equal(grads[2], 0)
    np.testing.assert_array_equal(jax.jacfwd(total)(logs, costs, b), grads[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dice_is_the_discounted_cost(dtype):
    costs = jnp.array([[1, 2], [4, jnp.inf], [8, 0]], dtype)
    logs = jnp.array([[-1, -jnp.inf]] * 3, dtype)
    for kwargs in ({}, {"baseline": 3.0}, {"baseline": 3.0, "decay": 0.5}):
        total = sg.score.dice(logs, costs, discount=0.5, **kwargs)
        assert total.dtype == dtype
        np.testing.assert_array_equal(np.float32(total), [5, np.inf])
    assert sg.score.dice(jnp.zeros(3, dtype), jnp.arange(3)).dtype == dtype
    assert np.isnan(sg.score.dice(logs, costs.at[0].set(jnp.nan))).all()
    none = sg.score.dice(jnp.zeros((0, 2), dtype), jnp.zeros((0, 2), dtype))
    np.testing.assert_array_equal(np.float32(none), 0)


def test_discount_may_be_0_traced_and_learned():
    logs, costs = f32(-1.0, -2.0, -3.0), f32(1.0, 2.0, 4.0)
    total = lambda d: sg.score.dice(logs, costs, discount=d)
    assert total(0.0) == 1
    np.testing.assert_allclose(jax.jit(jax.grad(total))(0.5), 2 + 2 * 0.5 * 4)
    assert total(jnp.float32(0.5)) == 3
    both = lambda d: sg.score.dice(logs, costs, decay=d)
    assert jax.jit(both)(0.5) == 7


def _sharded(f):
    return jax.shard_map(f, mesh=mesh(), in_specs=(P(None, "d"),) * 3, out_specs=P("d"))


WRAPS = {
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, 1),
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda *xs: lax.scan(lambda c, xs: (c, f(*xs)), 0.0, [x.T for x in xs])[1]
    ),
    "shard_map": _sharded,
}
if jax.config.jax_check_tracer_leaks:  # see tests/programs.py
    del WRAPS["shard_map"]


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_everywhere_the_same(wrap, decay):
    rng = np.random.default_rng(0)
    logs, costs, b = (jnp.array(rng.normal(size=(3, 4)), jnp.float32) for _ in range(3))

    def f(logs, costs, b):
        total = sg.score.dice(logs, costs, discount=0.9, baseline=b, decay=decay)
        return total + jnp.sum(sg.score.score_loss(costs, logs, b), 0)

    def both(f):
        loss = lambda *xs: jnp.sum(jnp.sin(f(*xs)))
        along = lambda *xs: jnp.vdot(jax.grad(loss)(*xs), logs)
        return jax.jit(lambda *xs: (f(*xs), jax.grad(along)(*xs)))(logs, costs, b)

    for ours, plain in zip(both(wrap(f)), both(f), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


# Cost -------------------------------------------------------------------------------


def _naive(cost, log, b):
    return lax.stop_gradient(cost - b) * log


def _usual_box(cost, log, b):
    return jnp.exp(log - lax.stop_gradient(log)) * (cost - b) + b


def test_no_instruction_more_than_by_hand():
    args = f32(1.0, 2.0, 3.0), f32(-1.0, -2.0, -3.0), f32(0.5, 0.5, 0.5)
    count = lambda f: instructions(
        jax.grad(lambda log, cost, b: jnp.sum(f(cost, log, b)) + jnp.sum(log * log)),
        args[1],
        args[0],
        args[2],
    )
    assert count(sg.score.score_loss) <= count(_naive)
    assert count(sg.score.score_loss) <= count(_usual_box)
    forward = lambda f: instructions(
        lambda cost, log, b: jnp.sum(f(cost, log, b)) + jnp.sum(log * b), *args
    )
    assert forward(sg.score.score_loss) <= forward(lambda cost, log, b: cost)


# What is refused --------------------------------------------------------------------

REFUSED = {
    "ints": (
        TypeError,
        r"magic_box\(log_prob\): log_prob is an array of real floats",
        lambda: sg.score.magic_box(3),
    ),
    "ints, loss": (
        TypeError,
        "log_prob is an array of real floats",
        lambda: sg.score.score_loss(f32(1.0), jnp.arange(1)),
    ),
    "ints, dice": (
        TypeError,
        "log_probs is an array of real floats",
        lambda: sg.score.dice(jnp.arange(2), f32(1.0, 2.0)),
    ),
    "complex": (
        TypeError,
        "real cost",
        lambda: sg.score.score_loss(jnp.zeros(1, jnp.complex64), f32(1.0)),
    ),
    "columns": (
        ValueError,
        r"log_prob of the shape of cost, f32\[2\][\s\S]*log_prob.sum\(-1\)",
        lambda: sg.score.score_loss(f32(1.0, 2.0), jnp.zeros((2, 1))),
    ),
    "one log_prob": (
        ValueError,
        "log_prob of the shape of cost[\\s\\S]*broadcast_to",
        lambda: sg.score.score_loss(f32(1.0, 2.0), 0.5),
    ),
    "baseline": (
        ValueError,
        "a baseline that broadcasts",
        lambda: sg.score.score_loss(f32(1.0, 2.0), f32(1.0, 2.0), f32(1, 2, 3)),
    ),
    "a wide baseline": (
        ValueError,
        "a baseline that broadcasts",
        lambda: sg.score.dice(f32(1.0, 2.0), f32(1.0, 2.0), baseline=jnp.zeros((2, 2))),
    ),
    "one sample": (
        ValueError,
        "costs of two samples at least",
        lambda: sg.score.leave_one_out(f32(1.0)),
    ),
    "no sample": (
        ValueError,
        "costs of two samples at least",
        lambda: sg.score.leave_one_out(1.0),
    ),
    "no such axis": (
        ValueError,
        "along axis 2",
        lambda: sg.score.leave_one_out(f32(1.0, 2.0), axis=2),
    ),
    "complex costs": (
        TypeError,
        "real costs",
        lambda: sg.score.leave_one_out(jnp.zeros(2, jnp.complex64)),
    ),
    "no time": (ValueError, "a time axis", lambda: sg.score.dice(0.5, 1.0)),
    "dice's shapes": (
        ValueError,
        "log_probs of the shape of costs",
        lambda: sg.score.dice(jnp.zeros(2), jnp.zeros(3)),
    ),
    "discount": (
        ValueError,
        "discount is from 0 to 1",
        lambda: sg.score.dice(f32(1.0), f32(1.0), discount=1.5),
    ),
    "discounts": (
        ValueError,
        "discount is a scalar",
        lambda: sg.score.dice(f32(1.0), f32(1.0), discount=f32(0.5, 0.5)),
    ),
    "decay": (
        ValueError,
        "decay is from 0 to 1",
        lambda: sg.score.dice(f32(1.0), f32(1.0), decay=jnp.nan),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    kind, words, call = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["got", "write"]
