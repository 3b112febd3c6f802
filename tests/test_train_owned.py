"""Nothing of the caller's is ever deleted, whatever an optimizer keeps."""

import inspect
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import f32
from test_train import assert_same_bits

import stopgrad_jax as sg
import stopgrad_jax._jax as _jax
from stopgrad_jax.train import State, fit, make_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
X = jnp.ones((4, 3), jnp.float32)


def params():
    return {"a": jnp.ones((3, 2), jnp.float32), "b": jnp.ones((2, 2), jnp.float32)}


def loss(p, x):
    return jnp.mean((x @ p["a"] @ p["b"] - 1.0) ** 2)


def deleted(*trees):
    return [x.is_deleted() for x in jax.tree.leaves(trees)]


def made():
    """Every optimizer of optax and optax.contrib that numbers alone make."""
    numbers = {
        **dict.fromkeys(["learning_rate", "step_size", "weight_decay", "decay"], 0.1),
        **dict.fromkeys(["max_delta", "max_norm", "clipping", "threshold"], 1.0),
    }
    for module in (optax, optax.contrib):
        for name, make in sorted(vars(module).items()):
            is_public = inspect.isfunction(make) and not name.startswith("_")
            signature = inspect.signature(make) if is_public else None
            if "GradientTransformation" not in str(
                signature and signature.return_annotation
            ):
                continue
            wanted = [
                p.name
                for p in signature.parameters.values()
                if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
            ]
            if name != "chain" and set(wanted) <= numbers.keys():
                yield name, make(**{k: numbers[k] for k in wanted})


with warnings.catch_warnings():  # of optax's own: what it will rename or ask for
    warnings.simplefilter("ignore")
    OPTIMIZERS = dict(made())
contrib = optax.contrib
OPTIMIZERS |= {
    "mechanize": contrib.mechanize(optax.sgd(0.1)),
    "sam": contrib.sam(optax.sgd(0.1), optax.sgd(0.1)),
    "schedule_free": contrib.schedule_free(optax.sgd(0.1), 0.1),
    "add_noise": optax.add_noise(0.1, 0.1, 0),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2),
    "zoom": optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(5)),
    "clipped": optax.chain(optax.clip(1.0), optax.scale_by_backtracking_linesearch(5)),
}
# What these need is no number, with or without us.
for name in ("scale_by_muon", "sophia"):
    del OPTIMIZERS[name]


def test_there_are_as_many_as_optax_has():
    assert len(OPTIMIZERS) > 95
    assert OPTIMIZERS.keys() > {"lbfgs", "prodigy", "muon", "dadapt_adamw", "noisy_sgd"}


def given_away(step, state):
    """Return the arrays that a step would donate, without taking it."""
    layout, args = step._arguments(state, X, None)
    (trained, rest, opt_state, count, *_), _ = step._placed(layout, args)
    return jax.tree.leaves((trained, opt_state, count)), rest


def places(*trees):
    """Return where arrays lie in memory; of keys JAX does not tell."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = [x for x in jax.tree.leaves(trees) if x.size and not is_key(x)]
    return [x.unsafe_buffer_pointer() for x in leaves]


def assert_apart(step, state, *mine):
    """What would be donated shares no memory with the caller's, nor with itself."""
    donated, rest = given_away(step, state)
    donated = places(donated)
    assert len(set(donated)) == len(donated)
    assert set(places(mine, rest)).isdisjoint(donated)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_donated_is_never_the_callers(name):
    """In init, replace and migrate; what a program makes is new (the next test)."""
    p, optimizer = params(), OPTIMIZERS[name]
    part, whole = make_step(loss, optimizer, frozen="b"), make_step(loss, optimizer)
    for step in (part, whole):
        state = step.init(p)
        assert_apart(step, state, p)
        assert_apart(step, state.replace(params=p), p)
    assert_apart(whole, State(p, optimizer.init(p), jnp.int32(0)), p)
    migrated = whole.migrate(part.init(p).replace(params=p), part)
    assert_apart(whole, migrated, p)
    assert_apart(whole, migrated.replace(params=p), p)
    back = part.migrate(migrated, whole)
    assert_apart(part, back, p)
    assert not any(deleted(p))


STEPPED = "adamw lbfgs prodigy dadapt_adamw muon schedule_free_adamw momo mechanize sam"


@pytest.mark.parametrize("name", STEPPED.split())
def test_what_is_stepped_is_never_the_callers(name):
    """The same, run: a deleted array is one that was given away."""
    p, optimizer = params(), OPTIMIZERS[name]
    part, whole = make_step(loss, optimizer, frozen="b"), make_step(loss, optimizer)
    state, _ = part(part.init(p), X)
    state, _ = part(state.replace(params=p), X)
    state = whole.migrate(state.replace(params=p), part)
    state, _ = whole(state, X)
    state, _ = whole(state.replace(params=p), X)
    state, _ = fit(whole, state.replace(params=p), [X] * 2, steps=2, progress=False)
    whole(state, X)
    assert not any(deleted(p, X))


