"""Attributes, globals and two statements on a line are watched as variables are."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from programs import f32, same

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = f32(0.3, -0.7, 1.1)
SEEN = "it was seen to be given other arrays than its text tells"


class Ema:
    t = None

    def update(self, w):
        self.t = w if self.t is None else 0.9 * self.t + 0.1 * w
        return self.t


def averaged(x):
    ema = Ema()
    return jnp.sum(sum(ema.update(x * k) * x for k in (1.0, 2.0)))


class Layers:
    def __init__(self, *layers):
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            self.h = layer(x)
            x = self.h * 2.0
        return x

    def hidden(self, x):
        for layer in self.layers:
            __h = layer(x)
            x = __h + 1.0
        return x


def kept_global(x, layers):
    global kept
    for layer in layers:
        kept = layer(x)
        x = kept * 2.0
    return x


REFUSED = {
    "an attribute": ("self.t", averaged),
    "of layers": ("self.h", lambda x: jnp.sum(Layers(jnp.sin, same, jnp.tanh)(x))),
    "of a hidden name": ("__h", lambda x: jnp.sum(Layers(jnp.sin, same).hidden(x))),
    "a global": ("kept", lambda x: jnp.sum(kept_global(x, (jnp.sin, same, jnp.cos)))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_round_without_an_operation_is_not_left_out(name):
    label, f = REFUSED[name]
    with pytest.raises(sg.AddressError, match=SEEN):
        sg.capture(f, sg.var(label))(X)


RIGHT = {
    "self.h": lambda x: jnp.sum(Layers(jnp.sin, jnp.tanh)(x)),
    "__h": lambda x: jnp.sum(Layers(jnp.sin, jnp.tanh).hidden(x)),
    "kept": lambda x: jnp.sum(kept_global(x, (jnp.sin, jnp.tanh))),
}


@pytest.mark.parametrize("label", RIGHT)
def test_what_each_round_computes_is_found(label):
    factor, more = (1.0, 1.0) if label == "__h" else (2.0, 0.0)
    first = jnp.sin(X)
    expected = [first, jnp.tanh(first * factor + more)]
    found = sg.capture(RIGHT[label], sg.var(label))(X)[1][sg.var(label)]
    np.testing.assert_allclose(jnp.stack(found), jnp.stack(expected), rtol=1e-6)


SOURCE = """
import jax.numpy as jnp

class Stack:
    def __call__(self, x):
        self.x = x
        for w in (1.0, 2.0, 3.0):
            self.x = jnp.sin(w * self.x) + 1.0
        return self.x

def stacked(x):
    return jnp.sum(Stack()(x))

def plain(x):
    for w in (1.0, 2.0, 3.0):
        x = jnp.sin(w * x) + 1.0
    return jnp.sum(x)

def on_one_line(x, act):
    h = x * 2.0; h = act(h)
    return jnp.sum(h * same(h))

def same(h):
    return h

def block(u):
    return jnp.tanh(u)

def called(x):
    return jnp.sum(block(x * 2.0))
"""


def of_source(tmp_path):
    file = tmp_path / "layers_of_a_cell.py"
    file.write_text(SOURCE)
    return importlib.util.spec_from_file_location("layers_of_a_cell", file)


def test_two_statements_on_a_line(tmp_path):
    spec = of_source(tmp_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    second, of = sg.var("on_one_line.h", nth=1), module.on_one_line
    with pytest.raises(sg.AddressError, match="must be clear"):
        sg.capture(lambda x: of(x, jnp.sin) + of(x, same), second)(X)
    found = sg.capture(lambda x: of(x, jnp.sin), second)(X)[1][second]
    np.testing.assert_allclose(found, jnp.sin(X * 2.0), rtol=1e-6)


def test_a_module_that_is_run_again(tmp_path):
    """As a cell of a notebook is: its code is equal to that of the first run."""
    spec = of_source(tmp_path)
    rounds = [jnp.sin(1.0 * X) + 1.0]
    rounds += [jnp.sin(2.0 * rounds[0]) + 1.0]
    rounds += [jnp.sin(3.0 * rounds[1]) + 1.0]
    for _ in range(3):
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for f, address, expected in (
            (module.stacked, sg.var("__call__.self.x", nth=1), rounds),
            (module.plain, sg.var("plain.x"), rounds),
            (module.called, sg.var("block.u"), [X * 2.0]),
        ):
            found = sg.capture(f, address)(X)[1][address]
            found = found if isinstance(found, tuple) else (found,)
            np.testing.assert_allclose(jnp.stack(found), jnp.stack(expected), rtol=1e-6)
