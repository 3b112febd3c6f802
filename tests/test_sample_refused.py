"""Discrete choices: what is refused, and in which words."""

import jax
import jax.numpy as jnp
import pytest
from sample_cases import (
    LOGITS,
    NOISE,
    D,
)

import stopgrad_jax as sg

# What is refused --------------------------------------------------------------------

KEY = jax.random.key(0)
X = jnp.array(LOGITS)
REFUSED = {
    "ints": (
        TypeError,
        r"categorical\(key, logits\): logits is an array of real floats",
        lambda: sg.sample.categorical(KEY, jnp.arange(3)),
    ),
    "ints, reinmax": (
        TypeError,
        "logits is an array of real floats",
        lambda: sg.sample.reinmax(KEY, jnp.arange(3)),
    ),
    "ints, bernoulli": (
        TypeError,
        "logits is an array of real floats",
        lambda: sg.sample.bernoulli(KEY, 3),
    ),
    "ints, scores": (
        TypeError,
        "scores is an array of real floats",
        lambda: sg.sample.top_k_mask(jnp.arange(3), 1),
    ),
    "no axis": (
        ValueError,
        "logits with a last axis",
        lambda: sg.sample.gumbel_softmax(KEY, 0.5, 1.0),
    ),
    "no class": (
        ValueError,
        "logits with a last axis",
        lambda: sg.sample.gumbel_rao(KEY, jnp.zeros((2, 0)), 1.0, 2),
    ),
    "temperature 0": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.gumbel_softmax(KEY, X, 0.0),
    ),
    "a negative one": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.reinmax(KEY, X, jnp.float32(-1)),
    ),
    "nan": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.gumbel_rao(KEY, X, jnp.nan, 2),
    ),
    "backward": (
        ValueError,
        "backward_temperature is above 0",
        lambda: sg.sample.categorical(KEY, X, 1.0, 0.0),
    ),
    "bad, though not used": (
        ValueError,
        "temperature is above 0",
        lambda: sg.sample.categorical_given(D, X, 0.0, 1.0),
    ),
    "temperature's shape": (
        ValueError,
        "temperature broadcasts to logits",
        lambda: sg.sample.categorical(KEY, X, jnp.ones(3)),
    ),
    "temperature's rank": (
        ValueError,
        "temperature broadcasts to logits",
        lambda: sg.sample.categorical(KEY, X, jnp.ones((2, 4))),
    ),
    "temperature's dtype": (
        TypeError,
        "temperature is a real number",
        lambda: sg.sample.categorical(KEY, X, 1j),
    ),
    "adjust": (
        ValueError,
        'adjust is "identity" or "sigmoid"',
        lambda: sg.sample.bernoulli(KEY, X, "tanh"),
    ),
    "indices": (
        ValueError,
        r"sample of shape \(2, 4\)[\s\S]*write: jax.nn.one_hot\(sample, 4\)",
        lambda: sg.sample.reinmax_given(jnp.array([0, 1]), jnp.zeros((2, 4))),
    ),
    "sample": (
        ValueError,
        r"sample of shape \(4,\)",
        lambda: sg.sample.bernoulli_given(1.0, X),
    ),
    "noise": (
        ValueError,
        r"noise of shape \(4,\)",
        lambda: sg.sample.gumbel_softmax_given(NOISE, X, 1.0),
    ),
    "noise of one": (
        ValueError,
        "noise with a leading axis",
        lambda: sg.sample.gumbel_rao_given(NOISE[0], D, X, 1.0),
    ),
    "noise of none": (
        ValueError,
        "noise with a leading axis",
        lambda: sg.sample.gumbel_rao_given(NOISE[:0], D, X, 1.0),
    ),
    "noise of others": (
        ValueError,
        r"noise of shape \(5, 4\)",
        lambda: sg.sample.gumbel_rao_given(NOISE[:, :3], D, X, 1.0),
    ),
    "num_samples 0": (
        ValueError,
        "num_samples is an int, at least 1",
        lambda: sg.sample.gumbel_rao(KEY, X, 1.0, 0),
    ),
    "num_samples a float": (
        TypeError,
        "num_samples is an int",
        lambda: sg.sample.gumbel_rao(KEY, X, 1.0, 2.0),
    ),
    "k 0": (ValueError, "k is an int, at least 1", lambda: sg.sample.top_k_mask(X, 0)),
    "k 5": (ValueError, "k is at most 4", lambda: sg.sample.top_k_mask(X, 5)),
    "k traced": (
        TypeError,
        "k is an int",
        lambda: jax.jit(lambda k: sg.sample.top_k_mask(X, k))(2),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    kind, words, call = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["got", "write"]
