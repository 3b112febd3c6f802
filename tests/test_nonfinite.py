"""`find_nonfinite`: planted bugs are located, healthy functions are not accused."""

import inspect
import traceback

import jax
import jax.numpy as jnp
import nonfinite_cases as cases
import numpy as np
import pytest
from as_printed import mended, remedy
from nonfinite_cases import HEALTHY, PLANTED
from programs import f32

import stopgrad_jax as sg

SOURCE = inspect.getsource(cases).splitlines()


def line_of(name):
    """Number of the line that is marked for a case."""
    marked = [
        number
        for number, text in enumerate(SOURCE, 1)
        if "# here" in text
        and name in text.split("# here ")[1].split(" (")[0].split(", ")
    ]
    assert len(marked) == 1
    return marked[0]


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_located(name, run):
    function, args, direction, primitives, steps = PLANTED[name]
    report = sg.find_nonfinite(run(function))(*args)
    assert report is not None
    assert report.file.endswith("nonfinite_cases.py")
    assert report.line == line_of(name)
    assert report.direction == direction
    assert report.primitive in primitives
    assert report.steps == steps
    assert report.step == (steps[-1] if steps else None)
    assert not np.all(np.isfinite(report.result))
    assert report.expression in SOURCE[report.line - 1]
    text = str(report)
    assert f"nonfinite_cases.py:{report.line} in {report.function}()" in text
    assert "^" * len(report.expression) in text
    assert "hint: " in text
    for step in steps:
        assert f"step {step}" in text


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_function_is_not_accused(name, run):
    function, args = HEALTHY[name]
    assert sg.find_nonfinite(run(function))(*args) is None


def test_debug_nans_does_not_name_the_line():
    """What one has today: US4 of the user stories."""
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        jax.jit(jax.grad(cases.us4))(jnp.ones(3))
    assert "safe_norm" not in "".join(traceback.format_exception(caught.value))


