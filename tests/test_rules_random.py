"""Random programs with other people's rules: no verdict contradicts the numbers.

`STOPGRAD_EXAMPLES=5000 pytest tests/test_rules_random.py` tries as many.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

COUNT = int(os.environ.get("STOPGRAD_EXAMPLES", "40"))
SymbolicZero = jax.custom_derivatives.SymbolicZero

# Rules of one or two vectors of three; right, but for what they leave out -------------


def constant(rng):
    """Make a constant of some kind, of three numbers or one."""
    kind = rng.integers(5)
    numbers = rng.uniform(0.5, 1.5, 3).astype(np.float32)
    if kind == 0:
        return jnp.asarray(numbers)
    if kind == 1:
        return numbers
    if kind == 2:
        return np.float32(numbers[0])
    return jnp.float32(numbers[0]) if kind == 3 else float(numbers[0])


def vjp_of_one(rng):
    c = constant(rng)

    @jax.custom_vjp
    def f(x):
        return jnp.sin(x) * c

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (ct * jnp.cos(x) * c,))
    return f, 1


def vjp_of_two(rng):
    c, leaves_out = constant(rng), rng.random() < 0.4

    @jax.custom_vjp
    def f(x, y):
        return x * y + c * x

    def backward(residuals, ct):
        x, y = residuals
        return ct * (y + c), None if leaves_out else ct * x

    f.defvjp(lambda x, y: (f(x, y), (x, y)), backward)
    return f, 2


def vjp_symbolic(rng):
    c, strict = constant(rng), rng.random() < 0.3

    @jax.custom_vjp
    def f(x, y):
        return jnp.cos(x) * y * c

    def forward(x, y):
        if strict and y.perturbed:
            raise TypeError("y must not be differentiated")
        return f(x.value, y.value), (x.value, y.value)

    def backward(residuals, ct):
        x, y = residuals
        if type(ct) is SymbolicZero:
            return jnp.zeros_like(x), jnp.zeros_like(y)
        return -jnp.sin(x) * y * c * ct, jnp.cos(x) * c * ct

    f.defvjp(forward, backward, symbolic_zeros=True)
    return f, 2


def vjp_of_several_results(rng):
    strict = rng.random() < 0.3

    @jax.custom_vjp
    def f(x, y):
        return x * y, x + 2.0 * y

    def backward(residuals, cts):
        x, y = residuals
        zero = [type(ct) is SymbolicZero for ct in cts]
        if strict and not all(zero) and not zero[1]:
            raise TypeError("the second result must not be differentiated")
        a, b = (jnp.zeros_like(x) if z else ct for z, ct in zip(zero, cts, strict=True))
        return a * y + b, a * x + 2.0 * b

    f.defvjp(
        lambda x, y: (f(x.value, y.value), (x.value, y.value)),
        backward,
        symbolic_zeros=True,
    )
    which = int(rng.integers(3))

    def call(x, y):
        a, b = f(x, y)
        return (a, a + 0.5 * jax.lax.stop_gradient(b), a + 0.5 * b)[which]

    return call, 2


def vjp_nondiff(rng):
    scale = tuple(map(float, rng.uniform(0.5, 1.5, 3)))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def f(x, scale):
        return jnp.tanh(x) * jnp.asarray(scale)

    f.defvjp(
        lambda x, scale: (f(x, scale), x),
        lambda scale, x, ct: (ct * (1 - jnp.tanh(x) ** 2) * jnp.asarray(scale),),
    )
    return lambda x: f(x, scale), 1


def jvp_of_two(rng):
    c, leaves_out = constant(rng), rng.random() < 0.4

    @jax.custom_jvp
    def f(x, y):
        return jnp.exp(0.3 * x) * y * c

    def rule(primals, tangents):
        (x, y), (x_dot, y_dot) = primals, tangents
        slope = jnp.exp(0.3 * x) * c
        out_dot = 0.3 * slope * y * x_dot
        return f(x, y), out_dot if leaves_out else out_dot + slope * y_dot

    f.defjvp(rule)
    return f, 2


def jvp_symbolic(rng):
    c = constant(rng)

    @jax.custom_jvp
    def f(x, y):
        return x * y * c

    def rule(primals, tangents):
        (x, y), (x_dot, y_dot) = primals, tangents
        out_dot = SymbolicZero(jax.typeof(x * y * c))
        parts = [
            dot * factor * c
            for dot, factor in ((x_dot, y), (y_dot, x))
            if type(dot) is not SymbolicZero
        ]
        return f(x, y), sum(parts[1:], parts[0]) if parts else out_dot

    f.defjvp(rule, symbolic_zeros=True)
    return f, 2


def straight_through(rng):
    return sg.straight_through(jnp.round), 1


def with_backward(rng):
    c = constant(rng)
    f = sg.with_backward(
        lambda x, y: x * y * c, lambda ct, out, x, y: (ct * y * c, None)
    )
    return f, 2


RULES = [
    vjp_of_one,
    vjp_of_two,
    vjp_symbolic,
    vjp_of_several_results,
    vjp_nondiff,
    jvp_of_two,
    jvp_symbolic,
    straight_through,
    with_backward,
]

# Plain operations; the second half passes no gradient --------------------------------

PLAIN = [
    (lambda x: jnp.sin(x) + 0.5, 1),
    (lambda x, y: x * y, 2),
    (lambda x, y: 0.7 * x + y, 2),
    (lambda x: jnp.cumsum(x) * 0.5, 1),
    (lambda x: jax.nn.softplus(x), 1),
    (lambda x: jax.lax.stop_gradient(x) + 0.3, 1),
    (lambda x: jnp.round(x * 3.0) * 0.1 + 0.2, 1),
    (lambda x: (x > 0.2).astype(jnp.float32) + 0.1, 1),
    (lambda x: x.astype(jnp.int32).astype(jnp.float32) + 0.4, 1),
]

SCOPES = ["jvp(f)", "transpose(jvp(f))", "vmap(x)", "with_backward", "jit(g)", "block"]


def scanned(f, rng):
    def loop(x):
        step = lambda c, k: (0.5 * f(c) + 0.1 * k, c * 0.1)
        carry, ys = jax.lax.scan(step, x, jnp.arange(2.0))
        return carry + jnp.sum(ys, 0)

    return loop


def branched(f, rng):
    def branch(x):
        return jax.lax.cond(jnp.sum(x) > -9.0, f, lambda x: x * 0.2, x)

    return branch


def scoped(f, rng):
    name = SCOPES[rng.integers(len(SCOPES))]

    def inside(x):
        with jax.named_scope(name):
            return f(x)

    return inside


CONTEXTS = [
    lambda f, rng: jax.jit(f),
    lambda f, rng: jax.checkpoint(f),
    lambda f, rng: lambda x: jax.vmap(f)(jnp.stack([x, 0.5 * x])).sum(0),
    scanned,
    branched,
    scoped,
]


def program(seed):
    """Make a function of three vectors out of a seed."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(rng.integers(4, 9)):
        make = rng.integers(3)
        if make == 0:
            f, arity = PLAIN[rng.integers(len(PLAIN))]
        else:
            f, arity = RULES[rng.integers(len(RULES))](rng)
        if make == 2:
            other = int(rng.integers(3))  # an argument that the inside closes over
            steps.append(("context", wrapped(f, arity, rng), [other]))
        else:
            steps.append(("call", f, [int(rng.integers(99)) for _ in range(arity)]))
    ends = [int(rng.integers(99)) for _ in range(2)]

    def run(a, b, c):
        pool = [a, b, c]
        for kind, f, which in steps:
            if kind == "call":
                operands = [pool[k % len(pool)] for k in which]
                pool.append(f(*operands))
            else:
                pool.append(f(pool[-1], pool[which[0]]))
        middle = sg.name(pool[-1] * 1.0, "h")
        return jnp.sum(middle) + sum(jnp.sum(pool[k % len(pool)]) for k in ends)

    return run


