"""Functions with a planted nan or inf, and healthy ones that look as if they had one.

The line that a report must name ends with `# here`, or `# here KEY` for its case.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from programs import f32, mesh


def safe_norm(x):
    return jnp.where(x.sum() > 0, jnp.linalg.norm(x), 0.0)  # here us4


def us4(w):
    return (jnp.tanh(w) * safe_norm(0.0 * w)).sum()


def masked_log(x):
    logs = jnp.log(x)  # here masked_log
    return jnp.sum(jnp.where(x > 0, logs, 0.0))


def overflow_in_scan(w, xs):
    def step(carry, x):
        grown = jnp.exp(carry * x)  # here overflow_in_scan
        return carry + 1.0, grown / (1.0 + grown)

    return jnp.sum(lax.scan(step, w, xs)[1])


def backward_in_scan(w, xs):
    def step(carry, x):
        root = jnp.sqrt(carry * x)  # here backward_in_scan
        return root + 1.0, root

    return jnp.sum(lax.scan(step, w, xs)[1])


def in_branch(x):
    def reciprocal(x):
        return jnp.sum(1.0 / (x - x))  # here in_branch

    return lax.cond(x > 0, reciprocal, lambda x: x, x)


def in_remat(x):
    @jax.checkpoint
    def block(x):
        return jnp.sin(x) * jnp.arccos(x)  # here in_remat

    return jnp.sum(block(x))


def one_example(w, xs):
    def example(x):
        return jnp.log(jnp.sum(w * x))  # here one_example

    return jnp.sum(jax.vmap(example)(xs))


def one_example_backward(w, xs):
    def example(x):
        return jnp.linalg.norm(w * x)  # here one_example_backward

    return jnp.mean(jax.vmap(example)(xs))


def _shard(x):
    logs = jnp.log(x)  # here on_one_shard, on_one_shard_unchecked
    return lax.psum(jnp.sum(logs), "d")


def on_one_shard(x):
    return jax.shard_map(_shard, mesh=mesh(), in_specs=P("d"), out_specs=P())(x)


def on_one_shard_unchecked(x):
    specs = {"in_specs": P("d"), "out_specs": P(), "check_vma": False}
    return jax.shard_map(_shard, mesh=mesh(), **specs)(x)


def zero_over_zero(x):
    scale = jnp.max(jnp.abs(x))
    unit = x / scale  # here zero_over_zero
    return jnp.sum(jnp.clip(unit, -1.0, 1.0))


def whole_row_masked(scores, mask):
    masked = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(masked)  # here whole_row_masked
    return jnp.sum(weights * scores)


def in_while(x):
    def body(carry):
        i, x = carry
        return i + 1, 1.0 / (3.0 - i) + x  # here in_while

    return lax.while_loop(lambda c: c[0] < 6.0, body, (0.0, x))[1]


def half_precision(x):
    squares = x.astype(jnp.float16) ** 2  # here half_precision
    return jnp.mean(squares).astype(jnp.float32)


def training_step(w, x):
    """Takes its gradient itself."""

    def loss(w):
        distance = jnp.sqrt(jnp.sum((w - x) ** 2))  # here training_step
        return distance

    return optax.apply_updates(w, jax.grad(loss)(w))


def custom(x):
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, ct: (ct / x,))
    return jnp.sum(root(x))  # here custom (JAX gives a rule the line of the call)


def nested_scans(x):
    def outer(carry, i):
        def inner(carry, j):
            return carry + 1.0 / (10 * i + j - 21.0), None  # here nested_scans

        return lax.scan(inner, carry, jnp.arange(3.0))[0], None

    return lax.scan(outer, x, jnp.arange(4.0))[0]


# name: (function, arguments, direction, primitives it may be in, step or steps)
PLANTED = {
    "us4": (us4, (jnp.ones(3),), "backward", {"div"}, ()),
    "masked_log": (masked_log, (f32(0.0, 1.0),), "backward", {"div"}, ()),
    "overflow_in_scan": (
        overflow_in_scan,
        (jnp.float32(1.0), f32(1.0, 2.0, 40.0, 1.0)),
        "forward",
        {"exp"},
        (2,),
    ),
    "backward_in_scan": (
        backward_in_scan,
        (jnp.float32(1.0), f32(1.0, 2.0, 0.0, 1.0)),
        "backward",
        {"div"},
        (2,),
    ),
    "in_branch": (in_branch, (jnp.float32(2.0),), "forward", {"div"}, ()),
    "in_remat": (in_remat, (f32(0.5, 1.0),), "backward", {"rsqrt", "div"}, ()),
    "one_example": (
        one_example,
        (jnp.ones(2), f32(1, 1, 2, 1, 3, -3, 1, 2).reshape(4, 2)),
        "forward",
        {"log"},
        (),
    ),
    "one_example_backward": (
        one_example_backward,
        (jnp.ones(2), f32(1, 1, 2, 1, 0, 0, 1, 2).reshape(4, 2)),
        "backward",
        {"div"},
        (),
    ),
    "on_one_shard": (
        on_one_shard,
        (f32(1, 2, 3, 4, -5, 6, 7, 8),),
        "forward",
        {"log"},
        (),
    ),
    "on_one_shard_unchecked": (
        on_one_shard_unchecked,
        (f32(1, 2, 3, 4, -5, 6, 7, 8),),
        "forward",
        {"log"},
        (),
    ),
    "zero_over_zero": (zero_over_zero, (jnp.zeros(3),), "forward", {"div"}, ()),
    "whole_row_masked": (
        whole_row_masked,
        (jnp.ones((2, 3)), jnp.array([[True, True, False], [False] * 3])),
        "forward",
        {"sub"},
        (),
    ),
    "in_while": (in_while, (jnp.float32(0.0),), "forward", {"div"}, (3,)),
    "half_precision": (
        half_precision,
        (f32(1.0, 300.0),),
        "forward",
        {"integer_pow", "square"},
        (),
    ),
    "training_step": (
        training_step,
        (jnp.ones(2), jnp.ones(2)),
        "backward",
        {"div"},
        (),
    ),
    "custom": (custom, (f32(0.0, 1.0),), "backward", {"div"}, ()),
    "nested_scans": (nested_scans, (jnp.float32(0.0),), "forward", {"div"}, (2, 1)),
}


def _masked_outside(x):
    return jnp.sum(jnp.where(x > 0, jnp.log(x), 0.0))


def _double_where(x):
    safe = jnp.where(x > 0, x, 1.0)
    return jnp.sum(jnp.where(x > 0, jnp.log(safe), 0.0))


def _unused_nan(x):
    return jnp.sum(x), jnp.log(-jnp.ones(2))[0] > 0


def _overwritten(x):
    return jnp.sum(jnp.log(x).at[0].set(0.0) * f32(0.0, 1.0))


def _masked_attention(q, k):
    scores = jnp.where(jnp.tri(3, dtype=bool), q @ k.T, -jnp.inf)
    return jnp.sum(jax.nn.softmax(scores, axis=-1) @ k)


def _minimum_of_infinity(x):
    return jnp.min(jnp.where(x > 0, x, jnp.inf))


def _logsumexp(x):
    return jax.nn.logsumexp(1000.0 * x)


def _nan_in_a_scan_that_is_dropped(x):
    def step(carry, x):
        return jnp.where(x > 0, carry * jnp.sqrt(x), carry), None

    return lax.stop_gradient(lax.scan(step, 1.0, x)[0]) + jnp.sum(x)


def _gradient_of_data_is_nan(w, x):
    return jnp.sum(w) * jnp.linalg.norm(x)  # nobody differentiates by x


def _branch_not_taken(x):
    return lax.cond(x > 0, jnp.sqrt, lambda x: x, x)


def _nansum(x):
    return jnp.nansum(jnp.array([jnp.nan, 1.0]) + 0.0) * jnp.sum(x)


def _training_step(w, x):
    loss = lambda w: jnp.mean(jnp.square(jax.nn.relu(w * x) - 1.0))
    updates, _ = optax.adam(0.1).update(jax.grad(loss)(w), optax.adam(0.1).init(w))
    return optax.apply_updates(w, updates)


HEALTHY = {
    "masked outside, forward": (lambda x: _masked_outside(x) > 0, (f32(0.0, 1.0),)),
    "double where": (_double_where, (f32(0.0, 1.0),)),
    "unused nan": (_unused_nan, (f32(1.0, 2.0),)),
    "overwritten": (lambda x: _overwritten(x) > 0, (f32(0.0, 1.0),)),
    "masked attention": (_masked_attention, (jnp.ones((3, 2)), jnp.ones((3, 2)))),
    "minimum of infinity": (_minimum_of_infinity, (f32(1.0, -1.0),)),
    "logsumexp": (_logsumexp, (f32(1.0, 2.0),)),
    "dropped in a scan": (_nan_in_a_scan_that_is_dropped, (f32(0.0, 1.0),)),
    "gradient of data": (_gradient_of_data_is_nan, (jnp.ones(2), jnp.zeros(2))),
    "branch not taken": (_branch_not_taken, (jnp.float32(-1.0),)),
    "nansum": (_nansum, (jnp.ones(2),)),
    "training step": (_training_step, (jnp.ones(2), f32(-1.0, 0.0))),
    "integers": (lambda n: n * 2, (3,)),
}
