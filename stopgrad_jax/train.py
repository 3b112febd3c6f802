"""Training steps, and a loop that runs them."""

from __future__ import annotations

from .training.loop import fit as fit
from .training.make import make_step as make_step
from .training.state import State as State
from .training.step import Step as Step

__all__ = ["State", "Step", "fit", "make_step"]
