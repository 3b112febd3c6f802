"""What a call takes at an address: an error suggests nothing that it would refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from .trace import Place


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a call takes at an address.

    Attributes:
      kinds: of places.
      loops: also values in a loop whose steps are not known.
      rules: also values in the body of a custom rule.
      taken: also values whose derivative has been taken already.
      floats: real floating point only.
      moving: at least one of them carries a gradient.
      traced: each tree that is selected holds one.
    """

    kinds: Sequence[str] = ("argument", "point", "output")
    loops: bool = True
    rules: bool = True
    taken: bool = True
    floats: bool = False
    moving: bool = False
    traced: bool = False

    def fits(self, program: Any, trees: Sequence[Any]) -> bool:
        """Tell whether a call takes what an address selects."""
        every = [list(map(_is_value, jax.tree.leaves(tree))) for tree in trees]
        places = [v for v in jax.tree.leaves(trees) if _is_value(v)]
        types = [program.types[v] for v in places]
        points = [program.plan.found[v.index] for v in places if v.kind == "point"]
        return (
            all(v.kind in self.kinds for v in places)
            and (self.loops or not any(p.dynamic for p in points))
            and (self.rules or not any(p.rule for p in points))
            and (self.taken or not any(p.differentiated for p in points))
            and (not self.floats or all(map(_is_float, types)))
            and (not self.traced or all(map(any, every)))
            and (not self.moving or any(map(_jax.is_differentiable, types)))
        )


ANYTHING = Wanted()
TO_DIFFERENTIATE_BY = Wanted(("argument", "point"), loops=False, rules=False)
TO_DIFFERENTIATE = Wanted(loops=False, rules=False, floats=True, moving=True)


def _is_value(x: Any) -> bool:
    return isinstance(x, Place)


def _is_float(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)
