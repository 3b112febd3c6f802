"""`check_gradients` beside a kink: what is right there is not said to be wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32

import stopgrad_jax as sg
import stopgrad_jax._words.check as _words

pytestmark = pytest.mark.usefixtures("usual_settings")

# A function, a point on its kink, the way to go from it, and the derivative that way.
BESIDE = {
    "maximum": (lambda x: jnp.maximum(x[0], x[1]), (1.0, 1.0), 1, (1.0, 0.0)),
    "minimum": (lambda x: jnp.minimum(3 * x[0], x[1]), (1.0, 3.0), 1, (0.0, 1.0)),
    "leaky": (lambda x: jnp.where(x > 0, x, 0.1 * x).sum(), (0, 2.0), 1, (1.0, 1.0)),
    "leaky below": (
        lambda x: jnp.where(x > 0, x, 0.1 * x).sum(),
        (0, 2.0),
        -1,
        (0.1, 1.0),
    ),
    "absolute": (lambda x: jnp.abs(x - 1).sum(), (1.0, 3.0), -1, (-1.0, 1.0)),
    "beside a large number": (
        lambda x: jnp.abs(x - 1).sum() + 1000,
        (1.0, 3.0),
        1,
        (1.0, 1.0),
    ),
    "curved": (lambda x: jax.nn.relu(x + 1)[0] * 3 + x[0] ** 2, (-1.0,), 1, (1.0,)),
    "curved below": (
        lambda x: jax.nn.relu(x + 1)[0] * 3 + x[0] ** 2,
        (-1.0,),
        -1,
        (-2.0,),
    ),
    "clip": (lambda x: jnp.clip(x, 0, 1).sum(), (1.0, 0.5), -1, (1.0, 1.0)),
    "own rule": (
        lambda x: sg.with_backward(
            jnp.abs, lambda ct, out, x: (ct * jnp.where(x < 0, -1.0, 1.0),)
        )(x - 1).sum(),
        (1.0, 3.0),
        -1,
        (-1.0, 1.0),
    ),
    "many": (
        lambda x: jnp.abs(x - 1).sum(),
        tuple(np.linspace(0, 2, 21)),
        1,
        (-1.0,) * 10 + (1.0,) * 11,
    ),
}
DISTANCES = {False: (1e-4, 1e-5, 3e-6, 1e-6, 2.4e-7), True: (1e-8, 1e-10, 1e-12)}


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("name", BESIDE)
def test_beside_a_kink_nobody_is_accused(name, x64):
    function, kink, sign, slope = BESIDE[name]
    dtype = "float64" if x64 else "float32"
    for distance in DISTANCES[x64]:
        with jax.enable_x64(x64):
            place = 10 if name == "many" else 0
            x = jnp.array(kink, dtype).at[place].add(sign * distance)
            assert np.allclose(jax.grad(function)(x), slope, rtol=1e-3)
            try:
                sg.check_gradients(function)(x)
            except AssertionError as error:
                said = str(error)
                if "the differences are only known to" in said:
                    continue
                assert f"cannot be settled in {dtype}: " in said
                assert _words.UNSETTLED_KINK.rpartition("by JAX")[2] in said
                (within,) = re.findall("there is a kink within (.*) of the point", said)
                assert float(within) >= 0.99 * distance
                assert _words.FARTHER in said


def test_one_of_these_is_said_with_its_distance():
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(lambda x: jnp.maximum(x[0], x[1]))(f32(1.00001, 1.0))
    first, kink, write = str(caught.value).split("\n")
    assert first.endswith(_words.UNSETTLED_KINK.rpartition("{told}")[2])
    assert float(kink.split()[5]) < 1e-4
    assert write == "  write: a point farther from the kink"


@pytest.mark.parametrize("distance", [1e-4, 1e-5, 1e-6, 2.4e-7])
@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 1.01])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_wrong_rule_does_not_pass_there(distance, factor, sign):
    """The derivative of the other side is one of the factors."""
    slope = lambda x: factor * jnp.sign(x)
    wrong = sg.with_backward(jnp.abs, lambda ct, out, x: (ct * slope(x),))
    x = f32(1 + sign * distance, 3.0)
    with pytest.raises(AssertionError) as caught:
        sg.check_gradients(lambda x: wrong(x - 1)[0])(x)
    assert "the point is at a kink" not in str(caught.value)
    with pytest.raises(AssertionError):  # beside a kink of another function
        sg.check_gradients(lambda x: jnp.abs(x[0] - 1) + wrong(x[0]))(x)


def test_a_wrong_rule_with_a_kink_beside_it_is_named():
    wrong = sg.with_backward(jnp.abs, lambda ct, out, x: (2 * ct * jnp.sign(x),))
    with pytest.raises(AssertionError, match="the rule of with_backward") as caught:
        sg.check_gradients(lambda x: wrong(x - 1))(1.000001)
    (within,) = re.findall(
        "there is a kink within (.*) of the point", str(caught.value)
    )
    assert float(within) >= 1e-6
    assert "the point is at a kink" not in str(caught.value)


AT = {
    "zero": (jnp.abs, 0.0),
    "beside a constant": (lambda x: jnp.abs(x) + 1, 0.0),
    "bias": (lambda x: jnp.abs(x - 1) * 2, 1.0),
    "a net": (lambda x: jax.nn.relu(3 * x - 6) + x, 2.0),
}


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("name", AT)
def test_at_a_kink_that_is_said(name, x64):
    function, x = AT[name]
    with jax.enable_x64(x64), pytest.raises(AssertionError) as caught:
        sg.check_gradients(function)(jnp.array(x, "float64" if x64 else "float32"))
    assert "the point is at a kink: slope " in str(caught.value)
    assert "cannot be settled" not in str(caught.value)


@pytest.mark.parametrize("distance", [1e-5, 3e-6])
def test_beside_a_kink_of_the_derivative(distance):
    """The second derivative of relu squared is 2 on one side, and 0 on the other."""
    function = lambda x: jax.nn.relu(x - 1) ** 2 + x
    for x, told in ((1 + distance, "2"), (1 - distance, "0")):
        with pytest.raises(AssertionError) as caught:
            sg.check_gradients(function, order=2)(x)
        said = f"(rev, second order) cannot be settled in float32: {told} by JAX and"
        assert said in str(caught.value)
