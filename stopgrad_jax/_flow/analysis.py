"""One look at a traced function: what is asked, what was found, and the steps of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._address import RETURN, Address, nodes
from stopgrad_jax._errors import AddressError, wrong
from stopgrad_jax._program.lookup import LookedUp, look_up
from stopgrad_jax._program.refuse import refuse_outputs
from stopgrad_jax._program.trace import Place, Traced
from stopgrad_jax._program.wanted import Wanted
from stopgrad_jax._reach.cuts import Analysis, Cut
from stopgrad_jax._reach.differentiate import needed_for, places_of, try_gradient
from stopgrad_jax._reach.dropped import dropped
from stopgrad_jax._reach.graph import Node
from stopgrad_jax._reach.towards import towards
from stopgrad_jax._reach.unfold import unfold
from stopgrad_jax._source.labels import Labels, Spot

from .grouping import Grouping
from .inputs import Folded, Leaf, fold, fold_outputs
from .steps import Layout, Row, lay_out
from .terms import terms


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
        by = dict.fromkeys(xs or (), Wanted(("argument", "point")))
        kept = base if base is not None and base.ys == ys else None
        beside = kept.xs or () if kept else ()
        program = look_up(traced, [*by, *beside, *(ys or ())], called, by)
        # A view of a flow has no argument that is called `xs`.
        what = "what is looked at" if (told := called.startswith("flow.")) else "xs"
        refuse_outputs(program, by, called, what, ys=not told)
        self._program = program
        self._ends = list(self._outputs_asked(program))
        asked = list(self._asked(program))
        self._bits = {place: bit for _, _, place, bit, *_ in asked}
        # To unfold a program is dear: views of one flow share its graph where they can.
        if base is not None and base.serves(self):
            self.graph, same = base.graph, True
        else:
            same = False
            moved = [self._bits.get(place, 0) for place in places_of(program)]
            needed = needed_for(program, [place for _, place in self._ends])
            self.graph = unfold(
                program.traced.jaxpr, labels, program.plan, moved=moved, needed=needed
            )
        values = {
            "argument": self.graph.inputs,
            "output": self.graph.outputs,
            "point": self.graph.found,
        }

        def value_at(place: Any) -> Node | None:
            is_place = isinstance(place, Place)
            return values[place.kind][place.index] if is_place else None

        self.leaves = [
            Leaf(path, root, place, value, program.types[place], bit, is_asked, x)
            for path, root, place, bit, is_asked, x in asked
            if (value := value_at(place)) is not None
        ]
        one = len(self._ends) == 1 and self._ends[0][0] == RETURN
        self.outputs: list[tuple[str, list[Node]]] = [
            ("output" if one else path, [] if (v := value_at(place)) is None else [v])
            for path, place in self._ends
        ]
        sinks = [v for _, values in self.outputs for v in values]
        self.graph = towards(self.graph, sinks)
        sources: list[list[Node]] = [[] for bit in self._bits.values() if bit]
        for leaf in self.leaves:
            if leaf.bit:
                sources[leaf.bit.bit_length() - 1] = leaf.values
        self.analysis = Analysis(self.graph, sources, sinks)
        # In another graph its values have other numbers, and only its inputs are kept.
        self._terms = kept.terms if kept and same else None
        self._beside: dict[Node, str] = {}
        if kept and not same:
            trees = [program.matched[x].places for x in beside] or [traced.arguments]
            for root, tree in (pair for each in trees for pair in each.items()):
                for path, place in _ends(tree, root):
                    value = value_at(place)
                    floats = _jax.is_differentiable(program.types[place])
                    if value is not None and floats:
                        self._beside[value] = path
        self._tried: dict[int, tuple[bool, str]] = {}
        self._raised: dict[Any, str] = {}

    def serves(self, other: Look) -> bool:
        """Tell whether the graph of this look serves for another one, too."""
        told = any(op.is_told for op in self.graph.ops)
        followed = {place for place, bit in self._bits.items() if bit}
        asked = {place for place, bit in other._bits.items() if bit}
        same_ends = {*self._ends} >= {*other._ends}
        found = other._program.plan.matches
        return same_ends and asked <= followed and not (found or told)

    # What was asked -------------------------------------------------------------

    def _asked(
        self, program: LookedUp
    ) -> Iterator[tuple[str, str, Place, int, bool, Address | None]]:
        """Every place that is looked at: those of xs, then the arguments beside them.

        Yields its path, the address it was found under, the place, what stands for it
        among the sources, whether it is one of the xs, and which.
        """
        seen, count = set[Place](), 0
        arguments = self.traced.arguments.items()
        trees, rest = [(*pair, None) for pair in arguments], ()
        if self.xs is not None:
            trees = [
                (*pair, x)
                for x in self.xs
                for pair in program.matched[x].places.items()
            ]
            rest = arguments
        for root, tree, x in trees:
            for path, place in _ends(tree, root):
                if place not in seen:
                    seen.add(place)
                    carries = _jax.is_differentiable(program.types[place])
                    yield path, root, place, 1 << count if carries else 0, True, x
                    count += carries
        for root, tree in rest:
            for path, place in _ends(tree, root):
                if place not in seen:
                    yield path, root, place, 0, False, None

    def _outputs_asked(self, program: LookedUp) -> Iterator[tuple[str, Place]]:
        """Path and place of each output that is differentiated."""
        if self.ys is None:
            trees = [(RETURN, self.traced.output)]
        else:
            trees = [
                pair for y in self.ys for pair in program.matched[y].places.items()
            ]
        for root, tree in trees:
            for path, place in _ends(tree, root):
                if _jax.is_differentiable(program.types[place]):
                    yield path, place

    # What was found -------------------------------------------------------------

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """The cuts that are shown: comparisons only where nothing else explains."""
        return [cut for cut in self.analysis.cuts if self.told(cut)]

    @functools.cached_property
    def dropped(self) -> list[tuple[Spot, str]]:
        """Expressions of the user's that have no effect, and the words for it."""
        found = dropped(self.traced.jaxpr, self.labels)
        return [(spot, _words.NO_EFFECT.format(does=does)) for spot, does in found]

    def told(self, cut: Cut) -> int:
        """The inputs (as bits) whose gradient a cut is said to end."""
        return cut.lost & self._unexplained if cut.is_quiet else cut.lost

    @functools.cached_property
    def _unexplained(self) -> int:
        """The inputs that get no gradient, for no reason but a comparison."""
        analysis = self.analysis
        loud = [cut for cut in analysis.cuts if not cut.is_quiet]
        told = functools.reduce(int.__or__, (cut.lost for cut in loud), 0)
        return ~(told | analysis.reached(analysis.tangent, analysis.sinks))

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
    def terms(self) -> list[tuple[str, list[Node]]]:
        """The columns of the table: outputs, or what the one output is a sum of."""
        if self._terms is not None:
            return self._terms
        if len(self.outputs) != 1:
            return fold_outputs(self.outputs)
        if not self.outputs[0][1]:
            return []
        inputs = {leaf.value: leaf.path for leaf in self.leaves if leaf.bit}
        analysis, (sink,) = self.analysis, self.analysis.sinks
        if self._beside:
            inputs = {**self._beside, **inputs}
            analysis = Analysis(self.graph, [[v] for v in inputs], [sink])
        return terms(analysis, sink, inputs)

    def word(self, bits: int, values: Iterable[Node]) -> str:
        """Say how some values fare with some inputs.

        "flows"; "cut" where only the value gets there; "unused" where not even that;
        "unknown" where `jax.grad` raises: it was tried.
        """
        analysis, values = self.analysis, list(values)
        if analysis.reached(analysis.refused, values) & bits:
            connected, error = self.tried(bits)
            if error:
                return "unknown"
            if not connected:
                used = analysis.reached(analysis.value, values) & bits
                return "cut" if used else "unused"
        if analysis.reached(analysis.tangent, values) & bits:
            return "flows"
        return "cut" if analysis.reached(analysis.value, values) & bits else "unused"

    def tried(self, bits: int) -> tuple[bool, str]:
        """Differentiate the outputs by these inputs, abstractly.

        Returns whether the gradient depends on what comes in, and what JAX raised.
        """
        if bits not in self._tried:
            asked = self._asked_to_raise(bits)
            if asked not in self._raised:
                xs = [leaf.place for leaf in self.leaves if leaf.bit & bits]
                ys = [place for _, place in self._ends]
                connected, error = try_gradient(self._program, xs, ys, self.called)
                if not error:
                    self._tried[bits] = connected, ""
                    return self._tried[bits]
                self._raised[asked] = error
            self._tried[bits] = False, self._raised[asked]
        return self._tried[bits]

    def _asked_to_raise(self, bits: int) -> Any:
        """Which operands move of each rule that raises.

        Where they are the same ones it raises the same, and to try it costs a run
        of the function.
        """
        moving = self.analysis.moving
        return tuple(
            (op, tuple(v is not None and bool(moving[v] & bits) for v in op.inputs))
            for op in self.analysis.refusing(bits)
        )

    def verdict(self, bits: int) -> str:
        """Say how the outputs fare, together."""
        if self.analysis.raising & bits and self.tried(bits)[1]:
            return "unknown"
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

    def address_of(self, row: Folded) -> Address | None:
        """Return an address by which a row is looked up, or None."""
        for address in (*row.addresses, *self._positions(row)):
            try:
                look_up(self.traced, [address], self.called)
            except AddressError:
                continue
            return address
        return None

    def _positions(self, row: Folded) -> Iterator[str]:
        """Its path by the argument's position, where a point has the name."""
        name, *below = row.path.split("/")
        for k, tree in enumerate(self.traced.positional):
            if tree is self.traced.arguments.get(name):
                yield "/".join([str(k), *below])

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

    def way(self, bits: int) -> dict[Node, Node | None]:
        """For each value these inputs reach, the one before it on a shortest way."""
        start = [leaf.value for leaf in self.leaves if leaf.bit & bits]
        before: dict[Node, Node | None] = dict.fromkeys(start)
        waiting = list(start)
        for value in waiting:
            for follower in self.graph.followers[value]:
                if follower not in before:
                    before[follower] = value
                    waiting.append(follower)
        return before

    def steps_to(self, value: Node | None, before: dict[Node, Any]) -> list[int]:
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


def _ends(tree: Any, root: str) -> Iterator[tuple[str, Place]]:
    for path, node in nodes(tree, root):
        if isinstance(node, Place):
            yield path, node


def require_outputs(look: Look) -> None:
    """Refuse to look at a function that returns nothing to differentiate."""
    if not look.outputs:
        raise wrong(
            TypeError,
            look.called,
            f"{look.traced.name} must return a value that can be differentiated",
            f"{jax.tree.structure(look.traced.output)} without a float in it",
            "return the loss",
        )
