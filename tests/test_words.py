"""The sentences of `_words/` are true where they are said; each is said in a test."""

import ast
import pathlib
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

import stopgrad_jax as sg
from stopgrad_jax import _words
from stopgrad_jax._words import check, nonfinite
from stopgrad_jax._words import flow as words

pytestmark = pytest.mark.usefixtures("usual_settings")

TESTS = pathlib.Path(__file__).parent
SOURCES = sorted(pathlib.Path(_words.__file__).parent.glob("*.py"))
# They hold no sentence of their own: lists, and what stands around an expression.
NO_SENTENCE = {
    "Beats",
    "listed",
    "born",
    "HERE",
    "large_number",
    "_by_cause",
    "_quoted",
}


def f32(*values):
    return jnp.asarray(values, "float32")


def masked(x):
    return jnp.where(x > 0, x, -jnp.inf)


@jax.custom_vjp
def root(x):
    return jnp.sqrt(x)


root.defvjp(lambda x: (jnp.sqrt(x), jnp.sqrt(x)), lambda y, ct: (0.5 * ct / y,))


# Sentence: a program of which it is true, and one of which its neighbour is.
FORWARD = {
    nonfinite.LOG_OF_ZERO: (jnp.log, f32(1, 0)),
    nonfinite.LOG_OF_NEGATIVE: (jnp.log, f32(1, -1)),
    nonfinite.ZERO_BY_ZERO: (lambda x: x / x, f32(1, 0)),
    nonfinite.BY_ZERO.format(value="inf"): (lambda x: 2 / x, f32(1, 0)),
    nonfinite.BY_ZERO.format(value="nan"): (
        lambda x: jnp.real(2 / (x + 0j)),
        f32(1, 0),
    ),
    nonfinite.ROOT_OF_NEGATIVE: (jnp.sqrt, f32(1, -1)),
    nonfinite.ROOT_OF_ZERO: (jax.lax.rsqrt, f32(1, 0)),
    nonfinite.ALIKE: (lambda x: masked(x) - masked(2 * x), f32(1, 0)),
    nonfinite.UNLIKE: (lambda x: masked(x) + -masked(x), f32(1, 0)),
    nonfinite.ZERO_TIMES_INFINITY: (lambda x: x * masked(x), f32(1, 0)),
    nonfinite.REMAINDER: (lambda x: jax.lax.rem(x, 0 * x), f32(2)),
    nonfinite.SINGULAR.format(dtype="float32"): (
        jnp.linalg.inv,
        jnp.zeros((2, 2), "float32"),
    ),
    nonfinite.OVERFLOWS.format(dtype="float32"): (lambda x: x * x, f32(1, 1e30)),
    nonfinite.OVERFLOWS.format(dtype="float16"): (
        lambda x: x.astype("float16"),
        f32(1, 1e6),
    ),
    nonfinite.OTHER.format(name="acos", dtype="float32"): (jnp.arccos, f32(0, 2)),
    nonfinite.OTHER.format(name="sinh", dtype="float32"): (jnp.sinh, f32(0, 100)),
    nonfinite.SUBNORMAL.format(name="log", dtype="float32", tiny=1.18e-38): (
        jnp.log,
        f32(1, 1e-40),
    ),
    nonfinite.OTHER.format(name="lgamma", dtype="float32"): (jax.lax.lgamma, f32(1, 0)),
    # The largest finite logarithms are ln(2**128) and ln(2**16), but for one rounding.
    nonfinite.EXP.format(name="exp", dtype="float32", limit=88.72): (
        jnp.exp,
        f32(1, 89),
    ),
    nonfinite.EXP.format(name="exp", dtype="float16", limit=11.09): (
        jnp.exp,
        f32(1, 12).astype("float16"),
    ),
}
BACKWARD = {
    nonfinite.SLOPE: (jnp.sqrt, f32(1, 0)),
    nonfinite.ZERO_COMES_BACK: (lambda x: 0 * root(x), f32(1, 0)),
    nonfinite.BACK_OVERFLOWS.format(dtype="float32"): (
        lambda x: 1e-30 * x * 1e20 * 1e20,
        f32(1e-3),
    ),
}


