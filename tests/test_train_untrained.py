"""Leaves that the loss cannot train: named, with a cause; and frozen on request."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32
from test_train import assert_same_bits

import stopgrad_jax as sg
from stopgrad_jax.train import fit, make_step
from stopgrad_jax.train._examine import Examined

pytestmark = pytest.mark.usefixtures("standard_promotion")
ADAMW = optax.adamw(0.1, weight_decay=0.5)
X = f32(1.0, 2.0, 3.0)
SPECIAL = f32(-0.0, np.inf, 3.0)
HERE = r"\(tests/test_train_untrained\.py:\d+\)"
WARNS = functools.partial(pytest.warns, UserWarning)


def params():
    return {"w": f32(1.0, -1.0, 2.0), "u": f32(0.5, 1.5, -1.0)}


def base(p, x):
    return jnp.mean((p["w"] * x - 1.0) ** 2)


def stopped(p, x):
    return base(p, x + jax.lax.stop_gradient(p["u"]))


def rounded(p, x):
    return base(p, x + jnp.round(p["u"]))


def unused(p, x):
    return base(p, x)


def clipped(p, x):
    return base(sg.clip_gradient_norm(p, 1e3), x)


def cast(p, x):
    return base(p, x + p["u"].astype(jnp.int32))


def compared(p, x):
    return base(p, jnp.where(p["u"] > 0, x, 2 * x))


def chosen(p, x):
    return base(p, x[jnp.argmax(p["u"])])


def overwritten(p, x):
    return base(p, p["u"].at[:].set(x))


def scanned(p, x):
    """The carry begins with it and is stopped in each round."""
    step = lambda c, x: (jax.lax.stop_gradient(c) * x, c)
    return base(p, jax.lax.scan(step, p["u"], x)[0])


def with_backward(p, x):
    product = sg.with_backward(lambda x, u: x * u, lambda ct, *_: (ct, None))
    return base(p, product(p["w"] * x, p["u"]))


def in_aux_alone(p, x):
    return base(p, x), jnp.sum(p["u"])


CAUSES = {
    stopped: "stop_gradient, on purpose",
    rounded: "the derivative of round is zero almost everywhere",
    unused: "the loss is not computed from it",
    clipped: "the loss is not computed from it",
    cast: "astype returns int32, integers carry no gradient",
    compared: "a bool carries no gradient",
    chosen: r"argmax returns int32, integers carry no gradient",
    overwritten: "overwritten: a later write replaces all of it",
    scanned: "stop_gradient, on purpose",
    with_backward: "the backward function returns None or zeros for it",
    in_aux_alone: "the loss is not computed from it",
}


def options_of(loss):
    return {"has_aux": True} if loss is in_aux_alone else {}


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize(
    ("loss", "cause"), CAUSES.items(), ids=[f.__name__ for f in CAUSES]
)
def test_each_cause_is_told_and_what_to_write_is_right(loss, cause):
    step = make_step(loss, ADAMW, **options_of(loss))
    place = "" if "not computed" in cause else rf"[\s\S]*{HERE}"
    with WARNS(
        match=rf'make_step\({loss.__name__}[\s\S]*"u": [\s\S]*{cause}{place}'
        r'[\s\S]*write: frozen="u", or untrained="freeze"'
    ) as caught:
        state, _ = step(step.init(params()), X)
    (told,) = caught
    assert told.filename == __file__
    # With a decay of 0.5 at a rate of 0.1, it was moved: by 5 percent.
    np.testing.assert_allclose(state.params["u"], 0.95 * params()["u"], rtol=1e-6)
    # Pasted, and as "freeze": nothing is told, and no bit of it moves.
    pasted = eval(
        re.search(r"write: (frozen=.*?), or", str(told.message))[1].replace(
            "frozen=", ""
        )
    )
    frozen = make_step(loss, ADAMW, frozen=pasted, **options_of(loss))
    freezes = make_step(loss, ADAMW, untrained="freeze", **options_of(loss))
    p = params() | {"u": SPECIAL} if loss in (unused, in_aux_alone) else params()
    ends = []
    for step, start in ((frozen, frozen.init(p)), (freezes, freezes.init(p, X))):
        for _ in range(3):
            start, _ = step(start, X)
        assert_same_bits(start.params["u"], p["u"])
        assert start.params["u"] is p["u"]
        shapes = [x.shape for x in jax.tree.leaves(start.opt_state)]
        assert shapes.count((3,)) == 2  # the moments of w
        ends.append(start)
    jax.tree.map(assert_same_bits, *ends)


def of_a_branch(p, x):
    return jax.lax.cond(x[0] > 5, lambda: base(p, x + p["u"]), lambda: base(p, x))


def times_zero(p, x):
    return base(p, x + 0 * p["u"])


def straight_through(p, x):
    return base(p, x + sg.straight_through(jnp.round)(p["u"]))


def of_a_remat_scan(p, x):
    layer = jax.checkpoint(lambda c, x: (jnp.tanh(c + x), None))
    return base(p, jax.lax.scan(layer, p["u"], x)[0])


def reversed_gradient(p, x):
    return base(p, x + sg.reverse_gradient(p["u"]))


def saturated(p, x):
    """Zero at these values, and not at others."""
    return base(p, x + jax.nn.relu(p["u"] - 100))


@pytest.mark.parametrize(
    "loss",
    [
        of_a_branch,
        times_zero,
        straight_through,
        of_a_remat_scan,
        reversed_gradient,
        saturated,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_connected_is_not_told(loss):
    step = make_step(loss, ADAMW, untrained="error")
    state, _ = step(step.init(params()), X)
    assert state.step == 1


def from_start(step, w):
    return step(step.init(params() | {"w": w}), X)


def test_it_is_told_once_for_each_tree():
    step = make_step(unused, ADAMW)
    wider = params() | {"v": f32(1.0)}

    def run(p, x=X):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = step.init(p)
            for _ in range(2):
                state, _ = step(state, x)
        return [str(w.message) for w in caught]

    (first,) = run(params())
    assert '"u"' in first
    # The same tree, and the same tree with another batch
    assert not run(params())
    assert not run(params(), jnp.ones((2, 3), jnp.float32))
    (second,) = run(wider)
    assert re.search('"u", "v": the loss', second)
    # In a loop, and in programs of the user's
    for wrap in (
        lambda s: fit(s, s.init(params()), lambda n: X, steps=2, progress=False),
        lambda s: jax.jit(s)(s.init(params()), X),
        lambda s: jax.lax.scan(s, s.init(params()), X[None]),
        lambda s: jax.vmap(functools.partial(from_start, s))(X[None]),
    ):
        again = make_step(unused, ADAMW)
        with WARNS(match='"u": the loss is not computed') as caught:
            wrap(again)
        assert [w.filename for w in caught] == [__file__]


def many(p, x):
    scale = jax.lax.stop_gradient(p["enc"]["a"]["w"] + p["enc"]["b"]["w"])
    return base(p, x * scale + jnp.round(p["head"]["w"]) + p["head"]["b"])


def deep():
    leaf = f32(1.0, 2.0, 3.0)
    enc = {"a": {"w": leaf}, "b": {"w": leaf}}
    return {"enc": enc, "head": {"w": leaf, "b": leaf}, "w": leaf, "n": jnp.int32(3)}


@pytest.mark.parametrize(
    ("before", "write"),
    [
        (None, 'frozen=["enc", "head/w"]'),
        ("enc/a", 'frozen=["enc/a", "enc", "head/w"]'),
        (["enc/a", "w"], 'frozen=["enc/a", "w", "enc", "head/w"]'),
        ("!head", 'frozen=["!head", "head/w"]'),
        (lambda path, leaf: path == "w", 'untrained="freeze"'),
        ({"enc": False, "head": False, "w": True, "n": False}, 'untrained="freeze"'),
    ],
    ids=["nothing", "a path", "a list", "negated", "a function", "booleans"],
)
def test_whole_subtrees_are_named_and_what_was_frozen_is_kept(before, write):
    step = make_step(many, ADAMW, frozen=before, untrained="error")
    with pytest.raises(ValueError, match=f"write: {re.escape(write)}") as caught:
        step(step.init(deep()), X)
    assert '"head/w": the derivative of round' in str(caught.value)
    assert ('"enc": stop_gradient' in str(caught.value)) == (before != "!head")
    if write.startswith("frozen"):
        pasted = eval(write.removeprefix("frozen="))
        step = make_step(many, ADAMW, frozen=pasted, untrained="error")
        state, _ = step(step.init(deep()), X)
        assert_same_bits(state.params["enc"]["a"]["w"], deep()["enc"]["a"]["w"])


@pytest.mark.parametrize("key", ["a/b", "a*", "!w"])
def test_keys_that_look_like_addresses(key):
    """A key with a "/" is written in brackets; the others are the paths they are."""
    p = {"w": X, key: X, "a": {"b": X}, "ab": X}
    loss = lambda p, x: base(p, x + p["a"]["b"] + p["ab"])
    step = make_step(loss, ADAMW, untrained="error")
    path = f"['{key}']" if key == "a/b" else key
    with pytest.raises(ValueError, match=re.escape(f'write: frozen="{path}", or')):
        step(step.init(p), X)
    freezes = make_step(loss, ADAMW, untrained="freeze")
    state, _ = freezes(freezes.init(p, X), X)
    assert state.params[key] is p[key]
    step = make_step(loss, ADAMW, frozen=path, untrained="error")
    state, _ = step(step.init(p), X)
    assert_same_bits(state.params[key], p[key])
    assert not jnp.array_equal(state.params["ab"], p["ab"])
    assert not jnp.array_equal(state.params["a"]["b"], p["a"]["b"])


def test_lists_end():
    """Of forty leaves and twenty causes, eight are shown of each."""
    p = {"w": X, "a": {"w": X}} | {f"u{k:02}": X for k in range(40)}
    step = make_step(lambda p, x: base(p["a"], x) * p["w"][0], ADAMW, untrained="error")
    with pytest.raises(ValueError, match=r'"u07" and 32 more: the loss is not'):
        step(step.init(p), X)
    eval_ = [eval(f"lambda u: jax.lax.stop_gradient(u) * {k}") for k in range(20)]
    loss = lambda p, x: (
        base(p["a"], x) * p["w"][0]
        + sum(f(p[f"u{k:02}"]).sum() for k, f in enumerate(eval_))
    )
    step = make_step(loss, ADAMW, untrained="error")
    with pytest.raises(ValueError, match="leaves whose gradient is zero"):
        step(step.init(p), X)


@pytest.mark.usefixtures("usual_settings")
@pytest.mark.parametrize("untrained", ["warn", "error", "freeze"])
def test_a_loss_that_trains_nothing_raises(untrained):
    loss = lambda p, x: base(jax.lax.stop_gradient(p), x)
    step = make_step(loss, ADAMW, untrained=untrained)
    with pytest.raises(
        ValueError,
        match=r"depends on a leaf that trains[\s\S]*trains nothing:[\s\S]*"
        rf'"u": the loss is not computed[\s\S]*"w": stop_gradient, on purpose {HERE}'
        r'[\s\S]*write: .*untrained="ignore"',
    ):
        step(step.init(params(), X), X)


def test_one_array_that_nothing_trains_is_called_as_the_loss_calls_it():
    step = make_step(lambda weights, x: jnp.sum(jnp.round(weights) * x), ADAMW)
    with pytest.raises(ValueError, match='"weights": the derivative of round'):
        step(step.init(X), X)


def test_ignored_leaves_are_not_looked_at():
    loss = lambda p, x: base(jax.lax.stop_gradient(p), x)
    step = make_step(loss, ADAMW, untrained="ignore")
    state, _ = step(step.init(params()), X)
    np.testing.assert_allclose(state.params["w"], 0.95 * params()["w"], rtol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_nothing_of_it_is_in_the_compiled_step(accumulate):
    def text(step, state):
        return step.lower(state, X).as_text()

    loss = lambda p, x: stopped(p, x)
    texts = {}
    for untrained in ("ignore", "warn"):
        step = make_step(loss, ADAMW, untrained=untrained, accumulate=accumulate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            texts[untrained] = text(step, step.init(params()))
    assert texts["ignore"] == texts["warn"]
    frozen = make_step(loss, ADAMW, frozen="u", accumulate=accumulate)
    freezes = make_step(loss, ADAMW, untrained="freeze", accumulate=accumulate)
    states = frozen.init(params()), freezes.init(params(), X)
    assert text(frozen, states[0]) == text(freezes, states[1])


# What goes wrong --------------------------------------------------------------------


def test_options_are_checked():
    match = r'is "warn", "error", "freeze" or "ignore"[\s\S]*\'drop\'[\s\S]*write: '
    with pytest.raises(ValueError, match=match):
        make_step(base, ADAMW, untrained="drop")


def test_where_it_cannot_be_told_training_goes_on(monkeypatch):
    def fails(self, leaves):
        raise NotImplementedError("a primitive of tomorrow")

    monkeypatch.setattr(Examined, "causes", fails)
    step = make_step(unused, ADAMW)
    with WARNS(
        match=r"of which it can be told[\s\S]*a primitive of tomorrow[\s\S]*"
        r'untrained="ignore"'
    ) as caught:
        state, _ = step(step.init(params()), X)
    step(state, X)
    assert len(caught) == 1
    step = make_step(unused, ADAMW, untrained="error")
    with pytest.raises(NotImplementedError, match="of tomorrow"):
        step(step.init(params()), X)


@jax.custom_vjp
def dead(u):
    return u


dead.defvjp(lambda u: (u, None), lambda _, ct: (jnp.zeros_like(ct),))


def ruled_here(p, x):
    u = jax.custom_gradient(lambda u: (u, jnp.zeros_like))(p["u"])
    return base(p, x + u)


def ruled_elsewhere(p, x):
    return base(p, x + dead(p["u"]))


@pytest.mark.parametrize(("loss", "count"), [(ruled_here, 1), (ruled_elsewhere, 2)])
def test_a_place_is_told_once(loss, count):
    """Of a rule that is written where it is used; else both places are told."""
    step = make_step(loss, ADAMW)
    with WARNS(match="returns zero") as caught:
        step(step.init(params()), X)
    with pytest.raises(AssertionError, match="returns zero") as raised:
        sg.assert_gradient(loss, "p/u")(params(), X)
    for told in (str(caught[0].message), str(raised.value).splitlines()[1]):
        places = re.findall(r"test_train_untrained\.py:\d+", told)
        assert len(set(places)) == len(places) == count
