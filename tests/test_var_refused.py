"""What `sg.var` refuses: variables whose value the source text does not tell."""

import dataclasses
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import models_unedited as models
import pytest
from models_unedited import plain
from programs import f32

import stopgrad_jax as sg

ARGS = f32(0.7)[0], f32(0.1, -0.4, 0.9, 1.3)
FEAT = sg.var("feat")
BEATS = r"(?s)^[^\n]+: [^\n]+\n  got:   .+\n  write: .+"


def raises(message, ask):
    with pytest.raises(sg.AddressError, match=BEATS) as caught:
        ask()
    assert message in str(caught.value)


def test_two_statements_of_one_label():
    line = models.block.__code__.co_firstlineno + 1
    ask = lambda label: sg.gradients(models.both, sg.var(label))(1.0)
    raises(f"models_unedited.py:{line} (block): h = jnp.sin(x)", lambda: ask("h"))
    write = 'write: sg.var("block.h")\n         sg.var("other.h")'
    raises(write, lambda: ask("h"))
    assert (ask("block.h"), ask("other.h")) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("fea", 'write: sg.var("feat")'),
        ("plane.feat", 'got:   feat, in plain\n  write: sg.var("feat")'),
        ("nothing", 'variables "feat"'),
        ("plain.other", 'variables "feat"'),
    ],
)
def test_unknown_labels(label, message):
    address = sg.var(label)
    for ask in (sg.gradients, sg.capture):
        raises(message, lambda ask=ask: ask(plain, address)(*ARGS))
    raises(message, lambda: sg.edit(plain, {address: abs})(*ARGS))
    raises(message, lambda: sg.perturb(plain, address)({address: 0.0}, *ARGS))
    raises(message, lambda: sg.gradients(plain, 0, ys=address)(*ARGS))
    raises(message, lambda: sg.gradients(plain, 0, stop_gradients=address)(*ARGS))


def test_a_statement_without_equations():
    def f(x):
        alias = x
        return alias * 2.0

    message = "alias = x, which made no operation: another name for an array, or not"
    raises(message, lambda: sg.gradients(f, sg.var("alias"))(1.0))
    raises('write: "x"', lambda: sg.gradients(f, sg.var("alias"))(1.0))


def container(x):
    value = {"a": jnp.sin(x)}
    return value["a"] * 2


def returned_container(x):
    def pair(x):
        return jnp.sin(x), x

    value = pair(x)
    return value[0] * 2


@dataclasses.dataclass
class Pair:
    a: jax.Array


def constructed(x):
    value = Pair(jnp.sin(x))
    return value.a * 2


class Made:
    def __init__(self, x):
        self.a = jnp.sin(x)


def made(x):
    value = Made(x)
    return value.a * 2


def size(x):
    value = jnp.stack([x, x]).shape[0]
    return x * value


def observed(x):
    seen = []

    def observe(x):
        seen.append(jnp.cos(x))
        return x

    value = observe(x)
    return value * seen[0]


def early(x):
    def both(x):
        y = jnp.sin(x)
        seen.append(jnp.cos(y))
        return y

    seen = []
    value = both(x)
    return value * seen[0]


def mapped(x):
    value = jax.tree.map(lambda v: v * 2, [x, x])
    return value[0] * value[1]


def mapped_by_name(x):
    def double(v):
        y = v * 2
        return y

    value = jax.tree.map(double, [x, x])
    return value[0] * value[1]


def derivative(x):
    value = jax.grad(jnp.sin)(x)
    return value * 2


def derivative_of_own(x):
    value, aux = jax.grad(lambda x: (jnp.sin(x), x * 2), has_aux=True)(x)
    return value * aux


def filtered(x):
    value, b = eqx.filter_jit(lambda x: (x * 2, x))(x)
    return value * b


def jitted_pair(x):
    value = jax.jit(lambda x: (x * 2, x * 3))(x)
    return value[0]


def nested_carry(x):
    value, _ys = jax.lax.scan(lambda c, _: ((c[0] + 1, c[1]), None), (x, x), None, 2)
    return value[0] + value[1]


def parts(x):
    value = jnp.split(jnp.stack([x, x]), 2)
    return value[0].sum()


def starred(x):
    first, *value = jnp.split(jnp.stack([x, x, x]), 3)
    return first.sum() + value[0].sum()


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (container, "a container of arrays"),
        (returned_container, "returns a container"),
        (constructed, "it is an object"),
        (made, "returns no array"),
        (size, "0 arrays made in it are used elsewhere"),
        (observed, "which it was given"),
        (early, "uses it before it is assigned"),
        (mapped, "called there for several values"),
        (mapped_by_name, "called there for several values"),
        (derivative, "calls jax.grad"),
        (derivative_of_own, "calls jax.grad"),
        (filtered, "does not return 2 arrays"),
        (jitted_pair, '"jit" returns several arrays'),
        (nested_carry, '"scan" does not return 2 arrays'),
        (parts, '"split" returns several arrays'),
        (starred, "takes a value apart"),
    ],
)
def test_values_that_cannot_be_told(fun, message):
    raises(message, lambda: sg.gradients(fun, sg.var("value"))(f32(0.5)[0]))


def test_a_function_without_source():
    space = {"jnp": jnp}
    text = "def f(x):\n    feat = jnp.sin(x)\n    return feat * 2"
    exec(compile(text, "<made here>", "exec"), space)
    raises("no source text", lambda: sg.gradients(space["f"], FEAT)(1.0))


def test_a_source_that_changed(tmp_path, monkeypatch):
    file = tmp_path / "changing_module.py"
    text = "import jax.numpy as jnp\ndef f(x):\n    feat = jnp.sin(x)\n    return feat"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import changing_module

    assert sg.gradients(changing_module.f, FEAT)(1.0) == 1.0
    file.write_text(text.replace("feat = ", "y = 1.0; other_name = "))
    raises("source changed", lambda: sg.gradients(changing_module.f, FEAT)(1.0))


PROGRAM = """
import jax.numpy as jnp, stopgrad_jax as sg
def f(x):
    feat = jnp.sin(x)
    return feat * 2

"""
ASK = "print('answer', sg.gradients(f, sg.var('feat'))(1.0))\n"


def python(*args, text=""):
    done = subprocess.run(
        [sys.executable, *args], input=text, capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def test_the_plain_prompt():
    out = python("-i", text=PROGRAM + ASK)
    # Python 3.13 keeps the text of what is typed; before, there is none.
    assert "answer 2.0" in out or "no source text" in out


def test_notebook_cells():
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in ({PROGRAM!r}, {ASK!r}, {"sg.gradients(f, sg.var('fea'))(1.0)"!r}):
    shell.run_cell(cell, store_history=True)
"""
    out = python("-c", code)
    assert "answer 2.0" in out
    assert 'write: sg.var("feat")' in out