def wrapped(f, arity, rng):
    contexts = [
        CONTEXTS[rng.integers(len(CONTEXTS))] for _ in range(rng.integers(1, 3))
    ]

    def call(x, y):
        inner = f if arity == 1 else lambda x: f(x, y)
        for context in contexts:
            inner = context(inner, np.random.default_rng(0))
        return inner(x)

    return call


# What must agree ----------------------------------------------------------------------


def points():
    rng = np.random.default_rng(7)
    draw = lambda end: jnp.asarray(rng.uniform(0.3, end, 3), jnp.float32)
    # The last are wide, since what is rounded may be 0 at all of the near ones.
    return [tuple(draw(end) for _ in range(3)) for end in (1.2, 1.2, 1.2, 9.0, 9.0)]


def gradients_of(seed):
    """Return for each argument what `jax.grad` returns, or the error it raises.

    The program is made anew for each: where a rule has raised, JAX keeps what makes
    it fail again.
    """
    traced, found = {}, {}
    for k in range(3):
        try:
            traced[k] = jax.make_jaxpr(jax.grad(program(seed), k))(*points()[0])
        except Exception as error:
            found[k] = error

    @jax.jit  # of all of them, since compiling takes most of the time
    def run(*args):
        return {k: jaxpr_as_fun(jaxpr)(*args)[0] for k, jaxpr in traced.items()}

    grads = [run(*point) for point in points()]
    numbers = {k: [each[k] for each in grads] for k in traced}
    return {k: found[k] if k in found else numbers[k] for k in range(3)}


