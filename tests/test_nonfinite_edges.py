"""`find_nonfinite` where the function raises, on many devices, and at a prompt."""

import logging
import pathlib
import re
import traceback
import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, io_callback
from jax.interpreters import mlir
from programs import f32, mesh

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

DEVICES = jax.sharding.PartitionSpec("d")


# A function that raises by itself -----------------------------------------------------


class GaveUp(Exception):
    pass


def solver(x):
    if np.any(x > 1):
        raise GaveUp(f"no solution for {float(x)}")
    return np.float32(x)


FLOAT = jax.ShapeDtypeStruct((), jnp.float32)


def pure(x):
    return x * jax.pure_callback(solver, FLOAT, jax.lax.stop_gradient(x))


def impure(x):
    return x * io_callback(solver, FLOAT, jax.lax.stop_gradient(x))


def debugged(x):
    jax.debug.callback(solver, x)
    return x * x


def in_a_scan(x):
    def step(total, k):
        jax.debug.callback(solver, total * k)
        return total + k, None

    return jax.lax.scan(step, x, jnp.arange(4.0))[0]


def checked(x):
    def inner(x):
        checkify.check(x < 1.0, "x is too large")
        return x * x

    error, y = checkify.checkify(inner)(x)
    checkify.check_error(error)
    return y


def by_equinox(x):
    eqx = pytest.importorskip("equinox")
    return eqx.error_if(x, x > 1.0, "x is too large") ** 2


RAISING = {
    pure: ("GaveUp: no solution for 2.0", "jax.pure_callback("),
    impure: ("GaveUp: no solution for 2.0", "io_callback("),
    debugged: ("GaveUp: no solution for 2.0", "jax.debug.callback("),
    in_a_scan: ("GaveUp: no solution for 2.0", "jax.debug.callback("),
    checked: ("x is too large", "checkify.check_error("),
    by_equinox: ("x is too large", "eqx.error_if("),
}


@pytest.mark.parametrize("function", RAISING, ids=lambda f: f.__name__)
def test_a_function_that_raises_is_told_with_its_line(function, run, caplog):
    message, call = RAISING[function]
    code = pathlib.Path(__file__).read_text().splitlines()
    first = function.__code__.co_firstlineno
    line = next(k for k, text in enumerate(code, 1) if k > first and call in text)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError) as caught:
        sg.find_nonfinite(run(function))(jnp.float32(2.0))
    text = str(caught.value)
    assert "the function must run to its end: it raised by itself" in text
    assert message in text
    assert re.search(
        rf"at .*test_nonfinite_edges\.py:{line}, in {re.escape(call)}", text
    )
    assert "write: the call without find_nonfinite" in text
    assert "Traceback" not in text
    assert caplog.text == ""
    shown = "".join(traceback.format_exception(caught.value))
    assert str(pathlib.Path(sg.__file__).parent) not in shown


# JAX itself does not stage `checkify.check_error`.
STAGED = [function for function in RAISING if function is not checked]


@pytest.mark.parametrize("function", STAGED, ids=lambda f: f.__name__)
def test_the_same_function_where_it_does_not_raise(function):
    x = -4.0 if function is in_a_scan else 0.5
    assert sg.find_nonfinite(function)(jnp.float32(x)) is None


@jax.custom_vjp
def guarded(x):
    return x


def stop_at_infinity(g):
    if not np.all(np.isfinite(g)):
        raise GaveUp("the gradient is infinite")
    return g


def guard_backward(_, g):
    shape = jax.ShapeDtypeStruct(g.shape, g.dtype)
    return (jax.pure_callback(stop_at_infinity, shape, g),)


guarded.defvjp(lambda x: (x, None), guard_backward)


def guarded_root(x):
    return jnp.sqrt(guarded(x))


def guarded_steps(x):
    return jax.lax.scan(lambda c, _: (jnp.sqrt(guarded(c)), None), x, length=2)[0]


