"""Quantizers of vectors cost what users write today, by instructions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import instructions

import stopgrad_jax as sg

q = sg.quantize


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


CODES = normal(5, 6, 3)


def rotated(z, code):
    """Quantize to the only code there is."""
    return q.vector_quantize(z, code[None], gradient="rotation").quantized


_stop = jax.lax.stop_gradient


def _fsq(z):
    half, width = np.float32([3.4965, 1.998, 0.999]), np.float32([4, 2, 1])
    offset = np.float32([0.5, 0, 0])
    bounded = jnp.tanh(z + np.float32(np.tan(offset / half))) * half - offset
    return (bounded + _stop(jnp.round(bounded) - bounded)) / width


def _symmetric(z):
    half, offset = np.float32([3.5, 2, 1]), np.float32([0.5, 0, 0])
    bounded = jnp.tanh(z) * half
    code = jnp.floor(bounded + (0.5 - offset)) + offset
    return (bounded + _stop(code - bounded)) / half


def _nearest(z, codes):
    """With the guards: any offset, size or nan; of equal codes the first."""
    some = codes[:: -(-len(codes) // 15)]
    middle = jnp.sort(some, 0)[(len(some) - 1) // 2]
    middle = jnp.where(jnp.isfinite(middle), middle, 0.0)
    size = jnp.sort(jnp.max(jnp.abs(some - middle), -1))[len(some) // 2]
    size = jax.lax.reduce_precision(size, 8, 0)
    size = jnp.where(jnp.isfinite(size) & (size > 0), size, 1.0)
    z = jnp.where(jnp.isfinite(z - middle), z - middle, 0.0)
    scaled = (codes - middle) / size
    halves = jnp.sum(scaled**2, -1) * (size / 2)
    usable = jnp.isfinite(halves)
    scaled = jnp.where(usable[:, None], scaled, 0.0)
    dots = jnp.matmul(z, scaled.T, precision="highest")
    indices = jnp.argmin(jnp.where(usable, halves, jnp.inf) - dots, -1)
    marks = jnp.sum(codes / (jnp.arange(codes.shape[-1]) + np.sqrt(2)), -1)
    same = marks == marks[indices][:, None]
    rows = jnp.arange(len(codes))
    alike = jnp.min(jnp.where(same, rows, indices[:, None]), -1)
    return jnp.where(jnp.all(codes[alike] == codes[indices], -1), alike, indices)


def _vq(z, codes):
    indices = _nearest(*_stop((z, codes)))
    code = codes[indices]
    quantized = jnp.where(jnp.isnan(z), z, z + _stop(code - z))
    losses = jnp.mean((_stop(z) - code) ** 2), jnp.mean((z - _stop(code)) ** 2)
    return quantized, indices, *losses


def _unit(z):
    """z / norm(z) and the norm, for numbers of any size."""
    largest = _stop(jnp.max(jnp.abs(z), -1, keepdims=True))
    zero = largest == 0
    largest = jnp.where(zero, 1.0, largest)
    scaled = z / largest
    square = jnp.sum(scaled * scaled, -1, keepdims=True)
    norm = jnp.sqrt(jnp.where(zero, 1.0, square))
    return scaled / norm, jnp.where(zero, 0.0, largest * norm)


def _bsq(z):
    unit = _unit(z)[0]
    corner = jnp.where(z == 0, -1.0, jnp.sign(z)) / np.float32(np.sqrt(z.shape[-1]))
    return unit + _stop(corner - unit)


def _rotation(z, codes):
    code = _stop(codes[_nearest(_stop(z), codes)])
    (e, e_norm), (q_unit, q_norm) = _unit(_stop(z)), _unit(code)
    both, eps = e + q_unit, np.finfo("float32").eps
    square = jnp.sum(both * both, -1, keepdims=True)
    turns = (e_norm > eps * q_norm) & (q_norm > eps * e_norm) & (square > 16 * eps)
    twice = jnp.where(turns, 2 / jnp.where(turns, square, 1.0), 0.0)
    turned = z - twice * jnp.sum(both * z, -1, keepdims=True) * both
    onto = jnp.where(turns, 2.0, 0.0) * jnp.sum(e * z, -1, keepdims=True)
    factor = jnp.where(turns, q_norm / jnp.where(turns, e_norm, 1.0), 1.0)
    turned = factor * (turned + onto * q_unit)
    return jnp.where(jnp.isnan(z), z, turned + _stop(code - turned))


PAIRS = {
    "bsq": (q.bsq, _bsq, ()),
    "rotation": (
        lambda z: rotated_to_nearest(z, CODES),
        lambda z: _rotation(z, CODES),
        (),
    ),
    "fsq": (lambda z: q.fsq(z, (8, 5, 3)), _fsq, ()),
    "fsq symmetric": (
        lambda z: q.fsq(z, (8, 5, 3), variant="symmetric"),
        _symmetric,
        (),
    ),
    "lfq": (
        q.lfq,
        lambda z: z + _stop(jnp.where(z == 0, -1.0, jnp.sign(z)) - z),
        (),
    ),
    "vector_quantize": (q.vector_quantize, _vq, (CODES,)),
}


def rotated_to_nearest(z, codes):
    return q.vector_quantize(z, codes, gradient="rotation").quantized


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize(("ours", "theirs", "more"), PAIRS.values(), ids=PAIRS)
def test_nothing_is_added(ours, theirs, more):
    args = (normal(0, 4, 3), *more)
    total = lambda out: sum(jnp.sum(x**2) for x in jax.tree.leaves(out))
    gradient = lambda f: jax.grad(lambda *a: total(f(*a)), tuple(range(len(args))))
    if more:  # indices carry no gradient
        total = lambda out: jnp.sum(out[0] ** 2) + out[2] + out[3]
    assert instructions(ours, *args) <= instructions(theirs, *args)
    assert instructions(gradient(ours), *args) <= instructions(gradient(theirs), *args)


@pytest.mark.usefixtures("usual_settings")
def test_without_guards_it_would_be_less():
    """Of bsq and vector_quantize, as their page says."""

    def bsq(z):
        unit = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return unit + _stop(jnp.sign(z) / np.float32(np.sqrt(3)) - unit)

    def nearest(z):
        scores = jnp.sum(CODES**2, -1) / 2 - z @ CODES.T
        code = CODES[jnp.argmin(scores, -1)]
        return z + _stop(code - z)

    vq = lambda z: q.vector_quantize(z, CODES).quantized
    z = normal(0, 4, 3)
    gradient = lambda f: jax.grad(lambda z: jnp.sum(f(z) ** 2))
    for ours, short in ((q.bsq, bsq), (vq, nearest)):
        assert instructions(gradient(short), z) < instructions(gradient(ours), z)


def test_rotation_costs_what_its_matrix_free_form_costs():
    """Two dot products and their transposes; no d by d matrix."""
    z = normal(0, 4, 64)
    f = lambda z: jnp.sum(rotated(z, jnp.ones(64, jnp.float32)) ** 2)
    text = jax.jit(jax.grad(f)).lower(z).compile().as_text()
    assert "64,64]" not in text
