"""One look at a traced function: what is asked, what was found, and the steps of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import RETURN, Address, nodes
from stopgrad_jax._engine.causes import Analysis, Cut
from stopgrad_jax._engine.graph import Value
from stopgrad_jax._engine.labels import Labels
from stopgrad_jax._engine.select import look_up
from stopgrad_jax._engine.trace import Static, Traced
from stopgrad_jax._engine.trace import Value as Place
from stopgrad_jax._engine.unfold import unfold
from stopgrad_jax._errors import beats

from .fold import Folded, Leaf, fold
from .grouping import Grouping
from .steps import Layout, Row, lay_out, terms


class Look:
    """The gradient of some outputs by some inputs or values of a traced function.

    Args:
      traced: the function, traced.
      labels: reads its source.
      xs: addresses of what is differentiated by; None for all arguments.
      ys: addresses of the outputs that are differentiated; None for all.
      called: for error messages.
      internals: tell library code apart too.
      base: a look at the same outputs whose terms are kept.
    """

    def __init__(
        self,
        traced: Traced,
        labels: Labels,
        xs: Sequence[Address] | None,
        ys: Sequence[Address] | None,
        called: str,
        internals: bool = False,
        base: Look | None = None,
    ) -> None:
        """Look the addresses up and follow the gradient."""
        self.traced, self.labels, self.called = traced, labels, called
        self.xs, self.ys, self.internals = xs, ys, internals
        program = look_up(traced, [*(xs or ()), *(ys or ())], called)
        if base is not None and not program.plan.matches:
            self.graph = base.graph
        else:
            self.graph = unfold(program.traced.jaxpr, labels, program.plan)
        self._terms = base.terms if base is not None and base.ys == ys else None
        values = {
            "argument": self.graph.inputs,
            "output": self.graph.outputs,
            "point": self.graph.found,
        }

        def value_at(place: Any) -> Value | None:
            is_place = isinstance(place, Place)
            return values[place.kind][place.index] if is_place else None

        self._value_at = value_at
        self.leaves = list(self._leaves(program))
        self.outputs = list(self._outputs(program))
        sinks = [v for _, values in self.outputs for v in values]
        trained = [leaf for leaf in self.leaves if leaf.bit]
        self.analysis = Analysis(self.graph, [leaf.values for leaf in trained], sinks)

    # What was asked -------------------------------------------------------------

    def _leaves(self, program: Any) -> Iterator[Leaf]:
        """Every leaf that is looked at: those of xs, then the arguments beside them."""
        seen, count = set[Value](), 0
        if self.xs is None:
            trees = self.traced.arguments.items()
        else:
            trees = [
                pair for x in self.xs for pair in program.matched[x].places.items()
            ]
        for root, tree in trees:
            for path, place in _ends(tree, root):
                value = self._value_at(place)
                aval = program.types[place]
                carries = _jax.is_differentiable(aval)
                if value is not None and value not in seen:
                    seen.add(value)
                    bit = 1 << count if carries else 0
                    count += bool(bit)
                    yield Leaf(path, root, value, aval, bit, True)
        for root, tree in self.traced.arguments.items() if self.xs is not None else ():
            for path, place in _ends(tree, root):
                value = self._value_at(place)
                if value is not None and value not in seen:
                    yield Leaf(path, root, value, program.types[place], 0, False)

    def _outputs(self, program: Any) -> Iterator[tuple[str, list[Value]]]:
        if self.ys is None:
            trees = [(RETURN, self.traced.output)]
        else:
            trees = [
                pair for y in self.ys for pair in program.matched[y].places.items()
            ]
        ends = [pair for root, tree in trees for pair in _ends(tree, root)]
        for path, place in ends:
            value = self._value_at(place)
            if _jax.is_differentiable(program.types[place]):
                name = "output" if len(ends) == 1 and path == RETURN else path
                yield name, [] if value is None else [value]

    # What was found -------------------------------------------------------------

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """The cuts that are shown: comparisons only where nothing else explains."""
        analysis = self.analysis
        loud = [cut for cut in analysis.cuts if not cut.is_quiet]
        told = functools.reduce(int.__or__, (cut.lost for cut in loud), 0)
        reached = analysis.reached(analysis.tangent, analysis.sinks)
        rest = ~(told | reached)
        return [cut for cut in analysis.cuts if not cut.is_quiet or cut.lost & rest]

    @functools.cached_property
    def grouping(self) -> Grouping:
        """Which operation belongs to which step."""
        return Grouping(self.analysis, self.labels, self.cuts, self.internals)

    @functools.cached_property
    def _plain(self) -> Layout:
        """Steps without regard to rows, to find the terms."""
        rows = [Row(leaf.path, "", (leaf.value,), not leaf.bit) for leaf in self.leaves]
        return lay_out(self.analysis, self.grouping, rows, self.outputs)

    @functools.cached_property
    def terms(self) -> list[tuple[str, list[Value]]]:
        """The columns of the table: outputs, or what the one output is a sum of."""
        if self._terms is not None:
            return self._terms  # values have the same numbers in every graph of it
        if len(self.outputs) != 1:
            return _folded(self.outputs)
        if not self.outputs[0][1]:
            return []
        plain, out = self._plain, dict[str, list[Value]]()
        at, numbers = terms(plain, len(plain.steps) - 1)
        for number in numbers:
            label = plain.steps[number].label
            while label in out:
                label += "'"
            out[label] = self._leaving(number)
        (sink,) = self.analysis.sinks
        shapes = {self.graph.avals[v].shape for values in out.values() for v in values}
        # Parts of a loss have its shape; what it is computed from has another.
        if len(out) > _COLUMNS or shapes != {self.graph.avals[sink].shape}:
            return []
        flow = ("flow", "gate", "replace")
        direct = {e.source for e in plain.edges if e.target == at and e.status in flow}
        rows = [plain.step_of.index(k) for k in direct if k < plain.first]
        return [*out.items(), *([(plain.steps[at].label, rows)] if rows else [])]

    def _leaving(self, number: int) -> list[Value]:
        """Values of a step that the gradient leaves it by, backwards: its results."""
        plain, graph = self._plain, self.graph
        group = plain.groups[number - plain.first]
        return [
            v
            for k in group.ops
            for v in graph.ops[k].values
            if self.analysis.arrives[v]
            and any(plain.step_of[f] not in (number, -1) for f in graph.followers[v])
        ]

    def word(self, bits: int, values: Iterable[Value]) -> str:
        """Say how some values fare with some inputs.

        "flows"; "cut" where only the value gets there; "unused" where not even that;
        "unknown" where an operation on a way has no rule, so that `jax.grad` raises.
        """
        analysis, values = self.analysis, list(values)
        if analysis.reached(analysis.refused, values) & bits:
            return "unknown"
        if analysis.reached(analysis.tangent, values) & bits:
            return "flows"
        return "cut" if analysis.reached(analysis.value, values) & bits else "unused"

    def verdict(self, bits: int) -> str:
        """Say how the outputs fare, together."""
        return self.word(bits, self.analysis.sinks)

    def cells(self, bits: int) -> tuple[str, ...]:
        """How each term fares."""
        return tuple(self.word(bits, values) for _, values in self.terms)

    @functools.cached_property
    def rows(self) -> list[Folded]:
        """The inputs, folded to the largest subtrees of which all leaves fare alike."""
        fate = {
            leaf.path: (bool(leaf.bit), self.verdict(leaf.bit), self.cells(leaf.bit))
            for leaf in self.leaves
        }
        return list(fold(self.leaves, lambda leaf: fate[leaf.path]))

    @property
    def asked(self) -> list[Folded]:
        """The rows of what was asked for: all that carry a gradient, or all of xs."""
        every = self.rows
        if self.xs is None:
            return [row for row in every if row.bits] or every
        roots = {leaf.path for leaf in self.leaves if leaf.asked}
        return [row for row in every if row.leaves[0].path in roots]

    @property
    def file(self) -> str:
        """The file that most of it is in: where the outermost statements are."""
        spots = (group.spot for group in self.grouping.groups)
        return next((spot.file for spot in spots if spot is not None), "")

    @functools.cached_property
    def layout(self) -> Layout:
        """The steps to be drawn."""
        plain = self._plain
        consumers: dict[int, set[int]] = {}
        for edge in plain.edges:
            consumers.setdefault(edge.source, set()).add(edge.target - plain.first)
        number = {leaf.path: k for k, leaf in enumerate(self.leaves)}

        def fate(leaf: Leaf) -> Any:
            if not leaf.bit:
                return None
            key = frozenset(consumers.get(number[leaf.path], ()))
            return self.verdict(leaf.bit), self.cells(leaf.bit), key

        rows = [
            Row(row.path, row.size, tuple(leaf.value for leaf in row.leaves), row.data)
            for row in fold(self.leaves, fate)
        ]
        return lay_out(self.analysis, self.grouping, rows, self.outputs)

    def way(self, bits: int) -> dict[Value, Value | None]:
        """For each value these inputs reach, the one before it on a shortest way."""
        start = [leaf.value for leaf in self.leaves if leaf.bit & bits]
        before: dict[Value, Value | None] = dict.fromkeys(start)
        waiting = list(start)
        for value in waiting:
            for follower in self.graph.followers[value]:
                if follower not in before:
                    before[follower] = value
                    waiting.append(follower)
        return before

    def steps_to(self, value: Value | None, before: dict[Value, Any]) -> list[int]:
        """The steps on the way to a value, first to last, inputs left out."""
        layout, out = self._plain, []
        while value is not None:
            step, maker = layout.step_of[value], self.graph.maker[value]
            joint = maker >= 0 and self.graph.ops[maker].join
            if step >= layout.first and not joint and (not out or out[-1] != step):
                out.append(step)
            value = before.get(value)
        return out[::-1]

    @property
    def first(self) -> int:
        """The number of the first group's step."""
        return self._plain.first

    def step(self, number: int) -> Any:
        """A step by the number that `steps_to` gives."""
        return self._plain.steps[number]

    def number_of(self, op: int) -> int:
        """The number of an operation's step."""
        return self._plain.first + self.grouping.group_of[op]


_COLUMNS, _WIDEST = 8, 72  # of the table, at most; characters of their names


def _folded(outputs: list[tuple[str, list[Value]]]) -> list[tuple[str, list[Value]]]:
    """Put outputs together by subtree until the table can show them."""
    deepest = max(name.count("/") for name, _ in outputs) if outputs else 0
    for depth in range(deepest + 1, 0, -1):
        out: dict[str, list[Value]] = {}
        for name, values in outputs:
            out.setdefault("/".join(name.split("/")[:depth]), []).extend(values)
        if len(out) <= _COLUMNS and sum(map(len, out)) <= _WIDEST:
            return list(out.items()) if len(out) > 1 else []
    return []


def _ends(tree: Any, root: str) -> Iterator[tuple[str, Place]]:
    for path, node in nodes(tree, root):
        if isinstance(node, Place):
            yield path, node
        elif isinstance(node, Static):
            continue


def require_outputs(look: Look) -> None:
    """Refuse to look at a function that returns nothing to differentiate."""
    if not look.outputs:
        raise TypeError(
            beats(
                look.called,
                f"{look.traced.name} must return a value that can be differentiated",
                f"{jax.tree.structure(look.traced.output)} without a float in it",
                "return the loss",
            )
        )
