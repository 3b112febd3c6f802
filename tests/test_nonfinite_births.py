"""`find_nonfinite` tells where what is nonfinite comes from, and what hides it."""

import inspect
import re

import jax
import jax.numpy as jnp
import nonfinite_births as births
import numpy as np
import pytest
from nonfinite_births import CONTEXTS

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    return births.written(tmp_path_factory.mktemp("births"))


def line_of(function, mark):
    """Number of the line of a function that is marked."""
    lines, first = inspect.getsourcelines(function)
    marked = [k for k, line in enumerate(lines) if mark in line.partition("#")[2]]
    assert len(marked) == 1
    return first + marked[0]


HEADLINES = {
    "argument": r"(x\[|xs\[2, )1\] is nan when the function is called",
    "infinite argument": r"(x\[|xs\[2, )1\] is inf when the function is called",
    "constant": r"(CONSTANT\[1\] is nan: a constant of the function"
    # under a custom rule the function that reads it is not among the calls
    r"|a constant of the function, an f32\[3\], is nan at \[1\])",
    "forward": "inf is born forward, in log",
    "forward nan": "nan is born forward, in div",
    "backward": "inf is born backward, in div",
}


@pytest.mark.parametrize(("birth", "hiding", "context"), births.table())
def test_births(birth, hiding, context, functions):
    function = getattr(functions, births.name_of(birth, hiding))
    around, args = CONTEXTS[context](function), births.arguments(birth, context)
    assert not np.isfinite(jax.grad(around)(*args))  # it is planted
    is_seen = not np.isfinite(jax.jit(around)(*args))
    report = sg.find_nonfinite(around)(*args)
    text = str(report)

    assert report.reaches == (("return",) if is_seen else ("w",))
    assert report.direction == ("backward" if birth == "backward" else "forward")
    headline = text.splitlines()[0].partition("; ")[2]
    assert re.fullmatch(HEADLINES[birth], headline)
    many = context in ("scan", "vmap")
    if "argument" in birth:
        assert report.argument == ("xs" if many else "x")
        assert report.entry == ((2, 1) if many else (1,))
    else:
        assert (report.argument, report.entry) == ("", ())
    if birth != "constant":  # which is nan in each step and example
        assert report.steps == ((2,) if context == "scan" else ())
        assert report.example == (2 if context == "vmap" else None)

    mark = "born"
    if birth == "infinite argument" and hiding in births.TURNS:
        mark = "hides"
    places = {name: (function, name) for name in ("born", "factor", "hides")}
    if context == "custom_jvp" and not is_seen:  # all that JAX has is the call
        places = dict.fromkeys(places, (around, "call"))
    # The derivative of what uses it later takes it on first, where that is opened.
    later = hiding == "used before" and birth == "infinite argument"
    allowed = {line_of(*places[mark])}
    if later or (hiding == "used before" and context in ("jit", "scan", "cond")):
        allowed.add(line_of(*places["hides"]))
    assert report.line in allowed
    assert f":{report.line} in " in text
    assert report.expression in text

    is_told = not is_seen and birth != "backward"
    factor = re.search(r"a factor of the gradient of w in .* \(.*:(\d+)\)", text)
    assert bool(factor) == is_told
    if factor:
        assert int(factor[1]) == line_of(*places["factor"])
    hidden = re.search(r"hidden from the value by .* \(.*:(\d+)\)", text)
    if hiding == "mask of zeros":  # XLA makes a selection of it, in some contexts
        return
    assert bool(hidden) == is_told
    if hidden:
        allowed = {line_of(*places["hides"])}
        assert int(hidden[1]) in allowed
        assert report.hidden_by.endswith(f":{hidden[1]}")


# What is no bug -----------------------------------------------------------------------


def masked_scores(w, x):
    causal = jnp.tril(jnp.ones((3, 3), bool))
    scores = jnp.where(causal, w * x[:, None] * x, -jnp.inf)
    return jnp.sum(jax.nn.softmax(scores, axis=-1) @ x)


def additive_bias(w, x):
    bias = jnp.where(x > 1.5, 0.0, -jnp.inf)
    return jnp.sum(jax.nn.softmax(w * x + bias) * x)


def double_where(w, x):
    keep = x > 1.5
    safe = jnp.where(keep, x - 1.0, 1.0)
    return jnp.sum(jnp.where(keep, w * jnp.log(safe), 0.0))


def masked_data(w, x):
    y = jnp.where(x > 1.5, x / (x - 1.0), jnp.nan)
    return jnp.sum(w * jnp.where(jnp.isnan(y), 0.0, y))


def running_maximum(w, x):
    step = lambda largest, x: (jnp.maximum(largest, w * x), None)
    return lax_scan(step, -jnp.inf, x)


def lax_scan(step, start, x):
    return jax.lax.scan(step, jnp.float32(start), x)[0]


def logits_of_allowed(w, x):
    logits = jnp.where(x > 1.5, w * x, -jnp.inf)
    return jnp.max(jax.nn.log_softmax(logits)) + jax.nn.logsumexp(logits)


HEALTHY = [
    *(masked_scores, additive_bias, double_where, masked_data, running_maximum),
    logits_of_allowed,
]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("function", HEALTHY, ids=lambda f: f.__name__)
def test_an_infinity_on_purpose_is_no_report(function, context):
    around = CONTEXTS[context](function)
    args = births.arguments("constant", context)[0], births.FINE
    if context in ("scan", "vmap"):
        args = args[0], jnp.stack([births.FINE, births.FINE])
    assert np.isfinite(jax.grad(around)(*args))
    assert sg.find_nonfinite(around)(*args) is None
