"""`check_gradients` says what it cannot check, and what to write instead."""

import jax
import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg

X = f32(0.3, -1.7)
pytestmark = pytest.mark.usefixtures("usual_settings")

square = lambda x: x * x
sine = sg.with_backward(jnp.sin, lambda ct, out, x: (ct * jnp.cos(x),))


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, ct: (3 * x**2 * ct,))


@jax.custom_jvp
def fourth(x):
    return x**4


fourth.defjvp(lambda p, t: (fourth(*p), 4 * p[0] ** 3 * t[0]))
every = lambda x: sine(x) + cube(x) + fourth(x)

REFUSED = {
    "order": (
        square,
        (X,),
        {"order": 0},
        ValueError,
        "order is 1 or 2",
        "0",
        "order=2",
    ),
    "mode": (
        *(square, (X,), {"modes": ("back",)}, ValueError),
        *('modes are "rev", "fwd" or both', "('back',)", 'modes=("rev", "fwd")'),
    ),
    "a string as modes": (
        *(square, (X,), {"modes": "rev"}, ValueError),
        *('modes are "rev", "fwd" or both', "'rev'", 'modes=("rev", "fwd")'),
    ),
    "allow": (
        *(every, (X,), {"allow": ["nobody", "cube"]}, ValueError),
        "allow names functions with a custom rule that fun calls",
        '"nobody"',
        'one of "cube", "fourth", "sin", "with_backward"',
    ),
    "allow without a rule": (
        *(square, (X,), {"allow": "relu"}, ValueError),
        "allow names functions with a custom rule that fun calls",
        '"relu"',
        "allow=(): it calls none",
    ),
    "integers": (
        *(square, (jnp.arange(3),), {}, TypeError),
        *("an argument that carries a gradient", '"x"', "an argument of floats"),
    ),
    "narrow": (
        *(lambda p: p["w"] * 2, ({"w": X.astype("bfloat16")},), {}, TypeError),
        "known arrays of float32 or float64",
        'a bf16[2] at "p/w"',
        "x.astype(jnp.float32): narrow floats have no useful differences",
    ),
    "complex": (
        *(square, (X.astype("complex64"),), {}, TypeError),
        "known arrays of float32 or float64",
        'a c64[2] at "x"',
        "fun of real arrays, as lambda re, im: fun(re + 1j * im)",
    ),
    "a shape": (
        *(square, (jax.ShapeDtypeStruct((2,), "float32"),), {}, TypeError),
        "known arrays of float32 or float64",
        'a shape only, f32[2] at "x"',
        "an array",
    ),
    "complex results": (
        *(lambda x: (x, jnp.exp(1j * x)), (X,), {}, TypeError),
        "<lambda> returns real numbers",
        *("c64[2]", "a function that returns z.real and z.imag"),
    ),
    "integer results": (
        *(lambda x: jnp.argmax(x), (X,), {}, TypeError),
        "<lambda> returns at least one array of floats",
        *("i32[]", "a function whose result carries a gradient"),
    ),
    "forward mode": (
        *(every, (X,), {"modes": ("rev", "fwd")}, TypeError),
        "modes=('fwd',): a function with a forward derivative",
        "one with a reverse rule only: ",
        'modes=("rev",)',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    function, args, options, error, expected, came, instead = REFUSED[name]
    with pytest.raises(error) as caught:
        sg.check_gradients(function, **options)(*args)
    called, got, write = str(caught.value).split("\n")
    assert called.startswith("check_gradients(<lambda>)")
    assert called.endswith(expected)
    assert got.startswith(f"  got:   {came}")
    assert write == f"  write: {instead}"


def test_those_without_a_forward_mode_are_listed():
    with pytest.raises(TypeError) as caught:
        sg.check_gradients(every, modes=("fwd",))(X)
    got = str(caught.value).split("\n")[1]
    assert '"with_backward(sin) (' in got
    assert '"cube (' in got
    assert "fourth" not in got


def test_what_has_a_forward_mode_is_not_refused():
    sg.check_gradients(fourth, modes=("fwd",))(X)


@pytest.mark.parametrize("closed_over", [False, True], ids=["argument", "closure"])
def test_traced_values_are_refused(closed_over):
    def run(x):
        if closed_over:
            return sg.check_gradients(lambda y: x * y)(X)
        return sg.check_gradients(square)(x)

    with pytest.raises(TypeError) as caught:
        jax.jit(run)(X)
    _, got, write = str(caught.value).split("\n")
    assert got == "  got:   a traced f32[2]"
    assert write == (
        "  write: the call outside of jax.jit: sg.check_gradients(jax.jit(fun))(*args)"
    )


def test_errors_of_others_are_their_own():
    forbidden = lambda x: sg.prevent_gradient(x, "not this way") * 1.0
    for mode in ("rev", "fwd"):
        with pytest.raises(TypeError, match="not this way"):
            sg.check_gradients(forbidden, modes=(mode,))(X)