def test_us4_is_told_with_its_remedy():
    report = sg.find_nonfinite(jax.jit(cases.us4))(jnp.ones(3))
    assert report.function == "safe_norm"
    assert report.expression == "jnp.linalg.norm(x)"
    assert report.reaches == ("w",)
    assert [float(x) for x in report.operands] == [0.5, 0.0]
    assert "masks the value and not the derivative" in report.hint
    assert remedy(report) == (
        "jnp.where(x.sum() > 0, jnp.linalg.norm(jnp.where(x.sum() > 0, x, 1.0)), 0.0)",
        "jnp.where(x.sum() > 0, jnp.linalg.norm(x), 0.0)",
    )
    safe = mended(cases.safe_norm, report)
    assert jax.grad(safe)(jnp.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert jax.grad(safe)(f32(3.0, 4.0)).tolist() == pytest.approx([0.6, 0.8])


def test_the_remedy_of_a_mask_that_is_true_where_it_is_bad():
    def root(x):
        return jnp.where(x == 0, 0.0, jnp.sqrt(x))

    report = sg.find_nonfinite(root)(0.0)
    assert remedy(report)[0] == (
        "jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))"
    )
    safe = mended(root, report)
    assert [float(jax.grad(safe)(x)) for x in (0.0, 4.0)] == [0.0, 0.25]


@pytest.mark.parametrize("name", ["one_example", "one_example_backward"])
def test_the_example_of_a_vmap_is_told(name):
    function, args, *_ = PLANTED[name]
    report = sg.find_nonfinite(jax.jit(function))(*args)
    assert report.example == 2
    assert report.index[0] == 2
    assert "in example 2 of vmap" in str(report)


def test_the_shard_is_told():
    function, args, *_ = PLANTED["on_one_shard"]
    report = sg.find_nonfinite(function)(*args)
    assert report.index == (2, 0)
    assert report.operands[0].reshape(-1).tolist() == args[0].tolist()


def test_a_value_that_was_given_is_not_born_here():
    f = lambda params, x: jnp.sum(params["w"] * x)
    report = sg.find_nonfinite(f)({"w": f32(1.0, jnp.nan)}, f32(1.0, 1.0))
    assert (report.argument, report.entry) == ("params/w", (1,))
    assert report.reaches == ("return",)
    assert report.expression == 'params["w"] * x'
    first, others, *_, hint = str(report).splitlines()
    assert first.endswith("params/w[1] is nan when the function is called")
    assert others.strip() == "the only nonfinite entry of f32[2]"
    assert "nan is taken on here" in str(report)
    assert hint == "  hint: it came from outside: look at what made it"


def test_a_constant_that_is_nan():
    c = f32(1.0, jnp.nan)
    report = sg.find_nonfinite(lambda x: jnp.sum(x * c))(f32(1.0, 1.0))
    headline = str(report).splitlines()[0]
    assert headline == "nonfinite: return; c[1] is nan: a constant of the function"
    assert report.expression == "x * c"
    assert "nan is taken on here" in str(report)
    assert report.hint == ""  # the first line has said it all
    assert "hint" not in str(report)


def test_the_first_of_two_births_is_named():
    def f(x):
        a = jnp.log(x - 1.0)
        b = jnp.sqrt(x - 2.0)
        return b + a

    report = sg.find_nonfinite(f)(jnp.float32(1.0))
    assert report.expression == "jnp.log(x - 1.0)"


def test_only_what_reaches_the_result_counts():
    def f(x):
        harmless = jnp.sqrt(-x)
        harm = jnp.log(-x)
        return jnp.where(x > 0, harm, harmless)

    assert sg.find_nonfinite(f)(jnp.float32(1.0)).expression == "jnp.log(-x)"


def test_which_gradients_are_looked_at():
    f = lambda w, x: jnp.sum(w) * jnp.linalg.norm(x)
    args = jnp.ones(2), jnp.zeros(2)
    assert sg.find_nonfinite(f)(*args) is None
    report = sg.find_nonfinite(f, "x")(*args)
    assert report.reaches == ("x",)
    assert report.direction == "backward"
    assert sg.find_nonfinite(f, ())(*args) is None
    g = lambda x: {"loss": jnp.linalg.norm(x), "metric": jnp.sum(x)}
    assert sg.find_nonfinite(g)(jnp.zeros(2)) is None
    report = sg.find_nonfinite(g, ys="return/loss")(jnp.zeros(2))
    assert report.direction == "backward"


def test_outputs_have_addresses():
    g = lambda x: {"a": {"b": jnp.log(x)}, "c": x}
    assert sg.find_nonfinite(g)(0.0).reaches == ("return/a/b",)


def test_tracers_are_refused():
    with pytest.raises(TypeError) as caught:
        jax.jit(lambda x: sg.find_nonfinite(jnp.log)(x))(1.0)
    message = str(caught.value)
    assert "arrays whose values are known" in message
    assert "a traced f32[]" in message
    assert "write: the call outside of jax.jit" in message
    with pytest.raises(TypeError, match="arrays whose values are known"):
        sg.find_nonfinite(jnp.log)(jax.ShapeDtypeStruct((), jnp.float32))


def test_addresses_are_checked():
    f = lambda w: jnp.sum(sg.name(w, "h") ** 2)
    with pytest.raises(sg.AddressError, match='one of "w"'):
        sg.find_nonfinite(f, "ww")(1.0)
    with pytest.raises(TypeError, match="xs are arguments that carry a gradient"):
        sg.find_nonfinite(f, "h")(1.0)
    g = lambda w: (w, 2 * w)
    with pytest.raises(TypeError, match="must return one array, or ys must say which"):
        sg.find_nonfinite(g, "w")(1.0)


def test_the_page_of_a_report():
    def f(x):
        y = x - 1.0
        return jnp.log(y)

    report = sg.find_nonfinite(f)(jnp.float32(1.0))
    rows = str(report).splitlines()
    assert rows[0] == "nonfinite: return; inf is born forward, in log"
    assert rows[1].endswith(" in f()")
    assert rows[2].strip() == f"{report.line} | return jnp.log(y)"
    assert rows[3].split("|")[1] == "        ^^^^^^^^^^ inf here"
    assert rows[4] == "  log(0.0) = -inf"
    assert rows[5].startswith("  hint: the logarithm of zero is -inf; say what it is ")
    assert "<pre" in report._repr_html_()


def test_a_large_program_is_searched_only_as_far_as_needed():
    """A finite one runs once, compiled: no equation by itself."""
    ran = []

    def f(x):
        for _ in range(50):
            x = jnp.sin(x)
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum(x)

    assert sg.find_nonfinite(f)(jnp.ones(3)) is None
    jax.effects_barrier()
    assert len(ran) == 2  # forward, and with the backward pass


def test_operands_that_are_not_of_the_results_shape():
    report = sg.find_nonfinite(lambda x: jnp.sum(x @ x.T))(np.full((2, 3), f32(1e30)))
    assert (report.primitive, report.expression) == ("dot_general", "x @ x.T")
    assert "f32[2,3] from 1e+30 to 1e+30" in str(report)
