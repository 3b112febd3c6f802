"""Keep each array of a training state where it lies, over any number of devices.

XLA chooses the layout of what a program returns. A state must come out as it went in:
else its layout drifts from step to step, each time with another compilation, and no
buffer can be used again. On one device nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding


def is_spread(leaf: Any) -> bool:
    """Tell an array that lies on more than one device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or isinstance(sharding, SingleDeviceSharding):
        return False
    return len(sharding.device_set) > 1


def replicated(leaves: Iterable[Any]) -> NamedSharding | None:
    """Return "a copy on each device" for the mesh of these leaves, if they have one."""
    for leaf in leaves:
        if is_spread(leaf) and isinstance(leaf.sharding, NamedSharding):
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return None


def settled(leaves: Sequence[Any], everywhere: NamedSharding | None) -> list[Any]:
    """Put a copy on each device of what nobody has put anywhere."""
    if everywhere is None:
        return list(leaves)
    return [x if _is_placed(x) else jax.device_put(x, everywhere) for x in leaves]


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and (is_spread(leaf) or leaf.committed)


def shardings(leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Return the sharding of each array over several devices, None for the others."""
    return tuple(leaf.sharding if is_spread(leaf) else None for leaf in leaves)


def constrained(leaves: Iterable[Any], layouts: Sequence[Any]) -> list[Any]:
    """Ask for these shardings inside a program."""
    return [
        x if layout is None else jax.lax.with_sharding_constraint(x, layout)
        for x, layout in zip(leaves, layouts, strict=True)
    ]
