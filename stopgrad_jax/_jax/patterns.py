"""Custom rules that are told which operands move: what JAX remembers of them.

Part of `_jax`, the only door to JAX that is version-dependent or not public. The
forward half of a `custom_vjp` with symbolic zeros is traced for each pattern of what
moves, and remembered; what its residuals are is kept once, of the pattern traced last.
So where JAX remembers a pattern it may take another one's residuals for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class _Forgets(dict[Any, Any]):
    """Remembers nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Leave it: it is to be traced again."""


def remembers(eqn: Any) -> bool:
    """Tell a rule of which JAX remembers the patterns of what moves."""
    return _cells_of(eqn) is not None


def forget(eqn: Any) -> None:
    """Let the forward half of a rule be traced each time that JAX asks for it.

    Only of a program that nobody else has: JAX keeps those of `jax.jit` and of scans.
    """
    cells = _cells_of(eqn)
    if cells is not None and not isinstance(cells.cell_contents, _Forgets):
        cells.cell_contents = _Forgets()


def _cells_of(eqn: Any) -> Any:
    """Return where the patterns are kept, or None.

    Not public: the closure of `fwd_jaxpr_thunk`, a parameter of the equation.
    """
    if not eqn.params.get("symbolic_zeros"):
        return None
    thunk = eqn.params.get("fwd_jaxpr_thunk")
    for function in _wrapped(thunk):
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        pairs = zip(names, function.__closure__ or (), strict=True) if names else ()
        for name, cell in pairs:
            if name == "cells" and isinstance(cell.cell_contents, dict):
                return cell
    return None


def _wrapped(thunk: Any) -> Iterator[Any]:
    while thunk is not None:
        yield thunk
        thunk = getattr(thunk, "f", None) or getattr(thunk, "__wrapped__", None)