def told(fun, x):
    """Sentences of a report, without its folding."""
    return " ".join(str(sg.find_nonfinite(lambda x: jnp.sum(fun(x)))(x)).split())


@pytest.mark.parametrize("words", FORWARD)
def test_of_a_forward_birth(words):
    fun, x = FORWARD[words]
    assert not jnp.all(jnp.isfinite(fun(x)))
    assert [w for w in FORWARD if w in told(fun, x)] == [words]


@pytest.mark.parametrize("words", BACKWARD)
def test_of_a_backward_birth(words):
    fun, x = BACKWARD[words]
    assert jnp.all(jnp.isfinite(fun(x)))
    assert not jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(fun(x)))(x)))
    report = told(fun, x)
    assert [w for w in BACKWARD if w in report] == [words]
    # Of a custom rule the line is that of its call.
    if words != nonfinite.ZERO_COMES_BACK:
        assert nonfinite.IN_DERIVATIVE.format(kind="inf") in report


def test_of_what_is_nonfinite_only_as_it_is_compiled():
    """A primitive that is another one when it is compiled: XLA need not be wrong."""
    unlike = jax.extend.core.Primitive("unlike")
    unlike.def_impl(lambda x: x)
    unlike.def_abstract_eval(lambda x: x)
    compiled = mlir.lower_fun(lambda x: x * jnp.inf, multiple_results=False)
    mlir.register_lowering(unlike, compiled)
    report = told(lambda x: unlike.bind(jax.lax.stop_gradient(x)) + x, f32(1))
    assert nonfinite.ONLY_COMPILED in report
    assert nonfinite.ONLY_COMPILED_HINT in report
    assert nonfinite.CALLED_BACK not in report


def deviation(w):
    """Of equal numbers: the root of a zero that XLA, fusing, makes a little more."""
    return jnp.std(w * jnp.ones(3))


@pytest.mark.parametrize("w", [2.0, 0.3])
def test_of_what_is_nonfinite_only_step_by_step(w):
    assert np.isnan(jax.grad(deviation)(w))
    if not np.isfinite(jax.jit(jax.grad(deviation))(w)):
        pytest.skip("this XLA, or with these settings, does not fuse so")
    report = sg.find_nonfinite(deviation)(w)
    assert nonfinite.BY_STEPS in " ".join(str(report).split())
    assert report.direction == "backward"
    assert report.expression == "jnp.std(w * jnp.ones(3))"
    assert sg.find_nonfinite(jax.jit(deviation))(w) is None
    both = told(lambda x: jnp.log(x), f32(0))  # so either way
    assert nonfinite.BY_STEPS not in both


@pytest.mark.parametrize("within", [lambda f: f, jax.jit, jax.checkpoint])
def test_of_a_callback_that_is_finite_the_second_time(within):
    calls = []

    def host(x):
        calls.append(x)
        return np.asarray(x) * np.float32(np.nan if len(calls) == 1 else 1)

    def fun(x):
        shape, fixed = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x)
        return jax.pure_callback(host, shape, fixed) * x

    report = told(within(fun), f32(1, 2))
    assert len(calls) > 1
    assert nonfinite.CALLED_BACK in report
    assert nonfinite.CALLED_BACK_HINT in report
    assert nonfinite.ONLY_COMPILED not in report


def test_of_numbers_in_the_digits_of_their_dtype():
    assert "mul(1e+30, 1e+30) = inf at [1]" in told(lambda x: x * x, f32(1, 1e30))
    log = told(lambda x: jnp.log(x.astype("bfloat16")), f32(1, -0.1))
    assert "log(-0.100098) = nan" in log  # -0.1 has eight bits there
    total = told(lambda x: jnp.sum(x), f32(3e38, 1e38))
    assert "reduce_sum([3e+38, 1e+38]) = inf" in total


