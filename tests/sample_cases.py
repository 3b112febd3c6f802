"""Discrete choices with the draw given: each call and its closed form."""

import numpy as np
import pytest

import stopgrad_jax as sg

LOGITS = np.float32([0.3, -1.0, 0.8, 0.1])
ONE_HOT = np.eye(4, dtype=np.float32)
NOISE = np.float32(np.random.default_rng(0).gumbel(size=(5, 4)))
CT = np.float32([1.0, -2.0, 0.5, 3.0])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def j(p, g):
    return p * (g - (g * p).sum(-1, keepdims=True))


def conditioned(noise, hot, logits):
    """logits + noise, given the argmax, by exponentials as in the paper."""
    e, z = np.exp(-noise), np.exp(logits).sum()
    chosen = (hot * e).sum(-1, keepdims=True)
    top = -np.log(chosen) + np.log(z)
    return np.where(hot > 0, top, -np.log(e / np.exp(logits) + chosen / z))


S = 1 / (1 + np.exp(-LOGITS))
D = ONE_HOT[2]
HALF = (softmax(LOGITS / 2) + D) / 2
GIVEN = {  # the call, its value, its backward pass
    "bernoulli": (lambda x: sg.sample.bernoulli_given(D, x), D, CT),
    "bernoulli, sigmoid": (
        lambda x: sg.sample.bernoulli_given(D, x, "sigmoid"),
        D,
        CT * S * (1 - S),
    ),
    "categorical": (
        lambda x: sg.sample.categorical_given(D, x),
        D,
        j(softmax(LOGITS), CT),
    ),
    "categorical, temperature": (
        lambda x: sg.sample.categorical_given(D, x, 2.0),
        D,
        j(softmax(LOGITS / 2), CT) / 2,
    ),
    "categorical, backward temperature": (
        lambda x: sg.sample.categorical_given(D, x, 2.0, 0.5),
        D,
        j(softmax(LOGITS * 2), CT) * 2,
    ),
    "gumbel_softmax": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5),
        ONE_HOT[np.argmax(LOGITS + NOISE[0])],
        j(softmax((LOGITS + NOISE[0]) * 2), CT) * 2,
    ),
    "gumbel_softmax, soft": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5, False),
        softmax((LOGITS + NOISE[0]) * 2),
        j(softmax((LOGITS + NOISE[0]) * 2), CT) * 2,
    ),
    "gumbel_softmax, soft, backward temperature": (
        lambda x: sg.sample.gumbel_softmax_given(NOISE[0], x, 0.5, False, 2.0),
        softmax((LOGITS + NOISE[0]) * 2),
        j(softmax((LOGITS + NOISE[0]) / 2), CT) / 2,
    ),
    "reinmax": (
        lambda x: sg.sample.reinmax_given(D, x, 2.0),
        D,
        2 * j(HALF, CT) - j(softmax(LOGITS), CT) / 2,
    ),
    "gumbel_rao": (
        lambda x: sg.sample.gumbel_rao_given(NOISE, D, x, 0.5),
        D,
        (j(softmax(conditioned(NOISE, D, LOGITS) * 2), CT) * 2).mean(0),
    ),
    "top_k_mask": (
        lambda x: sg.sample.top_k_mask(x, 2),
        np.float32([1, 0, 1, 0]),
        CT,
    ),
}
DRAWS = {
    "bernoulli": lambda key, x: sg.sample.bernoulli(key, x, "sigmoid"),
    "categorical": sg.sample.categorical,
    "gumbel_softmax": lambda key, x: sg.sample.gumbel_softmax(key, x, 0.5),
    "reinmax": sg.sample.reinmax,
    "gumbel_rao": lambda key, x: sg.sample.gumbel_rao(key, x, 0.5, 3),
}
every_given = pytest.mark.parametrize("name", GIVEN)
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
