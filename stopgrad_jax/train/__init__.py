"""Training steps, and a loop that runs them."""

from __future__ import annotations

from ._fit import fit as fit
from ._make_step import make_step as make_step
from ._state import State as State
from ._step import Step as Step

__all__ = ["State", "Step", "fit", "make_step"]


def __dir__() -> list[str]:
    return __all__
