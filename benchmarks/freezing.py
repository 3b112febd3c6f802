"""(f) Nine parts of ten frozen: time and memory against the usual recipes.

The model is ten square layers; the first nine are frozen. Every recipe trains the last
one with adamw, and none decays the frozen ones but the first, which is what people
write first (user story 1).
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from measure import repeated, side_by_side

import stopgrad_jax as sg

LAYERS, WIDTH, BATCH = 10, 512, 64
FROZEN = [f"layer{k}" for k in range(LAYERS - 1)]
TRAINED = f"layer{LAYERS - 1}"


def forward(params, x):
    """Apply the layers."""
    for k in range(LAYERS):
        x = jnp.tanh(x @ params[f"layer{k}"])
    return jnp.mean(x**2)


def stopped_loss(params, x):
    """Stop the gradient of the frozen layers, as is usually done."""
    stopped = {k: lax.stop_gradient(v) for k, v in params.items() if k in FROZEN}
    return forward(params | stopped, x)


def recipes():
    """Name -> (make the state, step, what the gradients are)."""
    adamw = optax.adamw(1e-3)
    frozen = sg.freeze(adamw, FROZEN)
    labels = {k: "frozen" if k in FROZEN else "trained" for k in [*FROZEN, TRAINED]}
    split = optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, labels)

    def ours(params, x):
        train, rest = sg.partition(params, TRAINED)
        return jax.grad(lambda t: forward(sg.combine(t, rest), x))(train)

    def hand_grads(params, x):
        rest = {k: params[k] for k in FROZEN}
        return jax.grad(lambda w: forward(rest | {TRAINED: w}, x))(params[TRAINED])

    def hand_step(params, state, x):
        grad = hand_grads(params, x)
        update, state = adamw.update(grad, state, params[TRAINED])
        new = optax.apply_updates(params[TRAINED], update)
        return params | {TRAINED: new}, state

    def step(tx, grads):
        def run(params, state, x):
            updates, state = tx.update(grads(params, x), state, params)
            return optax.apply_updates(params, updates), state

        return run

    stop = jax.grad(stopped_loss)
    return {
        "sg.freeze + sg.partition": (frozen.init, step(frozen, ours), ours),
        "partitioned by hand": (
            lambda params: adamw.init(params[TRAINED]),
            hand_step,
            hand_grads,
        ),
        "stop_gradient + adamw": (adamw.init, step(adamw, stop), stop),
        "stop_gradient + optax.partition": (split.init, step(split, stop), stop),
    }


def rows():
    """One row for each recipe, timed against ours."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = {
        f"layer{k}": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
        for k, key in enumerate(keys)
    }
    x = jnp.ones((BATCH, WIDTH))
    runs = {}
    for name, (init, step, grads) in recipes().items():
        state = init(params)
        runs[name] = repeated(jax.jit(step), params, state, x, times=5)
        runs[name].memory = {
            "gradients_MiB": _mebibytes(jax.eval_shape(grads, params, x)),
            "optimizer_MiB": _mebibytes(state),
        }
    first = next(iter(runs))
    for name, run in runs.items():
        row = side_by_side(runs[first], run)
        yield f"f. sg.freeze against {name}", {**row, **run.memory}


def _mebibytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20
