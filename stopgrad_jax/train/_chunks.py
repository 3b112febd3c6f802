"""Many steps as one program, for `fit`.

The step is traced once. What it hands back as it came (a frozen encoder) is no carry of
the loop and is never donated; all else of the state is.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import printed
from stopgrad_jax._checks import require_arrays
from stopgrad_jax._errors import function_name, type_of, wrong
from stopgrad_jax._program.trace import is_traceable

from ._owned import copied, made
from ._spread import constrained, is_spread, replicated, settled, shardings
from ._state import Held


def given(batch: Any) -> Any:
    """Stand for batches that come from outside."""
    return batch


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that was traced, and how its state is taken apart."""

    jaxpr: Any
    consts: list[Any]
    changing: tuple[bool, ...]  # for each array of the state
    counts: bool  # the step number is used
    metrics: Any  # their structure
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return what changes, and what does not."""
        pairs = list(zip(leaves, self.changing, strict=True))
        return [x for x, c in pairs if c], [x for x, c in pairs if not c]

    def merge(self, changing: Sequence[Any], fixed: Sequence[Any]) -> list[Any]:
        """Undo `split`."""
        sources = {True: iter(changing), False: iter(fixed)}
        return [next(sources[c]) for c in self.changing]


# By step, by the user's function of the step number: no entry outlives either.
_PROGRAMS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Runner:
    """Runs a step on a state that it owns: the arrays it was given are never donated.

    Attributes:
      state: the newest state.
      done: how many steps were taken.
    """

    def __init__(self, step: Callable[..., Any], draw: Any, state: Any, key: Any):
        """Take a state apart; `draw` is `given`, or a function of the step number."""
        self._step, self._draw, self._key = step, draw, key
        leaves, self._structure = jax.tree.flatten(state)
        self._held = [None if is_traceable(x) else Held(x) for x in leaves]
        self._leaves = [x for x in leaves if is_traceable(x)]
        self._owned = [False] * len(self._leaves)
        self.done = 0

    @property
    def state(self) -> Any:
        """Put the state together."""
        return self._joined(self._leaves)

    def given_up(self) -> Any:
        """Return the newest state for good: its next owner may donate what is new."""
        pairs = zip(self._leaves, self._owned, strict=True)
        made([x for x, owns in pairs if owns], (), None)
        return self.state

    def one(self, batch: Any) -> Any:
        """Take one step; return its metrics."""
        called = "fit(step, state, batches)"
        require_arrays(batch, called, "batch of arrays and numbers")
        return self._run(batch, batch, None, 0)

    def many(self, batches: Any, first: int, length: int) -> Any:
        """Take steps in a scan; return their metrics, stacked.

        `batches` has a leading axis of batches, of which `first` is the first to use.
        """
        batch = jax.tree.map(_Row, batches)
        return self._run(batch, batches, length, first)

    def _run(self, batch: Any, data: Any, length: int | None, first: int) -> Any:
        layouts = self._settle(data)
        program = self._program(batch)
        triples = zip(self._leaves, program.changing, self._owned, strict=True)
        # Also one array that stands at two places of the state becomes two.
        self._leaves = [copied(x) if c and not o else x for x, c, o in triples]
        pairs = zip(program.changing, self._owned, strict=True)
        self._owned = [c or o for c, o in pairs]
        which = (length, layouts)
        if which not in program.compiled:
            program.compiled[which] = _compiled(program, *which)
        run, numbers = program.compiled[which], (np.int32(first), np.int32(self.done))
        changing, fixed = program.split(self._leaves)
        flat = jax.tree.leaves(data)
        new, metrics = run(changing, fixed, program.consts, *numbers, flat, self._key)
        self._leaves = program.merge(new, fixed)
        self.done += 1 if length is None else length
        return program.metrics.unflatten(metrics)

    def _settle(self, data: Any) -> tuple[Any, ...] | None:
        everything = [*self._leaves, *jax.tree.leaves(data)]
        if not any(map(is_spread, everything)):
            return None
        self._leaves = settled(self._leaves, replicated(everything))
        return shardings(self._leaves)

    def _joined(self, leaves: Sequence[Any]) -> Any:
        source = iter(leaves)
        return self._structure.unflatten(
            next(source) if held is None else held.value for held in self._held
        )

    def _program(self, batch: Any) -> Program:
        flat, structure = jax.tree.flatten((self._leaves, batch, self._key))
        types = tuple(x.type if isinstance(x, _Row) else jax.typeof(x) for x in flat)
        settings = (
            jax.config.jax_default_matmul_precision,  # type: ignore
            jax.sharding.get_abstract_mesh(),
        )
        which = (self._structure, tuple(self._held), structure, types, settings)
        programs = _kept_with(self._step, self._draw)
        if which not in programs:
            programs[which] = self._traced(batch)
        return programs[which]

    def _traced(self, batch: Any) -> Program:
        """Trace one step on a batch: what all steps of a chunk are."""
        metrics: list[Any] = []
        batch = jax.tree.map(lambda x: x.first if isinstance(x, _Row) else x, batch)

        def once(leaves: Any, number: Any, batch: Any, key: Any) -> Any:
            state = self._joined(leaves)
            own = getattr(state, "step", None)
            number = own if getattr(own, "shape", None) == () else number
            batch = batch if self._draw is given else self._draw(number)
            args = () if key is None else (jax.random.fold_in(key, number),)
            out = self._step(state, batch, *args)
            if not isinstance(out, tuple) or len(out) != 2:
                came = f"{type(out).__name__}"
                raise _wrong_step(self._step, "returns (state, metrics)", came)
            arrays = self._arrays(out[0], leaves)
            values, structure = jax.tree.flatten(out[1])
            metrics.append(structure)
            return arrays, values

        operands = (self._leaves, np.int32(0), batch, self._key)
        closed = jax.make_jaxpr(once)(*operands)
        jaxpr, consts = _jax.closed_over(closed)
        count = len(self._leaves)
        inputs = jaxpr.invars[len(consts) : len(consts) + count]
        came_from = _handed_through(jaxpr)
        pairs = zip(inputs, jaxpr.outvars[:count], strict=True)
        changing = tuple(came_from(out) is not into for into, out in pairs)
        number = jaxpr.invars[len(consts) + count]
        used = [v for eqn in jaxpr.eqns for v in eqn.invars]
        counts = any(v is number for v in [*used, *jaxpr.outvars])
        return Program(jaxpr, consts, changing, counts, metrics[0])

    def _arrays(self, state: Any, before: Sequence[Any]) -> list[Any]:
        """Return the arrays of a new state; it must be like the one before."""
        flat, structure = jax.tree_util.tree_flatten_with_path(state)
        if structure != self._structure:
            came = f"{structure}, after {self._structure}"
            expected = "keeps the structure of its state"
            raise _wrong_step(self._step, expected, came)
        source, result = iter(before), []
        for (path, leaf), held in zip(flat, self._held, strict=True):
            if held is None:
                old = next(source)
                new, now = jax.typeof(leaf), jax.typeof(old)
                if (new.shape, new.dtype) != (now.shape, now.dtype):
                    came = f'{type_of(new)} at "{printed(path)}", after {type_of(now)}'
                    raise _wrong_step(self._step, "keeps the types of its state", came)
                weak = getattr(new, "weak_type", False)
                strong = weak and not getattr(now, "weak_type", False)
                result.append(jnp.asarray(leaf, now.dtype) if strong else leaf)
            elif held != Held(leaf):
                came = f'{leaf!r:.40} at "{printed(path)}", after {held.value!r:.40}'
                expected = "keeps what is no array in its state"
                raise _wrong_step(self._step, expected, came)
        return result


def _kept_with(step: Any, draw: Any) -> dict[Any, Program]:
    try:
        by_draw = _PROGRAMS.setdefault(step, weakref.WeakKeyDictionary())
        return by_draw.setdefault(draw, {})
    except TypeError:  # one that cannot be hashed, or held weakly
        return {}


def _wrong_step(step: Any, expected: str, came: str) -> TypeError:
    return wrong(
        TypeError,
        "fit(step, state, batches)",
        f"the step {function_name(step)} {expected}",
        came,
        "return state.replace(params=...), metrics",
    )


def _compiled(program: Program, length: int | None, layouts: Any) -> Any:
    """Return the jitted function of one step, or of as many in a scan."""
    kept = None
    if layouts is not None:
        pairs = zip(layouts, program.changing, strict=True)
        kept = [layout for layout, changes in pairs if changes]

    def once(
        changing: Any, fixed: Any, consts: Any, number: Any, batch: Any, key: Any
    ) -> tuple[Any, Any]:
        leaves = program.merge(changing, fixed)
        flat = [*consts, *leaves, number, *batch, *jax.tree.leaves(key)]
        out = _jax.evaluate(program.jaxpr, (), flat)
        count = len(program.changing)
        new, _ = program.split(out[:count])
        return new if kept is None else constrained(new, kept), out[count:]

    def fit_steps(
        changing: Any,
        fixed: Any,
        consts: Any,
        first: Any,
        number: Any,
        data: Any,
        key: Any,
    ) -> tuple[Any, Any]:
        # `fixed` is no part of the carry: a scan would hold it twice.
        if length is None:
            return once(changing, fixed, consts, number, data, key)

        def body(carry: Any, x: Any) -> tuple[Any, Any]:
            i, batch = x
            now = number if i is None else number + i
            return once(carry, fixed, consts, now, batch, key)

        steps = jnp.arange(length, dtype=jnp.int32) if program.counts else None
        rows = [_rows(x, first, length) for x in data]
        return jax.lax.scan(body, changing, (steps, rows), length)

    out: dict[str, Any] = {}
    if kept is not None:
        out = {"out_shardings": (kept, None)}
    return jax.jit(fit_steps, donate_argnums=0, **out)


class _Row:
    """One batch of an array of batches, of which only the type is needed as a rule."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        mesh = getattr(jax.typeof(batches), "sharding", None)
        self.type = (batches.shape[1:], batches.dtype, mesh)

    @property
    def first(self) -> Any:
        return self._batches[0]


def _rows(x: Any, first: Any, length: int) -> Any:
    if x.shape[0] == length:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, length)


def _handed_through(jaxpr: Any) -> Callable[[Any], Any]:
    """Return a function that follows a result back through calls that return it."""
    made = {id(v): (eqn, k) for eqn in jaxpr.eqns for k, v in enumerate(eqn.outvars)}

    def came_from(var: Any) -> Any:
        while id(var) in made:
            eqn, k = made[id(var)]
            if _jax.jit_name(eqn) is None:
                return None
            inner, _ = _jax.opened(eqn.params["jaxpr"])
            origin = _handed_through(inner)(inner.outvars[k])
            place = [j for j, v in enumerate(inner.invars) if v is origin]
            if not place:
                return None
            var = eqn.invars[place[0]]
        return var

    return came_from