def test_of_an_example_of_vmap():
    fun = jax.vmap(lambda v: jnp.log(v))
    assert nonfinite.example(1) in told(fun, f32(1, -1))
    assert "of vmap" not in told(jnp.log, f32(1, -1))


def test_of_an_input_that_carries_none_and_of_one_that_is_zero():
    flow = sg.flow(lambda n, x, y: jnp.sum(jnp.round(x) + y))(
        jnp.arange(2), f32(1), f32(2)
    )
    said = {path: " ".join(str(flow.explain(path)).split()) for path in "nxy"}
    zeros = words.ZEROS.format(path="x")
    straight = words.STRAIGHT_THROUGH.format(call="sg.straight_through(jnp.round)(x)")
    assert words.NO_FLOAT.format(kinds="int32") in said["n"]
    assert zeros in said["x"]
    assert straight in said["x"]
    assert "jax.grad returns" not in said["n"] + said["y"]
    grads = jax.grad(lambda x, y: jnp.sum(jnp.round(x) + y), (0, 1))(f32(1), f32(2))
    assert grads == (0.0, 1.0)
    # One that was put there on purpose asks for no straight-through.
    stopped = sg.flow(lambda x: jnp.sum(jax.lax.stop_gradient(x)))(f32(1))
    assert "straight-through" not in str(stopped.explain("x"))


@jax.custom_jvp
def twice(x):
    return 2 * x


twice.defjvp(lambda xs, ts: (2 * xs[0], 2.5 * ts[0]))


@pytest.mark.parametrize("results", [1, 2])
@pytest.mark.parametrize("entries", [2, 100])
def test_of_a_number_that_is_no_derivative_by_one_entry(entries, results):
    """Its direction and weights are in the error, and with them it is what it says."""
    fun = (lambda x: jnp.sum(twice(x))) if results == 1 else (lambda x: twice(x)[:2])
    x = jnp.ones(entries, "float32")
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(fun)(x)
    message = " ".join(str(caught.value).split())
    assert "is not the derivative of its function" in message
    assert (check.ALONG in message) == (entries > 8)
    assert (check.WEIGHED in message) == (results > 1)
    direction, weights = [1, 0], [1.0]
    if entries > 8:
        direction = caught.value.direction
    if results > 1:
        (weights,) = caught.value.weights
    pattern = r": ([-0-9.e]+) by differences, ([-0-9.e]+) by the rule"
    by, told = map(float, re.search(pattern, message).groups())
    total = (
        jnp.sum(jnp.asarray(direction))
        if results == 1
        else jnp.dot(jnp.asarray(direction)[:2], weights)
    )
    assert by == pytest.approx(2 * float(total), rel=1e-4)
    assert told == pytest.approx(2.5 * float(total), rel=1e-4)


def sentences():
    """Each name of the table, with what is between the braces of its templates."""
    for node in [x for f in SOURCES for x in ast.parse(f.read_text()).body]:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        if name is None or name in NO_SENTENCE:
            continue
        doc = ast.get_docstring(node, clean=False) if hasattr(node, "body") else None
        pieces = [text for text in texts(node) if text != doc]
        yield name, [b for text in pieces for b in re.split(r"\{[^}]*\}", text)]


def texts(tree):
    """Return the strings of a tree; those of formatted ones with braces between."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if hasattr(v, "value") else "" for v in node.values]
            yield "{}".join(part for part in parts if isinstance(part, str))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_each_sentence_is_said_in_a_test():
    """Three words of it in a row, in the string of a test; or its name, here."""
    written = [
        " ".join(text.split())
        for path in TESTS.rglob("*.py")
        for text in texts(ast.parse(path.read_text()))
    ]
    here = {
        node.attr
        for node in ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
        if isinstance(node, ast.Attribute)
    }
    everything = "\n".join(written)
    silent = []
    for name, pieces in sentences():
        runs = (piece.split() for piece in pieces if len(piece) > 7)
        threes = (run[k : k + 3] for run in runs for k in range(max(1, len(run) - 2)))
        if name not in here and not any(" ".join(t) in everything for t in threes):
            silent.append(name)
    assert silent == []
