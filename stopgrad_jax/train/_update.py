"""One training step as a pure function of arrays, as one would write it by hand."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import leaf_paths
from stopgrad_jax._errors import quoted, wrong

from ._gradient import Objective
from ._state import Layout, Parted
from ._watch import Watch


@dataclasses.dataclass(frozen=True)
class Update:
    """What a step does with a gradient."""

    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    wants_value: bool  # the optimizer takes the loss and its function
    nonfinite: str | None
    watch: Watch

    def __call__(
        self,
        layout: Layout,
        trained: list[Any],
        rest: list[Any],
        opt_state: Any,
        count: Any,
        batch: Any,
        key: Any,
    ) -> tuple[list[Any], Any, Any, dict[str, Any]]:
        """Return the new (trained, opt_state, count), and metrics."""
        _refuse_unchecked()
        params = layout.alone(trained)
        self._check(opt_state, params)
        self.watch.look(layout, trained, rest, batch, key)

        objective, split = self.objective, Parted(layout, trained, rest)
        value, gradients, aux, stats = objective.gradients(split, batch, key)
        loss = value.mean
        # JAX's gradient of a real function of complex z points against the descent.
        grads = layout.alone(jnp.conj(g) if _is_complex(g) else g for g in gradients)
        extra = {}
        if self.wants_value:

            def value_fn(tree: Any) -> jax.Array:
                there = split._replace(trained=jax.tree.leaves(tree))
                return objective.value(there, batch, key)

            extra = {"value": loss, "grad": grads, "value_fn": value_fn}
            extra = _taken(self.optimizer.update, extra)
        updates, changed = self.optimizer.update(grads, opt_state, params, **extra)
        moved = jax.tree.leaves(optax.apply_updates(params, updates))
        new = [_like(x, old) for x, old in zip(moved, trained, strict=True)]
        changed = jax.tree.map(_like, changed, opt_state)

        metrics: dict[str, Any] = {"loss": loss}
        if objective.loss.has_aux:
            metrics["aux"] = aux
        if objective.stats:
            metrics["stats"] = stats
        if self.nonfinite:
            bad = _nonfinite(gradients, jax.tree.leaves(updates))
            paths = _paths(params, objective.loss.argument)
            metrics["nonfinite"] = dict(zip(paths, bad, strict=True))
            zero = [~_anywhere(g != 0) for g in gradients]
            metrics["zero"] = dict(zip(paths, zero, strict=True))
            if self.nonfinite == "skip":
                skip = jnp.any(jnp.stack(bad))
                new, changed = jax.tree.map(
                    lambda new, old: jax.lax.select(skip, old, new),
                    (new, changed),
                    (trained, opt_state),
                )
        return new, changed, count + 1, metrics

    def _check(self, opt_state: Any, params: Any) -> None:
        """Refuse a state that this optimizer did not make for these parameters."""
        expected = jax.eval_shape(self.optimizer.init, params)
        ours, theirs = _shapes(expected), _shapes(opt_state)
        same = jax.tree.structure(expected) == jax.tree.structure(opt_state)
        if same and ours == theirs:
            return
        missing = {k: v for k, v in ours.items() if theirs.get(k) != v}
        excess = {k: v for k, v in theirs.items() if ours.get(k) != v}
        if not (missing or excess):
            missing = {"": jax.tree.structure(expected)}
            excess = {"": jax.tree.structure(opt_state)}
        raise wrong(
            ValueError,
            "step(state, batch)",
            "the optimizer's state is one that this step made for these "
            f"parameters, with {_listed(missing) or 'nothing else'}",
            _listed(excess) or "none of it",
            "state = step.init(params), or step.migrate(state, old_step) to keep "
            "the moments of another step",
        )


def _refuse_unchecked() -> None:
    """Refuse what would train each device's copy on its own part of the batch."""
    axes = _jax.unchecked_axes()
    if axes:
        raise wrong(
            ValueError,
            "step(state, batch)",
            "in a shard_map, one that knows which values differ by device: it adds "
            "the gradients of a parameter up over the devices, once",
            f"shard_map(..., check_vma=False) over {quoted(sorted(axes))}",
            "shard_map(..., check_vma=True)",
        )


def _taken(update: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Leave out what an optimizer does not take: by optax's word it takes any."""
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: x for name, x in extra.items() if name in parameters}


def _is_complex(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _like(new: Any, old: Any) -> jax.Array:
    """Keep the old type, weak or not, so that a step does not trace twice."""
    aval = jax.typeof(old)
    if not hasattr(new, "dtype") or not jnp.issubdtype(new.dtype, jax.dtypes.extended):
        weak = getattr(jax.typeof(new), "weak_type", False)
        if weak or jax.typeof(new).dtype != aval.dtype:
            return jax.lax.convert_element_type(new, aval.dtype)
    return new


def _nonfinite(gradients: list[Any], updates: list[Any]) -> list[jax.Array]:
    """Tell for each leaf if its gradient is not finite; if all are, its update."""
    bad = [_has_nonfinite(g) for g in gradients]
    fine = ~jnp.any(jnp.stack(bad))
    return [b | (fine & _has_nonfinite(u)) for b, u in zip(bad, updates, strict=True)]


def _has_nonfinite(x: jax.Array) -> jax.Array:
    return _anywhere(~jnp.isfinite(x))


def _anywhere(found: jax.Array) -> jax.Array:
    """Tell if any entry is True; in a shard_map all devices come to one decision."""
    anywhere = jnp.any(found)
    axes = tuple(_jax.varying(jax.typeof(anywhere)))
    return jax.lax.pmax(anywhere.astype(jnp.int32), axes) > 0 if axes else anywhere


def _paths(tree: Any, root: str) -> list[str]:
    """Return the path of each leaf; the root's name where the tree is one array."""
    return [path or root for path in leaf_paths(tree)]


def _shapes(tree: Any) -> dict[str, Any]:
    pairs = zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return {path: jnp.shape(leaf) for path, leaf in pairs}


def _listed(found: dict[str, Any], most: int = 4) -> str:
    shown = [
        f'{list(v) if isinstance(v, tuple) else v} at "{k}"' for k, v in found.items()
    ]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
