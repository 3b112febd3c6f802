"""Of which function it is said that its derivative is zero: of one whose it is."""

import builtins
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = jnp.array([0.3, 1.2, -0.8], "float32")
part = functools.partial(jnp.round, decimals=1)
alias = jnp.modf
by_name = {"round": jnp.round, "modf": jnp.modf}
ndimage = jax.scipy.ndimage
GRID = jnp.arange(9.0, dtype="float32")


def divided(x):
    x //= 0.7
    return x


# The call, and what has to be said of it, or "" if only the oracle is asked.
CALLS = {
    "jnp.round": (lambda x: jnp.round(x), "round"),
    "jnp.round, decimals": (lambda x: jnp.round(x, 1), "round"),
    "jnp.round, named": (lambda x: jnp.round(x, decimals=-1), "round"),
    "jnp.rint": (lambda x: jnp.rint(x), "rint"),
    "jnp.around": (lambda x: jnp.around(x), "around"),
    "jnp.floor": (lambda x: jnp.floor(x), "floor"),
    "jnp.ceil": (lambda x: jnp.ceil(x), "ceil"),
    "jnp.sign": (lambda x: jnp.sign(x), "sign"),
    "jnp.trunc": (lambda x: jnp.trunc(x), "trunc"),
    "lax.round": (lambda x: jax.lax.round(x), "round"),
    "lax.floor": (lambda x: jax.lax.floor(x), "floor"),
    "lax.ceil": (lambda x: jax.lax.ceil(x), "ceil"),
    "lax.sign": (lambda x: jax.lax.sign(x), "sign"),
    "method": (lambda x: x.round(), "round"),
    "method, decimals": (lambda x: x.round(1), "round"),
    "builtin": (lambda x: round(x, 1), "round"),
    "//": (lambda x: x // 0.7, "x // 0.7"),
    "// of a number": (lambda x: 0.7 // x, "0.7 // x"),
    "// of both": (lambda x: x // x[::-1], "x // x[::-1]"),
    "//=": (divided, ""),
    "floor_divide": (lambda x: jnp.floor_divide(x, 0.7), "floor_divide"),
    "floordiv": (lambda x: operator.floordiv(x, 0.7), "floordiv"),
    "x.__floordiv__": (lambda x: x.__floordiv__(0.7), "round, in x.__floordiv__,"),
    "vmap": (lambda x: jax.vmap(jnp.round)(x), "round, in jax.vmap(jnp.round),"),
    "jit": (lambda x: jax.jit(jnp.sign)(x), "sign, in jax.jit(jnp.sign),"),
    "checkpoint": (lambda x: jax.checkpoint(jnp.floor)(x), ""),
    "tree.map": (lambda x: jax.tree.map(jnp.round, [x])[0], "round, in jax.tree.map,"),
    "lax.map": (lambda x: jax.lax.map(jnp.ceil, x), "ceil, in jax.lax.map,"),
    "partial": (lambda x: functools.partial(jnp.round, decimals=1)(x), ""),
    "partial, named": (lambda x: part(x), "round, in part,"),
    "alias": (lambda x: alias(x)[1], "floor and ceil, in alias,"),
    "subscript": (lambda x: by_name["round"](x), 'round, in by_name["round"],'),
    "subscript, modf": (lambda x: by_name["modf"](x)[1], ""),
    "getattr": (lambda x: getattr(jnp, "ro" + "und")(x), ""),
    "vectorize": (lambda x: jnp.vectorize(jnp.round)(x), ""),
    "along axis": (lambda x: jnp.apply_along_axis(jnp.round, 0, x), ""),
    "sum of map": (lambda x: sum(map(jnp.floor, [x, 2 * x])), "floor, in sum,"),
    "list of map": (lambda x: jnp.stack(list(map(jnp.floor, [x, x]))), ""),
    "cond": (lambda x: jax.lax.cond(True, jnp.round, jnp.floor, x), ""),
    "switch": (lambda x: jax.lax.switch(0, [jnp.round, jnp.floor], x), ""),
    "modf": (lambda x: jnp.modf(x)[1], "floor and ceil, in jnp.modf,"),
    "divmod": (lambda x: divmod(x, 0.7)[0], "round, in divmod,"),
    "jnp.divmod": (lambda x: jnp.divmod(0.7, x)[0], "round, in jnp.divmod,"),
    "order 0": (
        lambda x: ndimage.map_coordinates(GRID, [x], order=0),
        "round, in ndimage.map_coordinates,",
    ),
    "quantile": (lambda x: jnp.quantile(GRID, abs(x) / 2, method="nearest"), ""),
    "percentile": (lambda x: jnp.percentile(GRID, abs(x), method="lower"), ""),
    "gammasgn": (lambda x: jax.scipy.special.gammasgn(x), ""),
    "numpy": (lambda x: np.round(x), ""),
    "inside another": (lambda x: jnp.sin(jnp.round(x)), "round"),
}
SAID = re.compile(r"the derivative of (?P<names>.+?)(, in (?P<call>.+),)? is zero a")


def named(name):
    """The function that a name means to a reader, or the expression as one of x."""
    if not name.isidentifier():
        return lambda x: eval(name, {**globals(), "x": x})
    spaces = (jnp, operator, builtins)
    return next(getattr(space, name) for space in spaces if hasattr(space, name))


def slopes(fun):
    """The derivatives of a function by its one or two arguments, somewhere."""
    points = np.random.default_rng(0).normal(size=(5, 2, 3)).astype("float32")
    for pair in points:
        try:
            found = jax.jacobian(fun)(pair[0])
        except TypeError:
            found = jax.jacobian(fun, (0, 1))(*pair)
        yield from jax.tree.leaves(found)


def test_the_oracle_tells_names_apart():
    for name in ("round", "floor", "ceil", "sign", "trunc", "floor_divide", "x // 0.7"):
        assert not any(np.any(slope) for slope in slopes(named(name)))
    for name in ("modf", "divmod", "mod", "x % 0.7"):
        assert any(np.any(slope) for slope in slopes(named(name)))
    with pytest.raises(StopIteration):
        named("jit")


@pytest.mark.parametrize("name", CALLS)
def test_the_derivative_of_what_is_named_is_zero(name):
    call, expected = CALLS[name]
    loss = lambda x: jnp.sum(call(x))
    np.testing.assert_array_equal(jax.grad(loss)(X), jnp.zeros_like(X))
    (cut,) = (flow := sg.flow(loss)(X)).cuts
    assert cut.reason == "zero_derivative"
    said = SAID.match(cut.words)
    for one in re.split(" and |, ", said["names"]):
        assert not any(np.any(slope) for slope in slopes(named(one)))
    site = cut.inside or cut.site
    assert (said["call"] or "") in site.expr
    if expected:
        assert cut.words == f"the derivative of {expected} is zero almost everywhere"
    (step,) = [step for step in flow.steps if step.kind == "cut"]
    assert step.detail == cut.words.removesuffix(" almost everywhere")
    # Beside the expression the table says what is zero in it, if that is not all of it.
    brief = "derivative is zero" if not said["call"] else f"of {said['names']} is zero"
    assert brief in str(flow)


# Calls that return floats and read nothing but integers and booleans of what they get.
EXACT = {
    "one_hot": (
        lambda x: jax.nn.one_hot(x, 3),
        "only compared, in jax.nn.one_hot: bools come of it, which carry no gradient",
    ),
    "rankdata": (
        lambda x: jax.scipy.stats.rankdata(x),
        "sort, in jax.scipy.stats.rankdata, gives int32, which carries no gradient",
    ),
    "copysign": (
        lambda x: jnp.copysign(2.0, x),
        "bitcast_convert_type, in jnp.copysign, gives int32, which carries no gradient",
    ),
    "vmap": (
        lambda x: jax.vmap(jnp.argmax)(x[None]) * 1.0,
        "jax.vmap(jnp.argmax) returns int32, integers carry no gradient",
    ),
    "vmap, sampled": (
        lambda x: jax.vmap(jax.random.bernoulli)(KEYS, x) * 1.0,
        "sampled by jax.vmap(jax.random.bernoulli), and a sample has no derivative",
    ),
    "cast": (
        lambda x: jax.tree.map(lambda x: x.astype(int), [x])[0] * 1.0,
        "astype returns int32, integers carry no gradient",
    ),
}
KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.mark.filterwarnings("ignore:jax.nn.one_hot input")
@pytest.mark.parametrize("name", EXACT)
def test_what_returns_integers_or_bools(name):
    call, words = EXACT[name]
    (cut,) = sg.flow(lambda x: jnp.sum(call(jnp.sin(x))))(X).cuts
    assert cut.words == words


def test_a_rule_that_nothing_else_is_known_of():
    """It hands nothing on, and its function is the identity."""
    hiding = Primitive("hiding")
    hiding.def_impl(lambda x: x)
    hiding.def_abstract_eval(lambda x: x)
    ad.primitive_jvps[hiding] = lambda xs, ts: (hiding.bind(*xs), jnp.zeros_like(ts[0]))
    (cut,) = sg.flow(lambda x: jnp.sum(hiding.bind(x)))(X).cuts
    said = "the derivative rule of hiding, in hiding.bind, hands no gradient on"
    assert cut.words == said


def test_a_call_of_another_library_is_not_the_derivative_of_its_call():
    text = str(sg.flow(lambda x: jnp.sum(np.round(x)))(X))
    assert "derivative of round is zero (numpy/" in text
    assert "bound derivative" not in text
