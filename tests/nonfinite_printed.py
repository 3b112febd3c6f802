"""Functions for which an edit is easily printed that is not right as it is printed."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from programs import f32

# What is written is not the array that is read ---------------------------------------


class Normal:
    def __init__(self, scale):
        self.scale = scale

    def entropy(self):
        return 0.5 + jnp.log(self.scale)

    def power(self, k):
        return self.scale**0.5 * k

    def norm(self, *, axis):
        return jnp.linalg.norm(self.scale, axis=axis)

    def __getitem__(self, name):
        return jnp.sqrt(self.scale)

    def __neg__(self):
        return -jnp.sqrt(self.scale)

    def __truediv__(self, other):
        return jnp.sqrt(self.scale) * other.scale


def of_an_object(x):
    return jnp.sum(jnp.where(x > 0, Normal(x).entropy(), 0.0))


def of_a_number(x):
    normal, k = Normal(x), 2
    return jnp.sum(jnp.where(x > 0, normal.power(k), 0.0))


def of_a_key(x):
    values, key = {"a": x}, "a"

    def get(key):
        return jnp.log(values[key])

    return jnp.sum(jnp.where(x > 0, get(key), 0.0))


def of_a_function(x):
    def go(fn):
        return fn(x)

    return jnp.sum(jnp.where(x > 0, go(jnp.sqrt), 0.0))


def of_an_item(x):
    normal = Normal(x)
    return jnp.sum(jnp.where(x > 0, normal["sqrt"], 0.0))


def of_a_sign(x):
    normal = Normal(x)
    return jnp.sum(jnp.where(x > 0, -normal, 0.0))


def of_an_operator(x):
    normal = Normal(x)
    return jnp.sum(jnp.where(x > 0, normal / normal, 0.0))


def of_an_axis(x):
    normal, ax = Normal(x[:, None]), -1
    return jnp.sum(jnp.where(x != 0, normal.norm(axis=ax), 0.0))


def of_a_partial(x):
    raised, k = functools.partial(jnp.power, x), 0.5
    return jnp.sum(jnp.where(x > 0, raised(k), 0.0))


def of_a_jitted_closure(x):
    k = 2.0
    root = jax.jit(lambda k: jnp.sqrt(x) * k)
    return jnp.sum(jnp.where(x > 0, root(k), 0.0))


def of_a_list(x):
    parts = [x]
    return jnp.sum(jnp.where(x > 0, jnp.stack(parts)[0] ** 0.5, 0.0))


FOREIGN = [
    of_an_object,
    of_a_number,
    of_a_key,
    of_a_function,
    of_an_item,
    of_a_sign,
    of_an_operator,
    of_an_axis,
    of_a_partial,
    of_a_jitted_closure,
]

# The array has a second name, or is read by a helper as well --------------------------


def by_a_key(x):
    params = {"w": x}
    w = params["w"]
    return jnp.sum(jnp.where(w > 0, jnp.log(w) / params["w"], 0.0))


def by_a_second_name(x):
    y = x
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x) * jnp.sqrt(y), 0.0))


def by_a_cast_that_does_nothing(x):
    x32 = x.astype(jnp.float32)
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x) * jnp.sqrt(x32), 0.0))


def by_a_method(x):
    normal = Normal(x)
    w = normal.scale
    return jnp.sum(jnp.where(w > 0, jnp.sqrt(w) + normal.entropy(), 0.0))


def by_a_helper(x):
    def inv():
        return 1 / x

    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x) * inv(), 0.0))


def by_two_targets(x):
    a, b = x, x
    return jnp.sum(jnp.where(a > 0, a**0.5 / b**0.5, 0.0))


def by_a_name_in_a_helper(x):
    def ratio(v):
        u = v
        return jnp.sqrt(v) / jnp.sqrt(u)

    return jnp.sum(jnp.where(x > 0, ratio(x) * jnp.sqrt(x), 0.0))


SECOND_NAME = [
    by_a_key,
    by_a_second_name,
    by_a_cast_that_does_nothing,
    by_a_method,
    by_a_helper,
    by_two_targets,
    by_a_name_in_a_helper,
]

# What is written has an effect --------------------------------------------------------


class Counter:
    def __init__(self):
        self.count = 0

    def scaled(self, x):
        self.count += 1
        return x * self.count


def by_a_generator(x):
    it = (v for v in (x[0], x[1]))
    return jnp.log(sum(it))


def by_next(x):
    it = itertools.cycle((x[0] + x[1], x[0] + 2 * x[1]))
    return jnp.log(next(it))


def by_pop(x):
    parts = [x[0], x[0] + x[1]]
    return jnp.sqrt(parts.pop() - 0.5) + parts.pop()


def by_a_counter(x):
    counter = Counter()
    return jnp.sum(jnp.log(counter.scaled(x)))


def by_a_divisor_that_is_popped(x):
    parts = {"a": x[0] + 1.0, "b": x[1]}
    return parts["a"] / parts["b"] / parts.pop("b")


EFFECTS = [by_a_generator, by_next, by_pop, by_a_counter, by_a_divisor_that_is_popped]

# Another reader of what is masked -----------------------------------------------------


def under_two_conditions(x):
    z = jnp.sqrt(x)
    return jnp.sum(jnp.where(x > 1, z, 0.0) + jnp.where(x > 0, z, 0.0))


def on_both_sides(x):
    r = 1 / x
    return jnp.sum(jnp.where(x > 0, r, 0) + jnp.where(x < 0, 2 * r, 0))


def near_zero(x):
    z = 1.0 / x
    near = jnp.sum(jnp.where(jnp.abs(x) > 0.9, z, 0.0))
    return near + jnp.sum(jnp.where(x != 0, z, 0.0) ** 2)


def rounded(x):
    y = jnp.sqrt(x)
    return jnp.sum(jnp.where(x > 1, y, 0.0)) + jnp.sum(jnp.round(y))


def by_a_returned_one(x):
    y = jnp.sqrt(x)
    return jnp.sum(jnp.where(x > 1, y, 0.0)) + jnp.sum(lax.stop_gradient(y))


def in_an_item(x):
    y = jnp.sqrt(x)
    kept = {"y": y}
    return jnp.sum(jnp.where(x > 1, y, 0.0)) + jnp.sum(jnp.floor(kept["y"]))


def by_its_norm(x):
    return jnp.sum(jnp.where(x > 0, x / jnp.linalg.norm(x), 0.0))


def through_a_sum(x):
    total = jnp.cumsum(jnp.sqrt(jnp.abs(x)))
    return jnp.sum(jnp.where(x > 0, total, 0.0))


# Other entries read what is masked.
MIXED = [(by_its_norm, f32(0.0, 0.0)), (through_a_sum, f32(2.0, 0.0))]

SECOND_READER = [
    under_two_conditions,
    on_both_sides,
    near_zero,
    rounded,
    by_a_returned_one,
    in_an_item,
]


def in_a_branch(x, train=True):
    y = jnp.sqrt(x)
    if train:
        return jnp.sum(jnp.where(x > 1, y, 0.0))
    return jnp.sum(y)


def by_another_name_in_a_branch(x, train=True):
    y = jnp.sqrt(x)
    z = y * 2.0
    return jnp.sum(jnp.where(x > 1, z, 0.0) if train else z)


BRANCHES = [in_a_branch, by_another_name_in_a_branch]

# An infinity that is looked for -------------------------------------------------------

ROWS = jnp.array([[True, True, True], [False, False, False]])
SOME = jnp.array([[True, True, False], [False, True, False]])


def by_isneginf(x, m):
    s = jnp.where(m, x, -jnp.inf)
    return jnp.sum(jax.nn.softmax(s, -1) * x) + jnp.sum(jnp.isneginf(s))


def by_a_comparison(x, m):
    s = jnp.where(m, x, -jnp.inf)
    lse = jax.nn.logsumexp(s, -1)
    return jnp.sum(jax.nn.softmax(s, -1) * x) + jnp.sum(lse > -jnp.inf)


def in_a_helper(x, m):
    def kept(scores):
        return jnp.sum(jnp.where(scores == -jnp.inf, 0.0, 1.0))

    s = jnp.where(m, x, -jnp.inf) * 0.5
    return jnp.sum(jax.nn.softmax(s, -1) * x) + jax.jit(kept)(s)


def by_nan_to_num(x, m):
    s = jnp.where(m, x, -jnp.inf)
    return jnp.sum(jax.nn.softmax(s, -1)) + jnp.sum(jnp.nan_to_num(s, neginf=0.0))


LOOKED_FOR = [by_isneginf, by_a_comparison, in_a_helper, by_nan_to_num]


def counted_after_it(x, m):
    s = jnp.where(m, x, -jnp.inf)
    w = jax.nn.softmax(s, -1)
    return jnp.sum(w * x) + jnp.sum(w > 0)


def beside_a_threshold(x, m):
    s = jnp.where(m, x, -jnp.inf)
    return jnp.sum(jax.nn.softmax(s, -1) * x) + jnp.sum(s > 0.5)


NOT_LOOKED_FOR = [counted_after_it, beside_a_threshold]


def online_softmax(x, m):
    def step(carry, row):
        most, total = carry
        s = jnp.where(row[1], row[0], -jnp.inf)
        new = jnp.maximum(most, s.max())
        total = total * jnp.exp(most - new) + jnp.sum(jnp.exp(s - new))
        return (new, total), None

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    (most, total), _ = lax.scan(step, start, (x, m))
    return most + jnp.log(total)


# These are still mended ---------------------------------------------------------------


def an_argument_of_two(x):
    def quotient(a, b):
        return a / b

    return jnp.sum(jnp.where(x != 0, quotient(1.0, x), 0.0))


def a_square(x):
    return jnp.sum(jnp.where(x > 0, x**x, 0.0))


def a_shape(x):
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(x) / x.shape[0], 0.0))


MENDED = [an_argument_of_two, a_square, a_shape]
ZERO, OTHER = f32(0.0, 2.0), f32(0.7, 3.0)
