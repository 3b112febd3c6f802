"""Likelihood ratios: the gradient of a mean by the probability of what was drawn.

The derivative of E[cost] is E[cost * d log p + d cost]. A surrogate whose *derivatives*
have that mean is what automatic differentiation needs: its value is the cost, and a
box, `magic_box(log p)`, of value 1 and derivative d log p, carries the probability.
Everything here is right to every order and in both modes, and finite where a
probability is 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import stopgrad_jax._jax as _jax
from stopgrad_jax._checks import is_known, real_floats, real_number
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong
from stopgrad_jax.substitution import replace_value

from ._inputs import wider

__all__ = ["dice", "leave_one_out", "magic_box", "score_loss"]


@public
def magic_box(log_prob: ArrayLike) -> jax.Array:
    """Return 1, whose derivatives are those of the probability over itself.

    Multiply a cost by the box of the log-probability of all choices that it depends on:
    the mean of every derivative is then that derivative of the mean. Unbiased; see
    `score_loss` for the variance, and there and in `dice` for baselines.

    Forward: 1; nan where log_prob is nan. The usual exp(l - stop_gradient(l)) is nan
      where l is infinite.
    Backward: g times the derivative of log_prob; of n-th order, the n-th derivative of
      p over p, where p = exp(log_prob).

    Args:
      log_prob: floats of any shape, such as the sum of the log-probabilities of several
        choices.

    Returns:
      Ones of log_prob's shape and dtype.

    Raises:
      TypeError: log_prob is not floating.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> box = lambda x: sg.score.magic_box(3 * x)
        >>> print(box(0.5), jax.grad(box)(0.5), jax.grad(jax.grad(box))(0.5))
        1.0 3.0 9.0

    Reference:
      Foerster, Farquhar, Al-Shedivat, Rocktäschel, Xing and Whiteson (2018), "DiCE: The
      Infinitely Differentiable Monte Carlo Estimator".
    """
    x = real_floats(log_prob, "log_prob", "magic_box(log_prob)")
    return jnp.exp(replace_value(x, jnp.where(jnp.isnan(x), x, jnp.zeros_like(x))))


@public
def score_loss(
    cost: ArrayLike, log_prob: ArrayLike, baseline: ArrayLike | None = None
) -> jax.Array:
    """Give each cost the gradient of its mean over what was drawn (REINFORCE).

    Unbiased to every order, if the baseline does not depend on the sample. A number
    added to all costs changes no mean, but the variance by its square; a baseline is
    subtracted from them. Of all constants the best for a parameter is the mean of
    `cost * s**2` over that of `s**2`, s being the derivative of log_prob by it. The
    mean cost is usual, and `leave_one_out` an estimate of that.

    Forward: cost, bit for bit; so its mean is the mean cost, and no meaningless number.
    Backward: g * (cost - baseline) to log_prob, g to cost, nothing to baseline.

    Args:
      cost: what to minimize, of any shape; an int becomes a float. Its own gradient is
        part of the result; stop it where it is a reward from outside.
      log_prob: log-probability of the sample that the cost is of; floats of its shape.
      baseline: subtracted from the cost in the gradient alone; broadcasts to cost.

    Returns:
      The cost, of the wider dtype of both.

    Raises:
      TypeError: log_prob is not floating, or cost is no real number.
      ValueError: log_prob has another shape than cost, or baseline does not broadcast.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> cost = jnp.array([1.0, 4.0])
        >>> loss = lambda l: sg.score.score_loss(cost, l, baseline=2.0).mean()
        >>> print(loss(jnp.zeros(2)), jax.grad(loss)(jnp.zeros(2)))
        2.5 [-0.5  1. ]

    Reference:
      Williams (1992), "Simple Statistical Gradient-Following Algorithms for
      Connectionist Reinforcement Learning".
    """
    called = "score_loss(cost, log_prob)"
    log, costs = real_floats(log_prob, "log_prob", called), _costs(cost, "cost", called)
    _same_shape(costs, log, "cost", "log_prob", called)
    dtype = _together(costs, log)
    costs = costs.astype(dtype)
    advantage = costs
    if baseline is not None:
        advantage = costs - _baseline(baseline, costs, called)
    box = jnp.exp(_ratio(log.astype(dtype)))
    return replace_value(box * advantage, costs)


@public
def leave_one_out(costs: ArrayLike, *, axis: int = 0) -> jax.Array:
    """Return for each of several samples the mean cost of the others, as its baseline.

    It does not depend on the sample itself, so the gradient stays unbiased (RLOO): the
    mean of `score_loss` over n samples has as its gradient the sample covariance of the
    costs and of s, the derivatives of their log_prob. Its variance, for each parameter,
    is that of the mean cost as a constant baseline, plus

        (Var[cost] * Var[s] + Cov[cost, s]**2) / (n * (n - 1)).

    A better constant than the mean cost (see `score_loss`) can have much less.

    Forward: (sum(costs) - costs) / (n - 1), summed in float32 at least; it is rounded
    as the sum is, and nonfinite if any cost is.
    Backward: nothing.

    Args:
      costs: `[n, ...]`, the costs of n independent samples of the same choice.
      axis: where the samples are, if not first.

    Returns:
      Baselines of costs' shape, and of its dtype if that is floating.

    Raises:
      TypeError: costs are no real numbers.
      ValueError: there are fewer than two samples, or no such axis.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> print(sg.score.leave_one_out(jnp.array([1.0, 2.0, 6.0])))
        [4.  3.5 1.5]

    Reference:
      Kool, van Hoof and Welling (2019), "Buy 4 REINFORCE Samples, Get a Baseline for
      Free!".
    """
    called = "leave_one_out(costs)"
    x = jax.lax.stop_gradient(_costs(costs, "costs", called))
    if not -x.ndim <= axis < x.ndim or x.shape[axis] < 2:
        expected = f"costs of two samples at least, along axis {axis}"
        instead = "jax.vmap over the keys of several samples"
        raise wrong(ValueError, called, expected, type_of(x), instead)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(()).dtype
    x = x.astype(wider(dtype))
    others = jnp.sum(x, axis, keepdims=True) - x
    return (others / (x.shape[axis] - 1)).astype(dtype)


@public
def dice(
    log_probs: ArrayLike,
    costs: ArrayLike,
    *,
    discount: ArrayLike = 1.0,
    baseline: ArrayLike | None = None,
    decay: ArrayLike = 1.0,
) -> jax.Array:
    """Give the cost of a trajectory the derivatives of its mean, to every order.

    The cost at t depends on the choices up to t, so the box of their log-probabilities
    goes with it. With a baseline this is Loaded DiCE: the baseline goes into all
    derivatives, not into the first alone. Near R[t] it lowers the variance of each, far
    from R[t] it raises it. Unbiased at decay 1, if the baseline at t depends on nothing
    drawn at t or later. Means over trajectories are the caller's.

    Forward: sum of discount^t * costs[t] over t.
    Backward: at first order g * discount^t * (R[t] - baseline[t]) to log_probs[t], with
      R[t] the discounted cost from t on; g * discount^t to costs[t]; nothing to
      baseline. Higher orders see every earlier choice through
      R[0] + sum of discount^t * (box(w[t]) - box(v[t])) * (R[t] - baseline[t]), with
      v[t] = decay * w[t - 1] and w[t] = v[t] + log_probs[t].

    Args:
      log_probs: floats `[time, ...]`; of all choices made at t together.
      costs: `[time, ...]`, the same shape; zeros after the end of an episode. They may
        depend on parameters themselves.
      discount: a number from 0 to 1.
      baseline: estimates of R[t] from what is known before the choice at t, such as
        values of states; broadcasts to costs. Zeros after the end, too.
      decay: from 0 to 1, how much of earlier choices higher derivatives see: below 1
        biases them, which is meant to lower their variance. The first derivative does
        not change.

    Returns:
      The discounted cost of each trajectory, `[...]`.

    Raises:
      TypeError: log_probs are not floating, or costs no real numbers.
      ValueError: shapes do not fit, there is no time axis, or discount or decay is not
        from 0 to 1 (where it is known).

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> costs = jnp.array([1.0, 2.0])
        >>> total = lambda l: sg.score.dice(l, costs, discount=0.5)
        >>> print(total(jnp.zeros(2)), jax.grad(total)(jnp.zeros(2)))
        2.0 [2. 1.]

    Reference:
      Foerster et al. (2018), "DiCE: The Infinitely Differentiable Monte Carlo
      Estimator"; Farquhar, Whiteson and Foerster (2019), "Loaded DiCE: Trading off Bias
      and Variance in Any-Order Score Function Gradient Estimators".
    """
    called = "dice(log_probs, costs)"
    log = real_floats(log_probs, "log_probs", called)
    cost = _costs(costs, "costs", called)
    _same_shape(cost, log, "costs", "log_probs", called)
    if not log.ndim:
        expected, instead = "a time axis, [time, ...]", "sg.score.score_loss"
        raise wrong(ValueError, called, expected, type_of(log), instead)
    dtype = _together(cost, log)
    log, cost = log.astype(dtype), cost.astype(dtype)
    powers = _powers(_fraction(discount, "discount", called), log)
    discounted = powers * cost
    value = jnp.sum(discounted, 0)
    to_go = jax.lax.cumsum(discounted, reverse=True)
    if baseline is not None:
        to_go = to_go - powers * _baseline(baseline, cost, called)
    ratio = _ratio(log)
    rate = _fraction(decay, "decay", called)
    whole = not _jax.is_traced(decay) and np.all(np.asarray(decay) == 1)
    before = _summed(ratio) if whole else _accumulated(ratio, rate)
    boxes = jnp.exp(before) * jnp.expm1(ratio)  # box(w) - box(v): an exact zero
    return replace_value(value + jnp.sum(boxes * to_go, 0), value)


def _ratio(log: jax.Array) -> jax.Array:
    """Return log p minus itself: 0, also where p is 0, with the derivative of log p."""
    return replace_value(log, jnp.zeros_like(log))


def _powers(discount: jax.Array, log: jax.Array) -> jax.Array:
    """Return discount^t, `[time, ...]`, computed in float32 at least."""
    wide = wider(log.dtype)
    steps = jax.lax.broadcasted_iota(wide, log.shape, 0)
    return _power(discount.astype(wide), steps).astype(log.dtype)


@jax.custom_jvp
def _power(x: jax.Array, steps: jax.Array) -> jax.Array:
    return x**steps


@_power.defjvp
def _(primals: Any, tangents: Any) -> Any:
    # By hand, since JAX takes the derivative of x**0 for 0 * x**-1: nan at 0.
    (x, steps), (x_dot, _) = primals, tangents
    below = _power(x, jnp.maximum(steps - 1, 0))
    return _power(x, steps), x_dot * (steps * below)


def _summed(ratio: jax.Array) -> jax.Array:
    """Return the sums of what comes before each t: `_accumulated` without decay."""
    total = jax.lax.cumsum(ratio)
    return jnp.concatenate([jnp.zeros_like(total[:1]), total[:-1]])


def _accumulated(ratio: jax.Array, decay: jax.Array) -> jax.Array:
    """Return v[t] = decay * (v[t - 1] + ratio[t - 1]), with v[0] = 0."""

    def step(v: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return decay.astype(x.dtype) * (v + x), v

    return jax.lax.scan(step, jnp.zeros_like(ratio[0]), ratio)[1]


# What is refused --------------------------------------------------------------------


def _costs(x: ArrayLike, name: str, called: str) -> jax.Array:
    array = jnp.asarray(x)
    if jnp.iscomplexobj(array):
        instead = f"jnp.real({name})"
        raise wrong(TypeError, called, f"real {name}", type_of(array), instead)
    return array


def _together(cost: jax.Array, log: jax.Array) -> jnp.dtype:
    if not jnp.issubdtype(cost.dtype, jnp.floating):
        return log.dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(cost.dtype, log.dtype)


def _same_shape(
    cost: jax.Array, log: jax.Array, cost_name: str, log_name: str, called: str
) -> None:
    if cost.shape != log.shape:
        expected = f"{log_name} of the shape of {cost_name}, {type_of(cost)}"
        instead = f"{log_name}.sum(-1), one number for each cost"
        if log.ndim <= cost.ndim:
            instead = f"jnp.broadcast_to({log_name}, {cost.shape}), if it is of each"
        raise wrong(ValueError, called, expected, type_of(log), instead)


def _baseline(x: ArrayLike, cost: jax.Array, called: str) -> jax.Array:
    baseline = jax.lax.stop_gradient(_costs(x, "baseline", called))
    try:
        return jnp.broadcast_to(baseline.astype(cost.dtype), cost.shape)
    except ValueError:
        expected = f"a baseline that broadcasts to the costs, {type_of(cost)}"
        instead = "baseline.reshape(...), one number for each cost"
        came = type_of(baseline)
        raise wrong(ValueError, called, expected, came, instead) from None


def _fraction(x: ArrayLike, name: str, called: str) -> jax.Array:
    number = real_number(x, name, called)
    if number.ndim:
        came = type_of(number)
        raise wrong(ValueError, called, f"{name} is a scalar", came, f"{name}=0.99")
    # Of x: under jit jnp.asarray(0.5) is traced.
    if is_known(x) and not 0 <= np.asarray(x) <= 1:
        came = f"{name}={x}"
        expected = f"{name} is from 0 to 1"
        raise wrong(ValueError, called, expected, came, f"{name}=0.99")
    return number


def __dir__() -> list[str]:
    return __all__
