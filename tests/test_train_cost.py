"""A step is no more than what one writes by hand, and frozen leaves cost nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32
from programs import instructions_of as instructions
from test_train import BATCH, loss, params

from stopgrad_jax.train import fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def hand_written(optimizer, frozen, accumulate=1):
    """Write the step without us: a dict of what trains, and a dict of the rest."""

    def step(trained, rest, opt_state, count, batch):
        value_and_grad = jax.value_and_grad(lambda t, b: loss({**rest, **t}, b))
        if accumulate == 1:
            value, grads = value_and_grad(trained, batch)
        else:
            split = lambda x: x.reshape(-1, accumulate, *x.shape[1:])
            micro = jax.tree.map(split, batch)

            def add(sums, i):
                pick = lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
                value, grads = value_and_grad(trained, jax.tree.map(pick, micro))
                return jax.tree.map(jnp.add, sums, grads), value

            zeros = jax.tree.map(jnp.zeros_like, trained)
            sums, values = jax.lax.scan(add, zeros, jnp.arange(accumulate))
            grads = jax.tree.map(lambda g: g / accumulate, sums)
            value = jnp.mean(values)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return trained, opt_state, count + 1, value

    p = params()
    rest = {k: p[k] for k in frozen}
    trained = {k: p[k] for k in p if k not in frozen}
    args = (trained, rest, optimizer.init(trained), jnp.int32(0), BATCH)
    return jax.jit(step, donate_argnums=(0, 2, 3)), args


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("frozen", [[], ["encoder"]], ids=["all train", "frozen"])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.adamw(1e-2),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    ],
    ids=["sgd", "adamw", "clipped"],
)
def test_no_instruction_more_than_by_hand(optimizer, frozen, accumulate):
    by_hand, args = hand_written(optimizer, frozen, accumulate)
    step = make_step(loss, optimizer, frozen=frozen or None, accumulate=accumulate)
    ours = step.lower(step.init(params()), BATCH)
    assert instructions(ours) <= instructions(by_hand.lower(*args))


def test_reports_cost_only_who_asks():
    plain = make_step(loss, optax.sgd(0.1))
    asked = make_step(loss, optax.sgd(0.1), nonfinite="report")
    ours, theirs = (
        instructions(s.lower(s.init(params()), BATCH)) for s in (plain, asked)
    )
    assert ours < theirs


def test_frozen_leaves_have_no_gradient_and_no_state():
    """User story 10: not in the state, not in the program."""
    p = {"encoder": np.zeros((64, 32), np.float32), "head": np.ones(32, np.float32)}
    p = jax.tree.map(jnp.asarray, p)
    fun = lambda p, x: jnp.sum(jnp.tanh(p["encoder"]) @ p["head"] * x)
    step = make_step(fun, optax.adamw(1e-3), frozen="encoder")
    state = jax.eval_shape(step.init, p)
    assert not [x for x in jax.tree.leaves(state.opt_state) if x.shape == (64, 32)]
    state = step.init(p)
    made = re.compile(r"f32\[64,32\] = (\w+)")
    text = str(jax.make_jaxpr(step)(state, 1.0))
    assert made.findall(text) == ["tanh"]
    # Once in the memory of the compiled program: an argument, and no result.
    memory = step.lower(state, 1.0).compile().memory_analysis()
    frozen = p["encoder"].nbytes
    assert frozen < memory.argument_size_in_bytes < 1.5 * frozen
    assert memory.output_size_in_bytes < frozen / 4


def test_all_of_the_changing_state_is_donated():
    step = make_step(loss, optax.adamw(1e-2), frozen="encoder")
    state = step.init(params())
    text = step.lower(state, BATCH).compile().as_text()
    head, *_ = text.splitlines()
    aliases = re.findall(r"\{\d+\}: \(\d+, \{\}, (?:may|must)-alias\)", head)
    assert len(aliases) == len(jax.tree.leaves(state)) - 1  # but for the encoder


def test_a_chunk_of_steps_has_the_instructions_of_a_scan_by_hand():
    optimizer = optax.adamw(1e-2)
    by_hand, (trained, rest, opt_state, count, _) = hand_written(optimizer, ["encoder"])
    xs = jax.tree.map(lambda x: jnp.stack([x] * 20), BATCH)

    def hand_scan(trained, opt_state, count, rest, xs):
        def body(carry, batch):
            *carry, value = by_hand(*carry[:1], rest, *carry[1:], batch)
            return tuple(carry), value

        return jax.lax.scan(body, (trained, opt_state, count), xs)

    theirs = jax.jit(hand_scan, donate_argnums=(0, 1, 2))
    theirs = theirs.lower(trained, opt_state, count, rest, xs)
    step = make_step(loss, optimizer, frozen="encoder")
    found = []
    real = jax.jit

    def spy(fun, **options):
        jitted = real(fun, **options)
        if fun.__name__ != "fit_steps":
            return jitted
        return lambda *args: (found.append(jitted.lower(*args)), jitted(*args))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", spy)
        fit(step, step.init(params()), xs, steps=20, log_every=20, progress=False)
    (ours,) = found

    assert instructions(ours) <= instructions(theirs)


def test_the_copies_of_init_are_only_of_what_trains():
    p = params()
    step = make_step(loss, optax.sgd(0.1, momentum=0.9), frozen="encoder")
    state = step.init(p)
    assert state.params["encoder"] is p["encoder"]
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((p, state))]
    assert len(set(pointers)) == len(pointers) - 1
    np.testing.assert_array_equal(state.params["head"], f32(1.0, -1.0, 0.5, 2.0))
