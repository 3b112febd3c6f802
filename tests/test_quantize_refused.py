"""What the quantizers of numbers refuse, and in which words."""

import jax
import jax.numpy as jnp
import pytest
from programs import f32

import stopgrad_jax as sg

BEATS = r"[\s\S]*got: [\s\S]*write: "
q = sg.quantize

X = f32(1.0, 2.0)
EMPTY = jnp.zeros((2, 0))
BAD = {
    r"bsq\(z\): z has codes of at least 1 entry": (ValueError, lambda: q.bsq(EMPTY)),
    r"fsq\([^:]*: z has codes of at least 1 entry": (
        ValueError,
        lambda: q.fsq(EMPTY, []),
    ),
    r"vector_quantize\([^:]*: z has codes of at least 1 entry": (
        ValueError,
        lambda: q.vector_quantize(EMPTY, jnp.zeros((4, 0))),
    ),
    "x has an entry to take the mean of": (ValueError, lambda: q.lsq_init(EMPTY, 7)),
    "x is an array of real floats": (TypeError, lambda: q.round(jnp.arange(3))),
    r"floor\(x\): x is an array": (TypeError, lambda: q.floor(True)),
    r"ceil\(x\): x is an array": (TypeError, lambda: q.ceil(1j)),
    r"trunc\(x\): x is an array": (TypeError, lambda: q.trunc("text")),
    "lo is below hi": (ValueError, lambda: q.clip(X, 1.0, 1.0)),
    "lo broadcasts to x": (ValueError, lambda: q.clip(X, f32(1, 2, 3), 4.0)),
    "hi broadcasts to x": (ValueError, lambda: q.clip(X, 0.0, jnp.ones((2, 2)))),
    "hi is a real number": (TypeError, lambda: q.clip(X, 0.0, "one")),
    "num_bits is an int from 1 to 16": (
        ValueError,
        lambda: q.fake_quant(X, -1.0, 1.0, num_bits=0),
    ),
    r"num_bits=17, [\s\S]*num_bits is an int from 1 to 16": (
        ValueError,
        lambda: q.fake_quant(X, -1.0, 1.0, num_bits=17),
    ),
    r"num_bits=8.0, [\s\S]*num_bits is an int": (
        TypeError,
        lambda: q.fake_quant(X, -1.0, 1.0, num_bits=8.0),
    ),
    "num_bits is an int from 2 to 16": (
        ValueError,
        lambda: q.fake_quant(X, -1.0, 1.0, num_bits=1, narrow_range=True),
    ),
    "min is below max": (ValueError, lambda: q.fake_quant(X, 1.0, 1.0)),
    "num_bits=5, [^:]*: min is below max": (
        ValueError,
        lambda: q.fake_quant(X, jnp.float32(3), 1.0, 5),
    ),
    "min broadcasts to x": (
        ValueError,
        lambda: q.fake_quant(X, f32(-1.0, -1.0, -1.0), 1.0),
    ),
    "max is a real number": (TypeError, lambda: q.fake_quant(X, -1.0, None)),
    r"fake_quant\([\s\S]*: x is an array": (
        TypeError,
        lambda: q.fake_quant(jnp.arange(3), -1.0, 1.0),
    ),
    "qmin is below qmax": (
        ValueError,
        lambda: q.fake_quant_affine(X, 1.0, 0, 7, 7),
    ),
    "scale is positive": (
        ValueError,
        lambda: q.fake_quant_affine(X, f32(1.0, 0.0), 0, -8, 7),
    ),
    "zero_point is a code, 0 to 15": (
        ValueError,
        lambda: q.fake_quant_affine(X, 1.0, 16, 0, 15),
    ),
    "qmin is an int, at least": (
        TypeError,
        lambda: q.fake_quant_affine(X, 1.0, 0, -8.0, 7),
    ),
    "step is positive": (ValueError, lambda: q.lsq(X, -0.5, -8, 7, num_elements=2)),
    "qmax is an int, at least 1": (
        ValueError,
        lambda: q.lsq(X, 0.5, -8, 0, num_elements=2),
    ),
    "num_elements is an int, at least 1": (
        ValueError,
        lambda: q.lsq(X, 0.5, -8, 7, num_elements=0),
    ),
    "step broadcasts to x": (
        ValueError,
        lambda: q.lsq(X, f32(1, 1, 1), -8, 7, num_elements=2),
    ),
    r"lsq_init\(x, 0\): qmax is an int, at least 1": (
        ValueError,
        lambda: q.lsq_init(X, 0),
    ),
    r"lsq_init\(x, 7\): x is an array": (
        TypeError,
        lambda: q.lsq_init(jnp.arange(3), 7),
    ),
}


@pytest.mark.parametrize(("words", "case"), BAD.items(), ids=range(len(BAD)))
def test_bad_input(words, case):
    kind, call = case
    with pytest.raises(kind, match=words + BEATS):
        call()


def test_a_traced_count_is_refused_with_words():
    f = jax.jit(lambda n: q.lsq(X, 0.5, -8, 7, num_elements=n))
    with pytest.raises(TypeError, match="num_elements is an int" + BEATS):
        f(2)


NONE = jnp.zeros((0, 2))
OF_NONE = {
    "bsq": q.bsq,
    "fsq": lambda z: q.fsq(z, [5, 5]),
    "lfq": q.lfq,
    "lsq": lambda z: q.lsq(z, 1.0, -8, 7, num_elements=1),
    "round": q.round,
    "fake_quant": lambda z: q.fake_quant(z, -1.0, 1.0),
    "vector_quantize": lambda z: q.vector_quantize(z, jnp.eye(2)).quantized,
}


@pytest.mark.parametrize("quantizer", OF_NONE.values(), ids=OF_NONE)
def test_no_code_is_quantized_to_none(quantizer):
    assert quantizer(NONE).shape == NONE.shape
    assert jax.grad(lambda z: jnp.sum(quantizer(z)))(NONE).shape == NONE.shape
