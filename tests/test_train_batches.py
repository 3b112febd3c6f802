"""What a batch holds: arrays and numbers, and what is said of anything else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARAMS = {"w": jnp.float32(2.0)}
X = jnp.float32([1.0, 3.0])


def loss(params, batch, key=None):
    return jnp.sum(params["w"] * batch["x"])


STEP = sg.train.make_step(loss, optax.sgd(0.5))
FREEZE = sg.train.make_step(loss, optax.sgd(0.5), untrained="freeze")
CALLS = {
    "step": lambda b: STEP(STEP.init(PARAMS), b),
    "jit": lambda b: jax.jit(lambda s: STEP(s, b))(STEP.init(PARAMS)),
    "lower": lambda b: STEP.lower(STEP.init(PARAMS), b),
    "init": lambda b: FREEZE.init(PARAMS, b),
    "fit": lambda b: sg.train.fit(
        STEP, STEP.init(PARAMS), [b, b], steps=2, progress=False
    ),
    "fit by number": lambda b: sg.train.fit(
        STEP, STEP.init(PARAMS), lambda n: b, steps=2, progress=False
    ),
}
NO_ARRAYS = {
    "str": "train",
    "bytes": b"train",
    "array of str": np.array(["a", "b"]),
    "objects": np.array([None, 1], dtype=object),
    "function": len,
    "time": np.datetime64("2020-01-01"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_is_named_by_its_path(call, wrong):
    with pytest.raises(TypeError) as caught:
        call({"x": X, "of": [1, wrong]})
    message = str(caught.value)
    assert f'({type(wrong).__name__}) at "of/1"' in message
    assert "\n  write: a batch without it" in message
    assert "args[" not in message


def test_a_batch_that_is_a_string():
    with pytest.raises(TypeError, match=r"got: +'train' \(str\)\n"):
        CALLS["step"]("train")


def test_a_key_that_is_a_string():
    with pytest.raises(TypeError, match=r"a PRNG key[\s\S]*write: jax\.random\.key"):
        STEP(STEP.init(PARAMS), {"x": X}, "seed")


def test_a_tree_of_batches_with_a_string():
    batches = {"x": jnp.ones((3, 2)), "split": "train"}
    with pytest.raises(TypeError, match=r"'train' \(str\) at \"split\""):
        sg.train.fit(STEP, STEP.init(PARAMS), batches, steps=3, progress=False)


def test_what_it_says_to_write_works():
    def by_split(params, batch, split):
        return loss(params, batch) * (1.0 if split == "train" else 0.0)

    bound = functools.partial(by_split, split="train")
    step = sg.train.make_step(bound, optax.sgd(0.5))
    state, _ = step(step.init(PARAMS), {"x": X})
    assert state.params["w"] == 2.0 - 0.5 * 4.0


NUMBERS = {
    "bool": True,
    "int": 3,
    "float": 0.5,
    "complex": 1j,
    "numpy": np.float16(2.0),
    "bfloat16": np.ones(2, jnp.bfloat16),
    "int4": np.ones(2, jnp.int4),
    "key": jax.random.key(0),
    "None": None,
    "nothing": (),
}


@pytest.mark.parametrize("also", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("call", ["step", "jit", "fit"])
def test_numbers_and_keys_are_taken(call, also):
    state, _ = CALLS[call]({"x": X, "also": also})
    assert state.params["w"] == 2.0 - 0.5 * 4.0 * (2 if call == "fit" else 1)
