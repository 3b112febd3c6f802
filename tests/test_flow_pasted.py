"""What `explain` says to write is pasted into the program, and does what it says."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

HEAD = """
import functools, operator
import jax, jax.numpy as jnp
import numpy as np
import stopgrad_jax as sg
part = functools.partial(jnp.round, decimals=1)
half = 2

"""
X = jnp.array([[0.3, 1.2], [-0.8, 2.6]], "float32")
SAID = re.compile(r"use a straight-through rule: (.+)\.$", re.MULTILINE)


@pytest.fixture
def load(tmp_path):
    """Import the function f of a text from a file."""
    count = iter(range(9))

    def imported(text):
        path = tmp_path / f"pasted_{next(count)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.f

    return imported


def pasted(text, site, call):
    """A text with a call in the place of the expression at a site."""
    lines = text.split("\n")
    before = [*lines[: site.line - 1], lines[site.line - 1][: site.col]]
    after = [lines[site.end_line - 1][site.end_col :], *lines[site.end_line :]]
    return "\n".join(before) + call + "\n".join(after)


def line(expression):
    return f"def f(x):\n    y = {expression}\n    return jnp.sin(y) * 2.0\n"


# A program, and what to write for the expression that ends its gradient.
WORKS = {
    "function": (line("jnp.round(3.3 * x)"), "sg.straight_through(jnp.round)(3.3 * x)"),
    "decimals": (line("jnp.round(x, 1)"), "sg.straight_through(jnp.round)(x, 1)"),
    "a keyword": (
        line("jnp.round(x, decimals=half)"),
        "sg.straight_through(jnp.round)(x, decimals=half)",
    ),
    "a variable": (
        "def f(x, n=1):\n    return jnp.round(x, n) * 3\n",
        "sg.straight_through(jnp.round)(x, n)",
    ),
    "lax": (line("jax.lax.sign(x)"), "sg.straight_through(jax.lax.sign)(x)"),
    "trunc": (line("jnp.trunc(x)"), "sg.straight_through(jnp.trunc)(x)"),
    "builtin": (line("round(x, 1)"), "sg.straight_through(round)(x, 1)"),
    "method": (line("x.round()"), "sg.straight_through(lambda x: x.round())(x)"),
    "method, decimals": (
        line("x.round(1)"),
        "sg.straight_through(lambda x: x.round(1))(x)",
    ),
    "method, keyword": (
        line("(2.0 * x).round(decimals=-1)"),
        "sg.straight_through(lambda x: x.round(decimals=-1))(2.0 * x)",
    ),
    "method of a part": (
        "def f(d):\n    return d['x'].T.round(1) * 3\n",
        "sg.straight_through(lambda x: x.round(1))(d['x'].T)",
    ),
    "//": (line("x // 0.7"), "sg.straight_through(lambda x: x // 0.7)(x)"),
    "// of a number": (line("0.7 // x"), "sg.straight_through(lambda x: 0.7 // x)(x)"),
    "// of a sum": (
        line("(x + x) // -2"),
        "sg.straight_through(lambda x: x // -2)(x + x)",
    ),
    "floor_divide": (
        line("jnp.floor_divide(x, 0.7)"),
        "sg.straight_through(jnp.floor_divide)(x, 0.7)",
    ),
    "floordiv": (
        line("operator.floordiv(0.7, x)"),
        "sg.straight_through(lambda x: operator.floordiv(0.7, x))(x)",
    ),
    "several lines": (
        line("jnp.floor(\n        x  # the codes\n        * 2,\n    )"),
        "sg.straight_through(jnp.floor)(x * 2)",
    ),
    "walrus": (
        "def f(x):\n    return jnp.ceil((y := 2 * x)) * y.size\n",
        "sg.straight_through(jnp.ceil)((y := (2 * x)))",
    ),
    "loop": (
        "def f(x):\n    for _ in range(3):\n        x = jnp.round(1.7 * x)\n"
        "    return x\n",
        "sg.straight_through(jnp.round)(1.7 * x)",
    ),
    "scan": (
        "def f(x):\n    def body(c, row):\n        return c + jnp.floor(row), None\n"
        "    return jax.lax.scan(body, jnp.zeros_like(x, shape=2), x)[0]\n",
        "sg.straight_through(jnp.floor)(row)",
    ),
    "jit and vmap": (
        "@jax.jit\n@jax.vmap\ndef f(x):\n    return jnp.sign(x) * 3\n",
        "sg.straight_through(jnp.sign)(x)",
    ),
    "imported inside": (
        "def f(x):\n    from jax import numpy as xp\n    return xp.round(x)\n",
        "sg.straight_through(xp.round)(x)",
    ),
}
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def sums(f):
    return lambda x: jnp.sum(f(x))


def given(name, dtype="float32"):
    x = X.astype(dtype)
    return {"x": x} if name == "method of a part" else x


def said(flow):
    return SAID.findall(str(flow.explain()))


@pytest.mark.parametrize("name", WORKS)
def test_it_works_where_it_is_pasted(name, load):
    body, expected = WORKS[name]
    f, x = load(HEAD + body), given(name)
    flow = sg.flow(f)(x)
    assert said(flow) == [expected]
    new = load(pasted(HEAD + body, flow.cuts[0].site, expected))
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            x = given(name, dtype)
            jax.tree.map(np.testing.assert_array_equal, f(x), new(x))
            assert jax.tree.leaves(new(x))[0].dtype == dtype
            slope = jax.grad(sums(new))(x)
            before = jax.grad(sums(f))(x)
            moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), slope, before)
            assert any(jax.tree.leaves(moved))


# No suggestion is known to work: the derivative is not only there zero, the call has
# another structure, what it would pass the gradient to is not known, or it is lost
# once more behind it.
NONE = {
    "modf": line("jnp.modf(x)[1]"),
    "divmod": line("divmod(x, 0.7)[0]"),
    "vmap": line("jax.vmap(jnp.round)(x)"),
    "tree.map": line("jax.tree.map(jnp.round, [x])[0]"),
    "partial": line("part(x)"),
    "partial of it": line("functools.partial(jnp.round, x)(1)"),
    "named as it": line("(round := functools.partial(jnp.round, x)) and round(1)"),
    "rounded again": line("jnp.sign(jnp.round(x))"),
    "floored behind": "def f(x):\n    h = jnp.floor(x)\n    return jnp.ceil(h) * 2\n",
    "compared": line("jnp.where(jnp.round(x) > 0, 1.0, 2.0)"),
    "cast behind": line("jnp.round(x).astype(int) * 1.0"),
    "// of both": line("x // x"),
    "a method or a function": "def f(x, n=1):\n    return x.round(n) * 2\n",
    "numpy": line("np.round(x)"),
    "integers": line("jnp.argsort(x) * 1.0"),
    "of integers too": "def f(x):\n    n = jnp.int32(x[0, 0])\n"
    "    a, b = [jnp.sign(v) for v in (x, n)]\n    return a * 2 + b\n",
    "stars": line("jnp.round(*[x])"),
    "two stars": line("jnp.round(x, **{})"),
    "x //= 2": "def f(x):\n    x //= 2.0\n    return x * 2\n",
}


@pytest.mark.parametrize("name", NONE)
def test_none_is_said_where_none_is_known(name, load):
    flow = sg.flow(f := load(HEAD + NONE[name]))(X)
    assert flow.inputs[0].status == "cut"
    assert not np.any(jax.grad(sums(f))(X))
    assert flow.cuts
    assert "straight" not in str(flow.explain())


def test_it_is_said_of_the_input_that_it_serves(load):
    """Two inputs are rounded on one line, and one of them is lost once more."""
    text = HEAD + (
        "def f(x, y):\n    a, b = [jnp.round(v) for v in (x, y)]\n"
        "    return a + jnp.floor(b)\n"
    )
    flow = sg.flow(f := load(text))(X, X)
    call = "sg.straight_through(jnp.round)(v)"
    assert SAID.findall(str(flow.explain("x"))) == [call]
    assert SAID.findall(str(flow.explain("y"))) == []
    new = load(pasted(text, flow.cuts[0].site, call))
    np.testing.assert_array_equal(f(X, X), new(X, X))
    grads = jax.grad(lambda x, y: jnp.sum(new(x, y)), (0, 1))(X, X)
    np.testing.assert_array_equal(grads[0], jnp.ones_like(X))
    np.testing.assert_array_equal(grads[1], jnp.zeros_like(X))


def test_each_of_two_is_said(load):
    text = HEAD + "def f(x):\n    a = jnp.round(x)\n    return a + x.round(1)\n"
    flow = sg.flow(load(text))(X)
    for cut, call in zip(flow.cuts, said(flow), strict=True):
        new = load(pasted(text, cut.site, call))
        np.testing.assert_array_equal(jax.grad(sums(new))(X), jnp.ones_like(X))
