"""The call that a table says to make next works as it is printed."""

import pickle
import re

import jax
import jax.numpy as jnp
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = jnp.array([0.3, 1.2, -0.8], "float32")
NEXT = re.compile(r"next: (flow\.explain\(.*\)), flow\.source\(\)")
stop = jax.lax.stop_gradient


@jax.jit
def encode(a):
    h = jnp.sin(a)
    return h * 2


def model(params, x, scale=1.0):
    h = encode(x)
    h = sg.name({"a": h, "b": stop(jnp.sin(h * params["w"]))}, "code")
    total = 0.0
    for w in (params["w"], stop(params["odd"]['say "h"'])):
        total = total + jnp.sum(w * h["a"])
    return scale * (total + stop(jnp.cos(h["b"])).sum())


PARAMS = {"w": X, "odd": {'say "h"': X, "a/b": X, "c*": X}}
LINE = model.__code__.co_firstlineno + 1

# What the flow is asked about, and the address that is printed; None: any that works.
ASKED = {
    "nothing": (None, None),
    "an argument": ("x", '"x"'),
    "its position": (1, '"1"'),
    "a part": ("params/w", '"params/w"'),
    "a part with quotes in its name": ('params/odd/say "h"', "'params/odd/say \"h\"'"),
    "a part with a slash in its name": ("params/odd/a/b", None),
    "a part with a star in its name": ("params/odd/c*", None),
    "a pattern": ("params/**/*h*", None),
    "several": (["params", "x"], None),
    "a point's name": ("code", '"code"'),
    "a point": (sg.point("code"), 'sg.point("code")'),
    "a pattern of points": ("cod*", '"cod*"'),
    "a variable": (sg.var("total", nth=-1), 'sg.var("total", nth=-1)'),
    "a qualified variable": (sg.var("encode.h"), 'sg.var("encode.h")'),
    "a qualified variable's name": ("encode.h", 'sg.var("encode.h")'),
    "with a line": (sg.var("h", line=LINE), f'sg.var("h", line={LINE})'),
    "with a number": (sg.var("model.h", nth=0), 'sg.var("model.h", nth=0)'),
    "an operation": (sg.op("sin"), 'sg.op("sin")'),
    "operations": (sg.op(("sin", "cos")), 'sg.op(("sin", "cos"))'),
    "within": (sg.op("sin", within="encode"), 'sg.op("sin", within="encode")'),
    "one": (sg.op("sin", nth=-1), 'sg.op("sin", nth=-1)'),
    "some": (sg.op("sin", nth=slice(0, 1)), 'sg.op("sin", nth=slice(0, 1))'),
    "mixed": ([sg.op("sin"), sg.var("encode.h"), "x"], None),
}


def printed(flow):
    return NEXT.search(str(flow))[1]


@pytest.mark.parametrize("name", ASKED)
def test_the_printed_call_works(name):
    xs, expected = ASKED[name]
    flow = sg.flow(model, xs=xs)(PARAMS, X)
    call = printed(flow)
    if expected is not None:
        assert call == f"flow.explain({expected})"
    page = eval(call, {"flow": flow, "sg": sg})
    verdicts = [line for line in str(flow.explain()).split("\n") if "): " in line]
    assert any(line in str(page) for line in verdicts)
    assert all(line in verdicts for line in str(page).split("\n") if "): " in line)
    # The same of one that was stored, and of the name of each row that is one thing.
    stored = pickle.loads(pickle.dumps(flow))
    assert str(stored) == str(flow)
    assert str(eval(call, {"flow": stored, "sg": sg})) == str(page)


@pytest.mark.parametrize(
    "xs", [sg.op("cos"), sg.var("encode.h"), sg.var("model.h", nth=0)]
)
def test_a_row_answers_to_its_name(xs):
    flow = sg.flow(model, xs=xs)(PARAMS, X)
    paths = {row.path for row in flow.inputs if row.status != "data"}
    for path in paths:
        page = flow.explain(path)
        assert any(line.startswith(f"{path} (") for line in str(page).split("\n"))
        assert str(flow.focus(path)) == str(page)
        assert flow.connected(path) == any(
            row.status == "flows" for row in flow.inputs if row.path == path
        )


def test_a_row_that_is_a_part_of_its_address_is_asked_for_by_that():
    flow = sg.flow(model, xs=sg.op("sin"))(PARAMS, X)
    first, second = (row for row in flow.inputs if row.status != "data")
    assert (first.status, second.status) == ("flows", "cut")
    for path in (first.path, second.path):
        with pytest.raises(sg.AddressError):
            flow.connected(path)
    nth = [flow.connected(sg.op("sin", nth=k)) for k in (0, 1)]
    assert nth == [True, False]


def test_a_name_of_two_rows_is_refused_with_both():
    flow = sg.flow(model, xs=[sg.var("encode.h"), sg.var("model.h", nth=0)])(PARAMS, X)
    with pytest.raises(sg.AddressError) as caught:
        flow.focus("h")
    assert 'sg.var("encode.h")' in str(caught.value)
    for row in (sg.var("encode.h"), sg.var("model.h", nth=0)):
        assert str(flow.explain(row)) in str(flow.explain()) + "\n"


def test_what_is_no_row_is_refused_with_what_to_write():
    flow = sg.flow(model)(PARAMS, X)
    with pytest.raises(sg.AddressError) as caught:
        flow.focus("sin")
    write = str(caught.value).partition("write: ")[2]
    assert write == 'sg.op("sin")'
    assert str(flow.focus(eval(write))) == str(flow.explain(sg.op("sin")))


def test_an_argument_and_a_point_of_one_name():
    def f(x, y):
        return jnp.sum(sg.name(stop(x) * y, "x"))

    flow = sg.flow(f)(X, X)
    assert printed(flow) == 'flow.explain("0")'
    assert "gradient is exactly zero" in str(eval(printed(flow), {"flow": flow}))
    assert str(pickle.loads(pickle.dumps(flow)).explain("0")) == str(flow.explain("0"))


def test_arguments_that_are_called_as_the_pages_of_a_stored_flow_are():
    def f(text, source):
        return jnp.sum(stop(text) * source)

    flow = sg.flow(f)(X, X)
    stored = pickle.loads(pickle.dumps(flow))
    assert str(stored) == str(flow)
    for name in ("text", "source"):
        assert str(stored.explain(name)) == str(flow.explain(name))
