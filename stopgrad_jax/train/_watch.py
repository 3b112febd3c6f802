"""What a step tells of its loss: at trace time, once for each tree of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax

import stopgrad_jax._words.train as words
from stopgrad_jax._edge import warn
from stopgrad_jax._errors import beats, shortened, wrong
from stopgrad_jax._where import Where

from ._examine import Examined
from ._gradient import Objective
from ._model_state import Stateful, refuse_lost, refuse_trained, stateful
from ._state import Layout, Parted
from ._untrained import by_cause, frozen_too


class Watch:
    """Looks at a loss when it is traced: raises, or has something to tell.

    Args:
      objective: the loss.
      frozen: what its user froze.
      untrained: what is to happen to leaves that the loss cannot train.
      averages: micro-batches are averaged, and the user did not say that they may be.
    """

    def __init__(
        self, objective: Objective, frozen: Where, untrained: str, averages: bool
    ) -> None:
        """Nothing is looked at yet."""
        self._objective, self._frozen = objective, frozen
        self._untrained, self._averages = untrained, averages
        self._states: dict[Layout, list[Stateful]] = {}
        self._told: set[Hashable] = set()
        self._waiting: list[str] = []

    @property
    def freezes(self) -> bool:
        """Whether what the loss cannot train is to be frozen."""
        return self._untrained == "freeze"

    def begin(self, layout: Layout, params: Any) -> None:
        """Look at a tree that has not been trained yet."""
        states = self._states[layout] = stateful(params)
        trained, called = layout.numbers("trained"), self._objective.called
        refuse_trained(states, trained, self._frozen, called)

    def frozen(
        self, layout: Layout, trained: Any, rest: Any, batch: Any, key: Any
    ) -> Layout:
        """Return the layout in which what the loss cannot train is frozen."""
        kinds = list(layout.kinds)

        def look(*args: Any) -> tuple[()]:
            examined = self._examined(split := Parted(layout, *args[:2]), *args[2:])
            causes = examined.causes(layout.numbers("trained"))
            self._refuse_all(split, causes)
            for k in causes:
                kinds[k] = "untrained"
            return ()

        jax.eval_shape(look, trained, rest, batch, key)
        frozen = dataclasses.replace(layout, kinds=tuple(kinds))
        self._states[frozen] = self._states[layout]
        return frozen

    def look(
        self, layout: Layout, trained: Any, rest: Any, batch: Any, key: Any
    ) -> None:
        """Look at a step that is being traced."""
        asks, states = self._untrained != "ignore", self._states[layout]
        if not (asks or self._averages or states):
            return
        split = Parted(layout, trained, rest)
        examined = self._examined(split, batch, key)
        refuse_lost(states, examined, self._objective.called)
        if self._averages and (line := examined.divides_by_batch()):
            self._note((layout, line), words.divides_by_batch(line))
        if asks:
            self._look_at_leaves(split, examined)

    def tell(self) -> None:
        """Give the warnings that came up, at the line of the user's that called."""
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            warn(message)

    def _examined(self, split: Parted, batch: Any, key: Any) -> Examined:
        return Examined(self._objective, split, batch, key)

    def _look_at_leaves(self, split: Parted, examined: Examined) -> None:
        layout, called = split.layout, self._objective.called
        held = layout.numbers("untrained")
        try:
            causes = examined.causes([*layout.numbers("trained"), *held])
        except Exception as error:
            if self._untrained != "warn":
                raise
            # What was not asked for may not end a training that would go on.
            return self._note(layout, words.unknown(shortened(error)))
        thawed = {k: "" for k in held if k not in causes}
        if thawed:
            told = words.thawed(self._by_cause(split, thawed)[""])
            raise wrong(ValueError, called, *told)
        causes = {k: why for k, why in causes.items() if k not in held}
        self._refuse_all(split, causes)
        new = {k: why for k, why in causes.items() if (layout, k) not in self._told}
        if not new:
            return
        params = layout.join(split.trained, split.rest)
        trained = layout.numbers("trained")
        frozen = frozen_too(params, trained, causes, self._frozen)
        told = words.untrained(self._by_cause(split, new), frozen)
        if self._untrained == "error":
            raise wrong(ValueError, called, *told)
        self._told.update((layout, k) for k in new)
        self._waiting.append(beats(called, *told))

    def _refuse_all(self, split: Parted, causes: Mapping[int, str]) -> None:
        """Raise where nothing is left that trains."""
        if len(causes) == len(split.trained):
            told = words.nothing_trains(self._by_cause(split, causes))
            raise wrong(ValueError, self._objective.called, *told)

    def _by_cause(self, split: Parted, causes: Mapping[int, str]) -> Any:
        layout = split.layout
        params = layout.join(split.trained, split.rest)
        candidates = [*layout.numbers("trained"), *layout.numbers("untrained")]
        return by_cause(params, candidates, causes, self._objective.loss.argument)

    def _note(self, which: Hashable, told: words.Beats) -> None:
        if which not in self._told:
            self._told.add(which)
            self._waiting.append(beats(self._objective.called, *told))