def alternating(share):
    """Generator and discriminator: two losses, one set of parameters."""
    generate = lambda p, x: jnp.mean((p["g"] * x * p["d"] - 1.0) ** 2)
    tell = lambda p, x: jnp.mean((p["d"] * x + p["g"] - 2.0) ** 2)
    steps = {
        "g": make_step(generate, optax.adam(0.1), frozen="d"),
        "d": make_step(tell, optax.adam(0.1), frozen="g"),
    }
    p = {"g": f32(1.0, 2.0, 3.0), "d": f32(3.0, 2.0, 1.0)}
    states = {k: step.init(p) for k, step in steps.items()}
    for _ in range(3):
        for mine, other in ("gd", "dg"):
            states[mine] = share(states[mine], states[other])
            states[mine], _ = steps[mine](states[mine], X)
    return p, states, (generate, tell)


SHARED = {
    "replace": lambda mine, other: mine.replace(params=other.params),
    "one by one": lambda mine, other: mine.replace(params={**other.params}),
    "by hand": lambda mine, other: State(other.params, mine.opt_state, mine.step),
}


@pytest.mark.parametrize("how", SHARED)
def test_two_steps_that_share_parameters(how):
    p, states, losses = alternating(SHARED[how])
    assert not any(deleted(p))
    # By hand, without anything donated
    expected, tx = dict(p), optax.adam(0.1)
    moments = {k: tx.init(p[k]) for k in "gd"}
    for _ in range(3):
        for k, fun in zip("gd", losses, strict=True):
            grad = jax.grad(lambda x, k=k, fun=fun: fun({**expected, k: x}, X))
            updates, moments[k] = tx.update(grad(expected[k]), moments[k])
            expected[k] = optax.apply_updates(expected[k], updates)
    for k in "gd":
        np.testing.assert_allclose(states["d"].params[k], expected[k], rtol=1e-5)


def test_what_stepped_arrays_cost():
    """A state's own arrays are donated as before: not copied, step after step."""
    _, states, _ = alternating(SHARED["replace"])
    before = states["d"].params["d"]
    step = make_step(loss, optax.adam(0.1))
    state, _ = step(step.init(params()), X)
    donated, _ = given_away(step, state)
    assert {id(x) for x in donated} == {id(x) for x in jax.tree.leaves(state)}
    assert _jax.owner_of(before) is _jax.owner_of(states["d"].step)
    # Also what `fit` hands back, and what is saved and restored is copied once.
    looped, _ = fit(step, state, lambda n: X, steps=2, progress=False)
    donated, _ = given_away(step, looped)
    assert {id(x) for x in donated} == {id(x) for x in jax.tree.leaves(looped)}
    restored = pickle.loads(pickle.dumps(looped))
    step(restored, X)
    assert not any(deleted(restored))


def learning_rate(step, p):
    rate = jnp.float32(0.5)
    state = step.init(p)
    state.opt_state.hyperparams["learning_rate"] = rate
    return state, rate


def step_number(step, p):
    number = jnp.int32(7)
    return step.init(p).replace(step=number), number


def alias(step, p):
    """Another array object of the same memory."""
    mine = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), p)
    return step.init(p).replace(params=mine), mine


def changed_in_place(step, p):
    state, mine = step.init(p), jnp.zeros((3, 2), jnp.float32)
    state.params["a"] = mine
    return state, mine