def is_zero(grads):
    return all((np.asarray(g) == 0).all() for g in grads)


def run_of(verbs, seed):
    """Compile all verbs as one, which takes less time, of seven programs in eight."""

    def run(*args):
        try:
            return jax.jit(verbs)(*args)
        except TypeError as error:
            if "No constant handler" not in str(error):
                raise
            return verbs(*args)  # where rules close over, jitted `jax.grad` fails so

    return verbs if seed % 8 == 0 else run


@pytest.mark.parametrize("seed", range(COUNT))
def test_no_verdict_contradicts_the_numbers(seed):
    f, args = program(seed), points()[0]
    flow = sg.flow(program(seed))(*args)
    status = {row.path: row.status for row in flow.inputs}
    every = dict(zip("abc", gradients_of(seed).values(), strict=True))
    raised = {n: g for n, g in every.items() if isinstance(g, Exception)}
    for name in raised:
        assert status[name] == "unknown", raised[name]
        assert "jax.grad raises" in str(flow.explain(name))
    names = [name for name in every if name not in raised]
    zeros = [name for name in names if is_zero(every[name])]
    for name in names:
        assert status[name] in (("cut", "unused") if name in zeros else ("flows",))
        check = sg.assert_no_gradient if name in zeros else sg.assert_gradient
        check(program(seed), name, args=args)
    # Of what ends it is said where.
    told = {name for cut in flow.cuts for name in cut.inputs}
    assert {name for name in zeros if status[name] == "cut"} <= told
    flowing = [name for name in names if name not in zeros]

    def verbs(*args):
        found = sg.gradients(program(seed), names)(*args) if names else []
        stats = sg.gradient_stats(program(seed), flowing)(*args) if flowing else {}
        captured = sg.capture(program(seed), "h")(*args)
        edited = sg.edit(program(seed), {"h": lambda h: h * 1.5})(*args)
        return f(*args), found, stats, captured, edited

    value, found, stats, (out, named), edited = run_of(verbs, seed)(*args)
    for name, grad in zip(names, found, strict=True):
        assert (grad is None) == (name in zeros)
        if grad is not None:
            np.testing.assert_allclose(grad, every[name][0], rtol=2e-4, atol=1e-5)
            norm = jnp.linalg.norm(every[name][0])
            np.testing.assert_allclose(stats[name].norm, norm, rtol=1e-4)
    np.testing.assert_allclose(out, value, rtol=1e-5)
    np.testing.assert_allclose(edited, value + 0.5 * named["h"].sum(), rtol=1e-4)
