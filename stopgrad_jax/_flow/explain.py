"""Where a gradient goes and why it ends: the verdict, the way and each cut."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.flow as _words
from stopgrad_jax._page import Part, snippet
from stopgrad_jax._reach.cuts import Cut
from stopgrad_jax._reach.graph import Operation
from stopgrad_jax._source.labels import Spot
from stopgrad_jax._words import listed

from .analysis import Look
from .inputs import Folded
from .passing import Passing


def explain(
    look: Look, rows: Sequence[Folded] | None = None, cuts: bool = True
) -> Iterator[list[Part]]:
    """Explain the gradient of some rows, or of everything that a look is at."""
    passing = Passing(look)
    for number, row in enumerate(look.asked if rows is None else rows):
        if number:
            yield []
        yield from _row(look, row, cuts, passing)


def verdict(look: Look, row: Folded) -> str:
    """Return one sentence on an input's gradient."""
    return f"{row.path} ({row.size}): {said(look, row)}"


def said(look: Look, row: Folded) -> str:
    """Say what becomes of an input's gradient."""
    if not row.bits:
        kinds = ", ".join(sorted({str(leaf.aval.dtype) for leaf in row.leaves}))
        return _words.NO_FLOAT.format(kinds=kinds)
    word = look.verdict(row.bits)
    if word == "unused":
        return _words.UNUSED.format(outputs=_output(look))
    if word == "cut":
        return _words.CUT.format(outputs=_output(look).lower())
    if word == "unknown":
        return _raises(look, row)
    through = _through(look, row)
    analysis = look.analysis
    masked = row.bits & ~analysis.reached(analysis.unmasked, analysis.sinks)
    if masked != row.bits:  # of the first layers of a relu network it is true, and idle
        return _words.CAN_GET.format(through=through)
    ops = analysis.masking(masked)
    names = list(dict.fromkeys(_mask(look, op) for op in ops))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    operations = f"{', '.join(names[:3])}{more}"
    return _words.MAY_BE_ZERO.format(through=through, operations=operations)


def _raises(look: Look, row: Folded) -> str:
    ops = look.analysis.refusing(row.bits)
    places = ", ".join(dict.fromkeys(map(_placed, ops)))
    if ops and all(_jax.gate_name(op.eqn) == "prevent_gradient" for op in ops):
        return _words.PREVENTED.format(places=places)
    at = f" at {places}" if places else ""
    return _words.RAISES.format(at=at, error=look.tried(row.bits)[1])


def _output(look: Look) -> str:
    if len(look.outputs) == 1 and look.outputs[0][0] != "output":
        return look.outputs[0][0]
    return "The output" if len(look.outputs) == 1 else "The outputs"


def _through(look: Look, row: Folded) -> str:
    names = [name for name, _ in look.terms]
    reached = [
        name
        for name, word in zip(names, look.cells(row.bits), strict=True)
        if word == "flows"
    ]
    if not names or not reached:
        return ""
    only = "" if len(reached) == len(names) else " only"
    return f", through {listed(reached)}{only}"


def _mask(look: Look, op: Operation) -> str:
    name = op.name
    if op.path.library:  # what its variables are called tells the user nothing
        name = _jax.call_name(op.eqn) or _jax.kind_of(op.eqn)
    if op.spot is None:
        return name
    here = op.spot.file == look.file
    place = f", line {op.spot.frame.line}" if here else f" ({op.spot.place})"
    return name + place


def _placed(op: Operation) -> str:
    return f"{op.name} ({op.spot.place})" if op.spot else op.name