@pytest.mark.parametrize(
    "how",
    [learning_rate, step_number, alias, changed_in_place],
    ids=lambda f: f.__name__,
)
def test_what_is_put_into_a_state_stays_the_callers(how):
    p = params()
    step = make_step(loss, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    state, mine = how(step, p)
    for _ in range(2):
        state, _ = step(state, X)
    assert not any(deleted(p, mine, X))


def test_a_batch_may_be_the_parameters():
    """XLA would refuse to donate an array that the same call reads."""
    distill = lambda p, target: jnp.mean((p["a"] - target["a"] + p["b"][0, 0]) ** 2)
    step = make_step(distill, optax.sgd(0.1))
    state = step.init(params())
    state, metrics = step(state, state.params)
    np.testing.assert_allclose(metrics["loss"], 1.0)  # b[0, 0] alone


def test_arrays_of_numpy_are_not_written_to():
    """On a CPU, JAX may take over their memory."""
    p = {k: np.asarray(x).copy() for k, x in params().items()}
    before = pickle.loads(pickle.dumps(p))
    step = make_step(loss, optax.sgd(0.1))
    state, _ = step(step.init(p).replace(params=p), X)
    step(state, X)
    for k in p:
        np.testing.assert_array_equal(p[k], before[k])


def test_fit_leaves_batches_and_closures_alone():
    """A step that keeps its batch, or an array of its own, in the state it returns."""
    constant, batches = f32(1.0, 2.0), [f32(k, k) for k in range(4)]

    def step(state, batch):
        return {"w": state["w"] + 1, "last": batch, "held": constant}, {}

    start = {"w": f32(0.0, 0.0), "last": batches[0], "held": constant}
    state, _ = fit(step, start, batches, steps=4, progress=False)
    assert not any(deleted(start, batches, constant))
    assert_same_bits(state["last"], batches[3])


def test_a_callback_may_step_from_the_state_it_is_shown():
    """It looks ahead with another step; the loop goes on with what it has."""
    step, seen = make_step(loss, optax.adam(0.1)), []

    def callback(state, metrics):
        ahead, _ = step(state, X)
        seen.append(int(ahead.step))

    state, _ = fit(
        step,
        step.init(params()),
        lambda n: X,
        steps=4,
        log_every=2,
        progress=False,
        callback=callback,
    )
    assert (seen, state.step) == ([3, 5], 4)


# Each takes (mine, other) and returns mine with something of the other's.
TAKEN = {
    "params": lambda mine, other: mine.replace(params=other.params),
    "opt_state": lambda mine, other: mine.replace(opt_state=other.opt_state),
    "step": lambda mine, other: mine.replace(step=other.step),
    "all": lambda mine, other: mine.replace(**other._asdict()),
    "one leaf": lambda mine, other: mine.replace(
        params={**mine.params, "a": other.params["a"]}
    ),
    "by hand": lambda mine, other: State(other.params, mine.opt_state, mine.step),
    "under its name": lambda mine, other: mine._replace(params=other.params),
}


@pytest.mark.parametrize("how", TAKEN)
@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)])
def test_what_is_taken_from_another_state_stays_there(how, optimizer):
    """Both train on, as if each had been given a copy."""
    step, other_step = make_step(loss, optimizer), make_step(loss, optimizer)
    other, _ = other_step(other_step.init(params()), X)
    start, _ = step(step.init(params()), 2.0 * X)
    expected = TAKEN[how](*jax.tree.map(np.array, (start, other)))
    expected, _ = step(expected, X)
    held, kept = jax.tree.leaves(other), pickle.loads(pickle.dumps(other))
    taken, _ = step(TAKEN[how](start, other), X)
    jax.tree.map(assert_same_bits, taken, expected)
    assert not any(deleted(held))
    jax.tree.map(assert_same_bits, other, kept)
    other_step(other, X)
    assert all(deleted(held))  # still its own: donated, not copied


def test_the_best_parameters_so_far_are_restored_twice():
    step = make_step(loss, optax.adam(0.1))
    state, _ = step(step.init(params()), X)
    best = state.params
    for _ in range(2):
        fresh, _ = step(step.init(params()).replace(params=best), X)
        step(fresh, X)
    assert not any(deleted(best))


def test_a_state_of_fit_stays_when_another_one_takes_of_it():
    step = make_step(loss, optax.adam(0.1))
    fitted, _ = fit(step, step.init(params()), [X] * 2, steps=2, progress=False)
    state, _ = step(step.init(params()).replace(params=fitted.params), X)
    step(state, X)
    assert not any(deleted(fitted))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace(step=jnp.int32(0)),
        lambda s: s.replace(step=0),
        lambda s: s.replace(params={**s.params}),
        lambda s: s.replace(params=s.params, opt_state=s.opt_state, step=s.step),
        lambda s: s.replace(),
    ],
)
def test_what_is_left_in_a_state_is_donated(change):
    step = make_step(loss, optax.adam(0.1))
    state, _ = step(step.init(params()), X)
    own = jax.tree.leaves((state.params, state.opt_state))
    step(change(state), X)
    assert all(deleted(own))


def test_what_a_state_takes_is_copied_once():
    step = make_step(loss, optax.adam(0.1))
    other, _ = step(step.init(params()), X)
    state, _ = step(step.init(params()).replace(params=other.params), X)
    donated, _ = given_away(step, state)
    assert {id(x) for x in donated} == {id(x) for x in jax.tree.leaves(state)}


def test_a_state_that_was_used_up_says_so():
    """A name for the same arrays: not another state."""
    step = make_step(loss, optax.adam(0.1))
    state, _ = step(step.init(params()), X)
    again = state.replace(step=jnp.int32(0))
    step(state, X)
    with pytest.raises(RuntimeError, match=r"used up[\s\S]*params=other\.params"):
        step(again, X)


def test_migrating_what_is_kept_for_several_parameters_together():
    flat = optax.flatten(optax.adam(0.1))
    part, whole = make_step(loss, flat, frozen="b"), make_step(loss, flat)
    state = part.init(params())
    with pytest.raises(
        ValueError,
        match=r'array for each parameter[\s\S]*"0/mu" of shape \[6\], where new has '
        r"\[10\][\s\S]*new\.init",
    ):
        whole.migrate(state, part)
    plain = flat.init(params())
    with pytest.raises(ValueError, match="array for each parameter"):
        sg.migrate_state(plain, flat, sg.freeze(flat, "a"), params())