@pytest.mark.parametrize("function", [guarded_root, guarded_steps])
@pytest.mark.parametrize("changed", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_gradient_that_raises_is_not_said_to_be_the_function(function, changed):
    function = changed(function)
    with pytest.raises(RuntimeError) as caught:
        sg.find_nonfinite(function)(jnp.float32(0.0))
    text = str(caught.value)
    assert "the gradient must run to its end: it raised by itself" in text
    assert "GaveUp: the gradient is infinite" in text
    assert "in guarded(" in text
    assert "write: the gradient without find_nonfinite" in text
    with pytest.raises(jax.errors.JaxRuntimeError, match="the gradient is infinite"):
        jax.block_until_ready(jax.grad(function)(jnp.float32(0.0)))
    assert sg.find_nonfinite(function, xs=())(jnp.float32(0.0)) is None
    assert sg.find_nonfinite(function)(jnp.float32(1.0)) is None


# Many devices -------------------------------------------------------------------------


def layers(n, wrong):
    """Layers on eight devices, with a wrong line after them."""

    def loss(w, x):
        for k in range(n):
            x = jnp.tanh(x @ w[k])
        return jax.lax.pmean(wrong(x), "i")

    step = jax.pmap(loss, axis_name="i", in_axes=(None, 0))
    return lambda w, x: jnp.sum(step(w, x))


def log_of_zero(x):
    return jnp.log(jnp.sum(x) - jnp.sum(x))


@pytest.fixture
def compiled():
    """What is compiled during a test."""
    found = []

    def listener(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
    jax.monitoring.unregister_event_duration_listener(listener)


def test_the_work_under_pmap_does_not_grow_with_the_layers(compiled):
    x, counts = jnp.ones((8, 4)), []
    for n in (1, 3, 9):
        w = 0.3 * jnp.ones((n, 4, 4))
        function = layers(n, log_of_zero)
        jax.clear_caches()
        compiled.clear()
        report = sg.find_nonfinite(function)(w, x)
        assert report.expression == "jnp.log(jnp.sum(x) - jnp.sum(x))"
        counts.append(len(compiled))
    assert counts[0] > 0
    assert max(counts) <= counts[0] + 2


def test_an_infinite_argument_under_pmap_is_named():
    w = (0.3 * jnp.ones((3, 4, 4))).at[1, 2, 0].set(jnp.inf)
    x = jnp.ones((8, 4)).at[5].set(0.0)  # tanh(0) * inf: nan on one device
    report = sg.find_nonfinite(layers(3, jnp.sum))(w, x)
    assert (report.argument, report.entry) == ("w", (1, 2, 0))
    assert report.expression == "x @ w[k]"
    assert "inf turns to nan here" in str(report)


def scanned(x):
    return jax.lax.scan(lambda c, t: (c, c * t), x, jnp.ones(3))[1][-1]


def scanned_collective(x):
    step = lambda c, t: (c + jax.lax.psum(c, "d"), c * t)
    return jax.lax.scan(step, x, jnp.ones(3))[1][-1]


def branched(x):
    return jax.lax.cond(x[0] > -1, jax.checkpoint(scanned), jnp.cos, x)


def looped(x):
    choose = lambda i, c: jax.lax.cond(i > 1, jnp.sin, jnp.cos, c)
    return jax.lax.map(lambda t: t * jax.lax.fori_loop(0, 3, choose, x), x)[1]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inner", [scanned, scanned_collective, branched, looped])
def test_a_loop_in_a_shard_map_is_gone_back_through(inner, check_vma):
    """What one equation of a shard gives is no shard, whatever its type says."""

    def local(x):
        y = inner(x) * 0.0
        return jnp.sqrt(y**2)

    shards = {"mesh": mesh(2), "in_specs": DEVICES, "out_specs": DEVICES}
    run = jax.shard_map(local, check_vma=check_vma, **shards)
    report = sg.find_nonfinite(lambda x: jnp.sum(run(x)))(jnp.ones(4))
    assert (report.direction, report.primitive) == ("backward", "div")
    assert report.expression == "jnp.sqrt(y**2)"
    # The derivative of a root is half by the root, that of a power is finite.
    assert [float(np.ravel(x)[0]) for x in report.operands] == [0.5, 0.0]


# At a prompt --------------------------------------------------------------------------


class Printer:
    """What IPython hands to `_repr_pretty_`, as far as it is used."""

    def __init__(self):
        self.output = ""

    def text(self, text):
        self.output += text


def test_a_prompt_shows_what_print_gives():
    report = sg.find_nonfinite(jnp.log)(0.0)
    printer = Printer()
    report._repr_pretty_(printer, False)
    assert printer.output == str(report) == repr(report)
    assert printer.output.startswith("nonfinite: return; inf is born forward, in log")


def test_the_prompt_of_ipython_itself():
    pretty = pytest.importorskip("IPython.lib.pretty")
    report = sg.find_nonfinite(jnp.log)(0.0)
    assert pretty.pretty(report) == str(report)


# Constants without a variable ---------------------------------------------------------


def test_a_constant_that_no_variable_holds():
    holder = types.SimpleNamespace(table=f32(1.0, jnp.inf))
    report = sg.find_nonfinite(lambda x: jnp.sum(x * holder.table))(f32(1.0, 1.0))
    headline = str(report).splitlines()[0]
    assert headline.endswith("a constant of the function, an f32[2], is inf at [1]")


def test_a_number_that_is_written_out():
    report = sg.find_nonfinite(lambda x: x * jnp.nan)(1.0)
    headline = str(report).splitlines()[0]
    assert headline == "nonfinite: return; a constant of the function is nan"
    assert report.expression == "x * jnp.nan"


SCALE = np.float32(np.inf)


def test_a_number_that_a_variable_holds():
    report = sg.find_nonfinite(lambda x: x * SCALE)(1.0)
    headline = str(report).splitlines()[0]
    assert headline == "nonfinite: return; SCALE is inf: a constant of the function"


@pytest.mark.parametrize(
    ("inner", "argument", "example"),
    [
        (lambda x: jnp.linalg.solve(x, jnp.ones((2, 3))), (2, 2), None),
        (lambda x: jnp.apply_along_axis(jnp.log, 0, x), (3, 2), None),
        (jnp.vectorize(jnp.log, signature="(n)->(n)"), (3, 2), None),
        (jax.vmap(jnp.log), (3, 2), 0),
        (jax.vmap(lambda x: jnp.linalg.solve(x, jnp.ones((2, 3)))), (3, 2, 2), 0),
    ],
    ids=["solve", "apply_along_axis", "vectorize", "vmap", "vmap of solve"],
)
def test_no_example_of_a_vmap_that_jax_wrote(inner, argument, example):
    """JAX maps over columns and rows itself; those are no examples of the user's."""
    report = sg.find_nonfinite(lambda x: jnp.sum(inner(x)))(jnp.zeros(argument))
    assert report.example == example
    assert ("of vmap" in str(report)) == (example is not None)


# An operation that runs only in a compiled program ------------------------------------


def compiled_only(x):
    """A primitive without a rule to be run by itself."""
    alone = jax.extend.core.Primitive("alone")
    alone.def_abstract_eval(lambda x: x)
    mlir.register_lowering(alone, mlir.lower_fun(jnp.sin, multiple_results=False))
    return alone.bind(x)


def test_it_is_opened_no_further_or_named():
    inside = jax.jit(lambda x: jnp.log(0.0 * compiled_only(x)))
    report = sg.find_nonfinite(inside, xs=())(1.0)
    assert report.direction == "forward"
    assert report.primitive == "jit"
    with pytest.raises(RuntimeError) as caught:
        sg.find_nonfinite(lambda x: jnp.log(0.0 * compiled_only(x)), xs=())(1.0)
    message = str(caught.value)
    assert ": operations that can be run one by one" in message
    assert "got: alone raised by itself" in " ".join(message.split())
    assert "write: the function in jax.jit, which is then looked at as one" in message
