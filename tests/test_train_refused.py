"""What training steps and `fit` refuse, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
BEATS = r"[\s\S]*\n  got:   {}[\s\S]*\n  write: {}"
P = {"encoder": f32(1.0, 2.0), "head": f32(3.0)}
X = jnp.ones((6, 2), jnp.float32)
ADAM = optax.adam(0.1)


def loss(p, x):
    return jnp.mean(x @ p["encoder"] * p["head"])


def stepped(fun=loss, batch=X, params=P, **options):
    step = make_step(fun, ADAM, **options)
    return step(step.init(params), batch)


def other_state():
    return make_step(loss, optax.sgd(0.1, momentum=0.9)).init(P)


GOOD = make_step(loss, ADAM)


def fitted(step=GOOD, batches=lambda n: X, **options):
    return fit(step, GOOD.init(P), batches, **({"steps": 3} | options), progress=False)


# What is expected; what came; what to write instead.
BAD = {
    "the loss is a scalar": (
        (TypeError, r"f32\[6\]", "jnp.mean"),
        lambda: stepped(lambda p, x: x @ p["encoder"]),
    ),
    "the loss is a real float": (
        (TypeError, r"i32\[\]", "a loss that is computed in floats"),
        lambda: stepped(lambda p, x: jnp.sum(x).astype(jnp.int32)),
    ),
    r"make_step\(<lambda>, ...\): the loss is a real float": (
        (TypeError, r"c64\[\]", "a loss that is computed in floats"),
        lambda: stepped(lambda p, x: loss(p, x) * 1j),
    ),
    "the loss returns one scalar": (
        (TypeError, r"tuple of f32\[\], f32\[2\]", "[^\n]*has_aux=True"),
        lambda: stepped(lambda p, x: (loss(p, x), p["encoder"])),
    ),
    r"returns one scalar": (
        (TypeError, "no array", "jnp.mean"),
        lambda: stepped(lambda p, x: None),
    ),
    r"with has_aux, the loss returns a pair \(scalar, aux\)": (
        (TypeError, r"f32\[\]", "return loss, aux"),
        lambda: stepped(has_aux=True),
    ),
    "with has_aux, the loss": (
        (TypeError, "tuple of", "return loss, aux"),
        lambda: stepped(lambda p, x: (loss(p, x), 1, 2), has_aux=True),
    ),
    r"make_step\(loss, ..., accumulate=4\): arrays with one leading size": (
        (ValueError, "a leading size of 6", "accumulate=3, or 4 examples"),
        lambda: stepped(accumulate=4),
    ),
    "one leading size, which 2 divides": (
        (ValueError, "leading sizes {'x': 6, 'y': 4}", "a batch with examples"),
        lambda: stepped(
            lambda p, b: loss(p, b["x"]),
            {"x": X, "y": jnp.ones(4)},
            accumulate=2,
        ),
    ),
    "which 3 divides, in a batch": (
        (ValueError, 'a scalar at "1"', "a batch with examples"),
        lambda: stepped(lambda p, b: loss(p, b[0]), (X, 1.0), accumulate=3),
    ),
    "which 6 divides": (
        (ValueError, "no array", "a batch with examples"),
        lambda: stepped(lambda p, b: loss(p, X), None, accumulate=6),
    ),
    "which 2 divides, in": (
        (ValueError, "a leading size of 0", ""),
        lambda: stepped(batch=jnp.ones((0, 2)), accumulate=2),
    ),
    "where must match a path of the tree": (
        (sg.AddressError, '"encodr", which matches nothing', '"encoder"'),
        lambda: stepped(frozen="encodr"),
    ),
    "at least one leaf of params trains": (
        (ValueError, "2 leaves, 2 of floats, and all of these", 'frozen="encoder"'),
        lambda: stepped(frozen=["encoder", "head"]),
    ),
    r"make_step\(loss, ..., frozen=None\): at least one leaf": (
        (ValueError, "1 leaves, 0 of floats", "floats"),
        lambda: stepped(params={"n": 3}),
    ),
    r"step\(state, batch\): the optimizer's state is one that this step made [^\n]* "
    r'\[2\] at "0/mu/encoder"': (
        (ValueError, r'\[2\] at "0/trace/encoder"', "[^\n]*init[^\n]*migrate"),
        lambda: GOOD(other_state(), X),
    ),
    "the optimizer's state is one": (
        (ValueError, r'\[2\] at "0/mu/encoder"', "[^\n]*migrate"),
        lambda: make_step(loss, ADAM, frozen="encoder")(GOOD.init(P), X),
    ),
    "one that this step made for these parameters": (
        (ValueError, r'\[2\] at "0/mu/encoder"', "[^\n]*init"),
        lambda: GOOD(
            GOOD.init(P).replace(params={"encoder": jnp.ones(3), "head": f32(1)}), X
        ),
    ),
    r"step\(state, batch\): a state": (
        (TypeError, "dict", "state = step.init"),
        lambda: GOOD(P, X),
    ),
    "accumulate is an int, at least 1": (
        (ValueError, "accumulate=0", "accumulate=4"),
        lambda: stepped(accumulate=0),
    ),
    r"make_step\(loss, \.\.\.\): accumulate is an int": (
        (TypeError, "accumulate=2.0", "accumulate=2"),
        lambda: stepped(accumulate=2.0),
    ),
    "an optax transformation": (
        (TypeError, "<function adam", r"make_step\(loss, optax"),
        lambda: make_step(loss, optax.adam),
    ),
    'nonfinite is None, "report" or "skip"': (
        (ValueError, "nonfinite='drop'", 'nonfinite="skip"'),
        lambda: stepped(nonfinite="drop"),
    ),
    "steps is an int, at least 1": (
        (ValueError, "steps=0", "steps=100"),
        lambda: fitted(steps=0),
    ),
    r"fit\(step, state, batches\): steps is an int": (
        (ValueError, "steps=-3", "steps=100"),
        lambda: fitted(steps=-3),
    ),
    "log_every is an int, at least 1": (
        (ValueError, "log_every=0", "log_every=100"),
        lambda: fitted(log_every=0),
    ),
    r"at least steps=3 of them": (
        (ValueError, r"2 batches, f32\[2,6,2\]", "steps=2, or lambda number"),
        lambda: fitted(batches=jnp.ones((2, 6, 2))),
    ),
    "a leading axis of batches, at least": (
        (ValueError, "0 batches", "at least one batch"),
        lambda: fitted(batches=np.ones((0, 6, 2), np.float32)),
    ),
    r"arrays have a leading axis of batches": (
        (ValueError, 'a scalar at "1"', "lambda number: batch"),
        lambda: fitted(batches=(X, jnp.float32(1))),
    ),
    "arrays have a leading axis": (
        (ValueError, "leading sizes {'0': 6, '1': 2}", "a list for batches"),
        lambda: fitted(batches=(X, P["encoder"])),
    ),
    "batches for steps=3": (
        (ValueError, "2 batches, then the iterable ended", "itertools.cycle"),
        lambda: fitted(batches=[X, X]),
    ),
    "batches for": (
        (ValueError, "0 batches, then", "itertools.cycle"),
        lambda: fitted(batches=[]),
    ),
    "batches are arrays, a function of the step number, or an iterable": (
        (TypeError, "3", "[^\n]*lambda number: batch"),
        lambda: fitted(batches=3),
    ),
    r"step is a function of \(state, batch\)": (
        (TypeError, "None", r"step = make_step"),
        lambda: fitted(step=None),
    ),
    r"the step <lambda> returns \(state, metrics\)": (
        (TypeError, "State", "return state"),
        lambda: fitted(step=lambda s, b: s),
    ),
    "keeps the structure of its state": (
        (TypeError, "PyTreeDef", "return state"),
        lambda: fitted(step=lambda s, b: (s.params, {})),
    ),
    "keeps the types of its state": (
        (TypeError, r'f32\[3\] at "params/encoder", after f32\[2\]', "return state"),
        lambda: fitted(
            step=lambda s, b: (s.replace(params={**P, "encoder": jnp.ones(3)}), {})
        ),
    ),
    r"a call outside of jax.jit": (
        (TypeError, "a call that is being traced", "jax.lax.scan"),
        lambda: jax.jit(lambda x: fitted(batches=lambda n: x))(X),
    ),
}


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize(("words", "case"), BAD.items(), ids=range(len(BAD)))
def test_bad_input(words, case):
    (kind, came, instead), call = case
    with pytest.raises(kind, match=words + BEATS.format(came, instead)):
        call()


def test_what_is_no_array_must_stay():
    start = make_step(lambda p, x: p["w"] ** 2, ADAM).init({"w": 1.0, "n": 3})

    def counts(state, batch):
        return state.replace(params={**state.params, "n": state.params["n"] + 1}), {}

    with pytest.raises(TypeError, match=r'4 at "params/n", after 3'):
        fit(counts, start, lambda n: X, steps=1, progress=False)


def test_a_refusal_uses_nothing_up():
    step = make_step(loss, ADAM, accumulate=4)
    state = step.init(P)
    for call in (
        lambda: step(state, X),
        lambda: fit(step, state, [X], steps=1, progress=False),
        lambda: fit(step, state, lambda n: X, steps=1, progress=False),
    ):
        with pytest.raises(ValueError, match="accumulate=3"):
            call()
    state, _ = step(state, jnp.ones((8, 2)))
    assert state.step == 1