def _row(
    look: Look, row: Folded, with_cuts: bool, passing: Passing
) -> Iterator[list[Part]]:
    """Yield what there is to say of one input: verdict, way, cuts and what to write."""
    head, _, rest = verdict(look, row).partition(": ")
    word = look.verdict(row.bits) if row.bits else "unused"
    style = {"flows": "flow", "cut": "cut"}.get(word, "bold")
    yield [(head, "bold"), (": ", ""), (rest, style)]
    if not row.bits:
        return
    before = look.way(row.bits)
    if word == "flows":
        yield from _flowing(look, before)
    cuts = cuts_of(look, row) if with_cuts else []
    if cuts:
        yield []
    told = _told(look, row, cuts, before)
    for number, (lines, times) in enumerate(told.items(), 1):
        head, *rest = lines
        again = f"   ({times} times)" if times > 1 else ""
        yield [(f"  {number}. {head[0][0]}{again}", "cut")]
        yield from map(list, rest)
    if word in ("cut", "unused"):
        yield []
        yield [(f"  {_words.ZEROS.format(path=row.path)}", "")]
        calls = [passing.straight_through(row.bits, cut) for cut in _mistakes(cuts)]
        for call in dict.fromkeys(filter(None, calls)):
            yield [(f"  {_words.STRAIGHT_THROUGH.format(call=call)}", "")]
    elif cuts:
        cells = zip(look.terms, look.cells(row.bits), strict=True)
        lost = [name for (name, _), cell in cells if cell == "cut"]
        if lost:
            yield []
            terms, do = listed(lost), "do" if lost[1:] else "does"
            words = _words.DOES_NOT_TRAIN.format(terms=terms, do=do, path=row.path)
            yield [(f"  {words}", "")]


def cuts_of(look: Look, row: Folded) -> list[Cut]:
    """The cuts of an input's gradient, of those that are shown."""
    return [cut for cut in look.cuts if look.told(cut) & row.bits]


def _flowing(look: Look, before: dict[int, Any]) -> Iterator[list[Part]]:
    for value in look.analysis.sinks:
        if value in before:
            steps = [look.step(k) for k in look.steps_to(value, before)]
            names = [
                f"{s.label} ({s.site.file}:{s.site.line})" if s.site else s.label
                for s in steps
            ]
            if len(names) > 8:
                names = [*names[:3], f"... {len(names) - 6} steps ...", *names[-3:]]
            if names:
                yield [("  ┃ ", "flow"), (" → ".join(names), "flow")]
            return


def _told(
    look: Look, row: Folded, cuts: Sequence[Cut], before: dict[int, Any]
) -> collections.Counter[tuple[tuple[Part, ...], ...]]:
    """Lay each cut out; a function that is called twice may tell the same twice."""
    laid_out = (map(tuple, _cut(look, row, cut, before)) for cut in cuts)
    return collections.Counter(map(tuple, laid_out))


def _cut(
    look: Look, row: Folded, cut: Cut, before: dict[int, Any]
) -> Iterator[list[Part]]:
    yield [(cut.words, "cut")]
    spot = cut.spot
    way = " → ".join([row.path, *_labels(look, cut, before)])
    if spot is None:
        yield [(f"     {way} ends here", "cut")]
        return
    inside = cut.path.inside
    yield [(f"     --> {_where(spot)}", "dim")]
    yield from snippet(spot, f"{way} {'goes in' if inside else 'ends'} here", 6)
    if inside is not None:  # the line of the other library, below the user's
        yield [(f"     --> {_where(inside)}", "dim")]
        yield from snippet(inside, "and ends here", 6)


def _where(spot: Spot) -> str:
    return f"{spot.place} in {spot.function.split('.<locals>.')[-1]}()"


def _labels(look: Look, cut: Cut, before: dict[int, Any]) -> list[str]:
    """Names of the steps between an input and a cut of its gradient."""
    sources = [
        s
        for k in cut.ops
        for v in look.graph.ops[k].values
        for s in look.graph.feeds[v]
        if s in before
    ]
    # The last of them: the way to what the expression is finally called on.
    inside = {v for k in cut.ops for v in look.graph.ops[k].values}
    outside = [s for s in sources if s not in inside] or sources
    if not outside:
        return []
    own = look.number_of(cut.op)
    steps = [k for k in look.steps_to(outside[-1], before) if k != own]
    names = [label for label, _ in itertools.groupby(look.step(k).label for k in steps)]
    return names if len(names) <= 6 else [*names[:2], "...", *names[-3:]]


def _mistakes(cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts that nobody may have meant; none where another one was meant."""
    if any(cut.reason == "stop_gradient" for cut in cuts):
        return []
    return [cut for cut in cuts if cut.reason in ("zero_derivative", "integer")]
