"""One value, one address: patterns by name, and paths that mean two places."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

PARAMS = {"w": jnp.float32([3.0, 0.0]), "b": jnp.float32([0.0, 4.0])}


def loss(p, x):
    return jnp.sum(sg.name(p["w"] * 1.0, "h") * x) + jnp.sum(p["b"] * x)


X = jnp.float32([1.0, 1.0])


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("*", {"p", "x", "h"}),
        ("**", {"p", "x", "h"}),
        ("p/*", {"p/w", "p/b"}),
        ("**/w", {"p/w"}),
        ("*/b", {"p/b"}),
        ("*/*", {"p/w", "p/b"}),
    ],
)
def test_a_pattern_names_each_value_once(pattern, keys):
    assert set(sg.gradients(loss, pattern)(PARAMS, X)) == keys
    assert set(sg.gradient_stats(loss, pattern)(PARAMS, X)) == {
        leaf for key in keys for leaf in ({"p/w", "p/b"} if key == "p" else {key})
    }


def test_a_global_norm_by_a_pattern_is_that_of_the_tree():
    def squares(p):
        return 0.5 * sum(jnp.sum(x**2) for x in p.values())

    for pattern in ("*", "**/*", "p/*"):
        leaves = jax.tree.leaves(sg.gradients(squares, pattern)(PARAMS))
        assert jnp.sqrt(sum(jnp.sum(x**2) for x in leaves)) == 5.0


def test_an_edit_by_a_pattern_acts_once():
    f = lambda a, b: a * b + 1.0
    assert sg.edit(f, {"*": lambda x: 2.0 * x})(3.0, 4.0) == 49.0
    assert sg.edit(f, {"return*": lambda x: 2.0 * x})(3.0, 4.0) == 26.0


def test_positions_where_there_is_no_name():
    f = lambda *xs: xs[0] * xs[1]
    assert set(sg.gradients(f, "*")(3.0, 4.0)) == {"xs"}
    grads = sg.gradients(max_of, "*")(3.0, 4.0)
    assert grads == {"0": 0.0, "1": 1.0}


class Unsigned:
    """A callable whose signature cannot be asked."""

    __signature__ = "none"

    def __call__(self, *args):
        return jnp.maximum(*args)


max_of = Unsigned()


def test_flow_lists_an_argument_once():
    rows = [row.path for row in sg.flow(loss, xs="*")(PARAMS, X).inputs]
    assert rows == ["p/b", "p/w", "x", "h"]


TWICE = {"a/b": jnp.float32(2.0), "a": {"b": jnp.float32(3.0)}}


def product(p):
    return p["a/b"] * p["a"]["b"]


@pytest.mark.parametrize(
    "verb",
    [
        lambda at: sg.gradients(product, at)(TWICE),
        lambda at: sg.edit(product, {at: jnp.negative})(TWICE),
        lambda at: sg.capture(product, at)(TWICE),
        lambda at: sg.flow(product, xs=at)(TWICE),
        lambda at: sg.mask(TWICE, at.removeprefix("p/")),
        lambda at: sg.freeze(optax.sgd(1.0), at.removeprefix("p/")).init(TWICE),
    ],
    ids=["gradients", "edit", "capture", "flow", "mask", "freeze"],
)
def test_a_path_that_means_two_places_is_refused(verb):
    with pytest.raises(sg.AddressError, match="means one place") as caught:
        verb("p/a/b")
    (write,) = re.findall(r"write: (.*)", str(caught.value))
    for at in write.split(" or "):
        verb(at.strip('"'))  # what it says to write works


def test_the_spellings_mean_what_they_say():
    assert sg.gradients(product, "p/['a/b']")(TWICE) == 3.0
    assert sg.gradients(product, "p/['a']/['b']")(TWICE) == 2.0
    every = sg.gradients(product, "**/b")(TWICE)
    assert sorted(every.values()) == [2.0, 3.0]


def test_haiku_names_need_no_brackets():
    params = {"mlp/linear_0": {"w": jnp.float32(2.0)}}
    f = lambda params: params["mlp/linear_0"]["w"] ** 2
    assert sg.gradients(f, "params/mlp/linear_0/w")(params) == 4.0
    assert set(sg.gradients(f, "**/w")(params)) == {"params/mlp/linear_0/w"}


def test_an_empty_key():
    params = {"": jnp.float32(2.0), "b": jnp.float32(3.0)}
    f = lambda params: params[""] ** 2 * params["b"]
    assert sg.gradients(f, "params/['']")(params) == 12.0
    assert set(sg.gradients(f, "params/*")(params)) == {"params/['']", "params/b"}


@pytest.mark.parametrize("name", ["0", "return", "x"])
def test_a_point_called_like_an_edge_is_refused(name):
    f = lambda x: checkpoint_name(x * 2.0, name) * 3.0
    with pytest.raises(sg.AddressError, match="must mean one thing"):
        sg.gradients(f, name)(1.0)
    assert sg.gradients(f, sg.point(name))(1.0) == 3.0
    np.testing.assert_allclose(sg.gradients(f, 0)(1.0), 6.0)


def test_jitted(run):
    grads = run(sg.gradients(loss, "*"))(PARAMS, X)
    assert set(grads) == {"p", "x", "h"}
    np.testing.assert_array_equal(grads["p"]["w"], X)


def test_the_order_of_suggestions():
    with pytest.raises(sg.AddressError, match='write: one of "p/w"'):
        sg.gradients(loss, "p/ww")(PARAMS, X)
    assert jax.tree.leaves(sg.gradients(loss, "p/*")(PARAMS, X))


# Patterns over points ---------------------------------------------------------------


def two(x):
    return jnp.sum(sg.name(x, "e0") * sg.name(x * 2.0, "e1")) + sg.name(x, "h")


POINTS = [("e*", {"e0", "e1"}), ("*", {"e0", "e1", "h"}), ("h*", {"h"})]


@pytest.mark.parametrize(("pattern", "keys"), POINTS)
def test_a_pattern_of_points_means_what_the_string_means(pattern, keys):
    point = sg.point(pattern)
    # By hand, of a * b + c at (3, 6, 3).
    slopes = {"e0": 6.0, "e1": 3.0, "h": 1.0}
    values = {"e0": 3.0, "e1": 6.0, "h": 3.0}
    expected = {key: slopes[key] for key in keys}
    assert sg.gradients(two, point)(3.0) == expected
    assert sg.gradients(two, [point])(3.0) == [expected]
    assert sg.capture(two, point)(3.0)[1] == {point: {k: values[k] for k in keys}}
    assert set(sg.gradient_stats(two, point)(3.0)) == keys
    zeros = dict.fromkeys(keys, 0.0)
    grads = jax.grad(sg.perturb(two, point))({point: zeros}, 3.0)
    assert grads == {point: expected}


def test_an_edit_and_a_stop_at_a_pattern_of_points():
    doubled = sg.edit(two, {sg.point("e*"): lambda x: 2.0 * x})
    assert doubled(3.0) == 4 * 18.0 + 3.0
    assert sg.gradients(two, 0, stop_gradients=sg.point("e*"))(3.0) == 1.0
    ys = {"e0": 5.0, "e1": 7.0}
    got = sg.gradients(two, 0, ys=sg.point("e*"), grad_ys=ys)(3.0)
    assert got == 5.0 + 2.0 * 7.0


def test_a_pattern_of_points_passes_over_an_argument_of_that_name():
    f = lambda e0: sg.name(e0 * 3.0, "e0") * sg.name(e0, "e1")
    with pytest.raises(sg.AddressError, match="must mean one thing"):
        sg.gradients(f, "e*")(2.0)
    assert sg.gradients(f, sg.point("e*"))(2.0) == {"e0": 2.0, "e1": 6.0}


@pytest.mark.parametrize("fun", [two, lambda x: x * 2.0], ids=["points", "none"])
def test_a_pattern_of_points_that_matches_nothing(fun):
    with pytest.raises(sg.AddressError, match="must match a named point") as caught:
        sg.gradients(fun, sg.point("q*"))(3.0)
    (write,) = re.findall(r"write: (.*)", str(caught.value))
    assert "q*" not in write  # a name holds no wildcard


# Beside a key that holds "/" --------------------------------------------------------

BESIDE = {"w": 1.0, "a/b": {"c": 1.0}, "a": {"b": {"d": 1.0}}}


def every_leaf(p):
    return sum(jax.tree.leaves(p))


@pytest.mark.parametrize("at", ["p/x", "p/ab", "p/a/c", "p/['a/b']/x", "p/a/*x", "a/b"])
@pytest.mark.parametrize("verb", [sg.gradients, sg.capture, sg.gradient_stats])
def test_a_path_that_matches_nothing_beside_one_that_means_two(at, verb):
    with pytest.raises(sg.AddressError, match="must match an argument") as caught:
        verb(every_leaf, at)(BESIDE)
    message = str(caught.value)
    assert f'address "{at}"' in message
    (write,) = re.findall(r"write: one of (.*)", message)
    for each in write.split(", "):
        verb(every_leaf, each.strip('"'))(BESIDE)  # raises nothing
