"""What `sg.var` refuses of parameters: calls that do not show what is handed over."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg

X = f32(0.5, 1.0)
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def refusal(fun, label, *args):
    address = sg.var(label)
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        sg.capture(fun, address)(*(args or (X,)))
    return str(caught.value)


def scaled(p, q=1.0):
    return jnp.sin(p) * q


def both(p, q):
    return jnp.sin(p) * q


def partial(x):
    return functools.partial(scaled, x * 2)(x * 3)


def partial_of_one(x):
    return functools.partial(scaled, q=x)(x * 2)


def tree_map(x):
    a, b = x * 2, x * 3
    return jax.tree.map(both, a, b)


def tree_map_with_a_default(x):
    a, b = x * 2, x * 3
    return jax.tree.map(lambda u, w=None: u if w is None else u * w, a, b)


def renamed(x):
    h = x * 2.0
    h = x
    return scaled(h)


def swapped(x):
    a, b = x * 2, x * 3
    a, b = b, a
    return both(a, b)


def reassigned_tree(batch):
    batch = {"u": batch["v"], "v": batch["u"]}
    return scaled(batch["u"]) + batch["v"]


def changed_by_a_wrapper(x):
    def wrapper(*args):
        return scaled(*[a * 2 for a in args])

    return wrapper(x * 2)


def unpacked(x):
    return scaled(*(x * 2,))


def twice(x):
    h = x * 2.0
    return both(h, h)


def handed_back(x):
    def same(p):
        jnp.sin(p).sum()
        return p

    h = x * 2.0
    return same(h) * 2.0


def not_read(x):
    def shape(p):
        return jnp.ones(p.shape, x.dtype) * x

    return shape(x * 2.0)


def reduced(x):
    return functools.reduce(lambda p, q: p * q, [x * 2, x * 3])


def default(x):
    return scaled(x * 2)


@pytest.mark.parametrize(
    ("fun", "labels", "message"),
    [
        (partial, ("scaled.p", "scaled.q"), "which argument it is"),
        (partial_of_one, ("scaled.p", "scaled.q"), "which argument it is"),
        (tree_map, ("both.p", "both.q"), "which argument it is"),
        (tree_map_with_a_default, ("u", "w"), "which argument it is"),
        (renamed, ("scaled.p",), "which value of h is handed over is not clear"),
        (swapped, ("both.p", "both.q"), "is handed over is not clear"),
        (changed_by_a_wrapper, ("scaled.p",), "does not show in the source"),
        (unpacked, ("scaled.p",), "does not show in the source"),
        (twice, ("both.p", "both.q"), "is handed over to both twice"),
        (handed_back, ("same.p",), "used after the call too"),
        (not_read, ("shape.p",), "no operation of the function reads it"),
        (reduced, ("q",), "not one array"),
        (default, ("scaled.q",), "it is its default"),
    ],
)
def test_calls_that_do_not_show_what_is_handed_over(fun, labels, message):
    for label in labels:
        said = refusal(fun, label)
        assert "a parameter: it must be clear which array" in said
        assert message in said


def test_a_part_of_an_argument_that_was_replaced():
    args = {"u": X, "v": 2 * X}
    assert "a parameter" in refusal(reassigned_tree, "scaled.p", args)


def test_a_parameter_of_the_traced_function_is_its_argument():
    f = lambda data: scaled(data * 2.0)
    message = refusal(f, "data")
    assert 'got:   "data", an argument of <lambda> itself\n  write: "data"' in message
    model = eqx.nn.MLP(2, 2, 2, 1, dtype=jnp.float32, key=jax.random.key(0))
    assert 'write: "x"' in refusal(lambda x: model(x), "x")


def test_two_functions_with_a_parameter_of_one_name():
    other = lambda x: scaled(x * 2) + both(x * 3, x)
    message = refusal(other, "p")
    assert 'write: sg.var("scaled.p")\n         sg.var("both.p")' in message
    found = sg.capture(other, sg.var("both.p"))(X)[1][sg.var("both.p")]
    np.testing.assert_allclose(found, 3 * X, rtol=1e-6)


class Objective:
    def __call__(self, params, data, scale=1.0):
        return jnp.sum((data * params) ** 2) * scale


def test_a_library_that_hands_on_more_than_its_args(tmp_path, monkeypatch):
    """`*args` of a solver begin with the second parameter of the user's function."""
    site = tmp_path / "solver_module.py"
    site.write_text(
        "def solver(fun):\n"
        "    def run(init, *args):\n"
        "        return fun(init * 2.0, *args)\n"
        "    return run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import solver_module

    labels = "stopgrad_jax._source.labels.LIBRARIES"
    monkeypatch.setattr(labels, (str(tmp_path) + "/",))
    for objective in (Objective(), lambda params, data: jnp.sum(data * params)):
        run = solver_module.solver(objective)
        for fun in (run, lambda x, y, run=run: run(x, y)):
            said = refusal(fun, "params", X, 3.0 * X)
            assert "a parameter" in said
            assert "a parameter" in refusal(fun, "data", X, 3.0 * X)
