"""One-line contracts: when they hold, when they fail, and what they say then."""

import copy
import functools
import gc
import inspect
import warnings

import jax
import jax.numpy as jnp
import models
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


def vq(codebook, z, too_early):
    q = codebook[jnp.argmin(((z[:, None] - codebook) ** 2).sum(-1), -1)]
    if too_early:
        q = z + jax.lax.stop_gradient(q - z)
    return jnp.mean((q - jax.lax.stop_gradient(z)) ** 2)


PAIR = jax.ShapeDtypeStruct((2, 2), jnp.float32)


def line_of(text):
    lines, first = inspect.getsourcelines(vq)
    return first + next(k for k, line in enumerate(lines) if text in line)


def test_the_buggy_vq_fails_and_names_the_line():
    sg.assert_gradient(vq, "codebook")(PAIR, PAIR, False)
    with pytest.raises(AssertionError) as caught:
        sg.assert_gradient(vq, "codebook")(PAIR, PAIR, True)
    rows = str(caught.value).split("\n")
    assert rows[0] == "assert_gradient(vq, 'codebook')"
    assert rows[1].startswith("codebook: expected a gradient, structurally zero")
    assert f"stop_gradient, on purpose: {__file__.rsplit('/', 1)[-1]}" in rows[
        1
    ].replace("tests/", "")
    assert f":{line_of('q = z +')}" in rows[1]
    assert "codebook → q ends here" in str(caught.value)


def test_a_missing_stop_is_told():
    def td(w, target):
        return (w - target) ** 2

    with pytest.raises(
        AssertionError, match="target: expected none, can get a gradient"
    ):
        sg.assert_no_gradient(td, "target")(1.0, 2.0)
    stopped = lambda w, target: td(w, jax.lax.stop_gradient(target))
    sg.assert_no_gradient(stopped, "target")(1.0, 2.0)
    sg.assert_gradient(stopped, "w")(1.0, 2.0)


def test_each_leaf_counts_and_is_listed():
    args = models.ARGS["buggy_vqvae_loss"]
    with pytest.raises(AssertionError) as caught:
        sg.assert_gradient(models.buggy_vqvae_loss, "params")(*args)
    rows = str(caught.value).split("\n\n")[0].split("\n")[1:]
    assert len(rows) == 1
    assert rows[0].startswith("params/codebook: expected a gradient")
    sg.assert_gradient(models.buggy_vqvae_loss, ["params/enc", "params/dec/*"])(*args)


def test_ints_do_not_count_and_nothing_to_check_raises():
    both = lambda p: p["w"] * p["n"]
    sg.assert_gradient(both, "p")({"w": 1.0, "n": jnp.array(3)})
    with pytest.raises(TypeError, match="carries a gradient"):
        sg.assert_gradient(both, "p/n")({"w": 1.0, "n": jnp.array(3)})


def test_several_outputs_must_be_told_apart():
    def loss(w):
        return {"loss": w**2, "metric": jnp.round(w)}

    with pytest.raises(TypeError, match='ys="return/loss"'):
        sg.assert_gradient(loss, "w")(1.0)
    sg.assert_gradient(loss, "w", ys="return/loss")(1.0)
    sg.assert_no_gradient(loss, "w", ys="return/metric")(1.0)
    sg.assert_gradient(loss, "w", ys="return")(1.0)


def test_what_has_no_rule_breaks_both():
    hosted = lambda x: jax.pure_callback(
        lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x
    )
    x = jax.ShapeDtypeStruct((), jnp.float32)
    for check in (sg.assert_gradient, sg.assert_no_gradient):
        with pytest.raises(AssertionError, match=r"jax\.grad raises at"):
            check(hosted, "x")(x)


def test_points_and_unknown_addresses():
    named = lambda w: jnp.round(sg.name(w * 2, "h")) + w
    sg.assert_no_gradient(named, "h")(1.0)
    sg.assert_gradient(named, "w")(1.0)
    with pytest.raises(sg.AddressError, match="one of"):
        sg.assert_gradient(named, "v")(1.0)


def test_the_words_of_the_query_are_the_same():
    args = [
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), a)
        for a in models.ARGS["ddqn_loss"]
    ]
    ask = sg.gradients(models.ddqn_loss, "target", unconnected_gradients="error")
    with pytest.raises(ValueError, match="every x must reach") as query:
        ask(*args)
    (cut,) = [
        c
        for c in sg.flow(models.ddqn_loss, xs="target")(*args).cuts
        if "target" in c.inputs
    ]
    assert f"{cut.words} ({cut.site.place})" in str(query.value)


def test_a_prevented_gradient_is_told_with_its_place():
    def loss(w, labels):
        return w * sg.prevent_gradient(labels, "labels are data")

    flow = sg.flow(loss)(1.0, 2.0)
    assert [i.status for i in flow.inputs] == ["flows", "unknown"]
    first = str(flow.explain("labels")).split("\n")[0]
    phrase = first.removeprefix("labels (f32[]): ").removesuffix(", which raises.")
    with pytest.raises(TypeError, match="labels are data") as raised:
        jax.grad(loss, 1)(1.0, 2.0)
    assert phrase in str(raised.value)


# As functions are -------------------------------------------------------------------

CONTRACTS = {
    "assert_gradient": functools.partial(sg.assert_gradient, xs="w"),
    "assert_no_gradient": functools.partial(sg.assert_no_gradient, xs="w"),
    "check_gradients": sg.check_gradients,
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_is_a_method(name):
    class Net:
        scale = 2.0

        @CONTRACTS[name]
        def check(self, w):
            assert self.scale == 2.0
            stopped = jax.lax.stop_gradient(w)
            return self.scale * (stopped if name == "assert_no_gradient" else w)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Net().check(1.0)
        Net().check(w=1.0)
        Net.check(Net(), 1.0)  # as an attribute of the class it is itself
        del Net
        gc.collect()


def test_a_method_whose_contract_is_broken():
    class Net:
        @functools.partial(sg.assert_gradient, xs="w")
        def check(self, w):
            return jnp.round(w)

    with pytest.raises(AssertionError, match="w: expected a gradient"):
        Net().check(1.0)


def test_a_method_that_is_never_called_warns():
    contract = sg.assert_gradient(lambda self, w: w, "w")
    bound = contract.__get__(object())
    del bound
    with pytest.warns(RuntimeWarning, match="never called"):
        del contract


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("name", CONTRACTS)
def test_a_call_of_a_copy_counts(name, copied):
    def f(w):
        return jax.lax.stop_gradient(w) * 2.0 if name == "assert_no_gradient" else w

    contract = CONTRACTS[name](f)
    other = copied(contract)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(1.0)
        del contract, other
        gc.collect()
    contract = CONTRACTS[name](f)
    other = copied(contract)
    with pytest.warns(RuntimeWarning, match="never called") as caught:
        del contract, other
    assert len(caught) == 1
