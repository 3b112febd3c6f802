"""`make_step`: a loss and an optimizer become a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import optax

from stopgrad_jax._address import Address
from stopgrad_jax._checks import option, whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import function_name, wrong
from stopgrad_jax._program.lookup import addresses_in
from stopgrad_jax._where import Where
from stopgrad_jax.freezing import freeze

from ._gradient import Objective
from ._objective import Loss
from ._step import Step
from ._untrained import OPTIONS
from ._update import Update
from ._watch import Watch


@public
def make_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    frozen: Where = None,
    has_aux: bool = False,
    accumulate: int = 1,
    weighted: bool | None = None,
    stats: Sequence[Address] | Address = (),
    nonfinite: Literal["report", "skip"] | None = None,
    untrained: Literal["warn", "error", "freeze", "ignore"] = "warn",
    donate: bool = True,
) -> Step:
    """Turn a loss and an optimizer into a jitted training step.

    It is the step that one writes by hand, with nothing added: the frozen leaves have
    no gradient, no optimizer state, no decay, and are handed on as the same arrays.

    Forward: `loss(params, batch)`, and new parameters by `optimizer`.
    Backward: that of `loss`, by the leaves that train alone; the others are constants.

    Args:
      loss: a function of (params, batch), or (params, batch, key) where the step is
        called with a key, that returns a real scalar, or what `has_aux` and `weighted`
        say. Traced where a step first meets a tree and a batch of their shapes.
      optimizer: any optax transformation. One that takes more than gradients
        (`optax.lbfgs`, `optax.contrib.reduce_on_plateau`) gets `value`, `grad` and
        `value_fn`. Gradients of complex leaves are conjugated, so that they descend.
      frozen: which leaves do not train: a path from the parameters' root, a list of
        paths, a boolean pytree, or a predicate (path, leaf), asked once. Leaves that
        carry no gradient never train.
      has_aux: the loss returns (scalar, anything); the step's metrics have it as "aux".
      accumulate: split each batch into this many micro-batches, one after the other,
        and average their losses and gradients: the memory of one of them. That is the
        result of the whole for a mean over examples that count the same, linear gates
        and no statistics of the batch (BatchNorm); a nonlinear gate sees the cotangent
        of its micro-batch. Each micro-batch is every k-th example; its key is
        `jax.random.fold_in(key, i)`; "aux" has a leading axis of them.
      weighted: True: the loss returns (sum, weight), with `has_aux` ((sum, weight),
        aux), and the step trains sum / weight: of micro-batches, and in a `shard_map`
        of devices, both are added up and divided once, so a masked mean is that of the
        whole batch. Weights come first, so the loss is evaluated twice where they take
        that; they may depend on the parameters. Without any weight the loss is nan and
        the gradient zero. False: micro-batches count the same, on purpose. None: the
        same, with a warning where a term of the loss is divided by a number that
        depends on the batch, or examples in it by a sum over the batch.
      stats: addresses in the loss whose gradients' sizes are wanted as the metric
        "stats", {address: `Stats`}, see `sg.gradient_stats`. With `accumulate` they
        have a leading axis of micro-batches; if `weighted`, of their shares of the
        whole. What underflows to zero in float16 is finite: see `zero_fraction`.
      nonfinite: "report" tells in the metric "nonfinite", {path: bool}, which leaves
        have a nan or inf in their gradient (or, where all gradients are finite, in
        their update), and in the metric "zero" which have a gradient that is zero at
        every entry (as one that underflows). "skip" also leaves parameters and
        optimizer as they were in a step with a nan or inf; the step is counted.
      untrained: what happens to leaves that the loss cannot train (stopped, rounded,
        unused), which an optimizer may still decay. "warn" names them and the cause,
        once; "error" raises; "freeze" treats them as `frozen` does, and
        `step.init(params, batch)` wants a batch to look at; "ignore" does not look. A
        loss that trains nothing raises, unless they are ignored.
      donate: reuse the memory of the old state for the new one.

    Returns:
      A `Step`. `step.init(params)` is a `State` with `.params`, `.opt_state` and
      `.step`; `step(state, batch, key=None)` returns the next one and a dict of
      metrics: "loss" and what was asked for. It works under any transformation of
      JAX, and keeps every array's sharding.

    Raises:
      TypeError: the loss is no real scalar (or no pair, with `has_aux`), or the
        optimizer no optax transformation.
      ValueError: a batch that `accumulate` does not divide, a state of another
        optimizer or tree, parameters of which none trains, an option out of range, or
        a model whose own state (running statistics, counts of random numbers) would be
        trained or would never move.
      AddressError: `frozen` matches nothing.

    Example:
        >>> import jax.numpy as jnp, optax, stopgrad_jax as sg
        >>> def loss(params, x):
        ...     return jnp.mean((params["encoder"] * x * params["head"] - 6.0) ** 2)
        >>> step = sg.train.make_step(loss, optax.sgd(0.1), frozen="encoder")
        >>> state = step.init({"encoder": 2.0, "head": 1.0})
        >>> for _ in range(20):
        ...     state, metrics = step(state, jnp.ones(4))
        >>> print(state.params["encoder"], f"{state.params['head']:.2f}")
        2.0 3.00
    """
    called = f"make_step({function_name(loss)}, ...)"
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise wrong(
            TypeError,
            called,
            "an optax transformation",
            f"{optimizer!r:.60}",
            "make_step(loss, optax.adam(1e-3))",
        )
    whole(accumulate, "accumulate", called, instead="accumulate=4")
    instead = 'nonfinite="skip" to leave out such steps'
    option(nonfinite, "nonfinite", (None, "report", "skip"), called, instead)
    instead = 'untrained="freeze" for no state and no decay'
    option(untrained, "untrained", OPTIONS, called, instead)
    if weighted not in (None, False, True):
        expected = "weighted is True for a loss that returns (sum, weight), or False"
        raise wrong(TypeError, called, expected, f"{weighted!r:.60}", "weighted=True")
    wants_value = isinstance(optimizer, optax.GradientTransformationExtraArgs)
    if not isinstance(optimizer, optax.GradientTransformation):  # optax.MultiSteps
        pair = (optimizer.init, optimizer.update)
        optimizer = optax.GradientTransformationExtraArgs(*pair)
    addresses = tuple(addresses_in(stats, called, "stats"))
    objective = Objective(Loss(loss, has_aux, bool(weighted)), accumulate, addresses)
    averages = accumulate > 1 and weighted is None
    watch = Watch(objective, frozen, untrained, averages)
    inner = optax.with_extra_args_support(optimizer)
    update = Update(objective, inner, wants_value, nonfinite, watch)
    every = optimizer if frozen is None else freeze(optimizer, frozen)
    return Step(update, every, frozen, donate)
