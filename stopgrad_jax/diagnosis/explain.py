"""Where a gradient goes and why it ends: the verdict, the way and each cut."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import stopgrad_jax._jax as _jax
from stopgrad_jax._engine.causes import Cut
from stopgrad_jax._engine.graph import Op

from .fold import Folded
from .look import Look
from .page import Part, snippet

_ZERO = "gradient is exactly zero."


def explain(
    look: Look, rows: Sequence[Folded] | None = None, cuts: bool = True
) -> Iterator[list[Part]]:
    """Explain the gradient of some rows, or of everything that a look is at."""
    for number, row in enumerate(look.asked if rows is None else rows):
        if number:
            yield []
        yield from _row(look, row, cuts)


def verdict(look: Look, row: Folded) -> str:
    """Return one sentence on an input's gradient."""
    name = f"{row.path} ({row.size})"
    if not row.bits:
        kinds = ", ".join(sorted({str(leaf.aval.dtype) for leaf in row.leaves}))
        return f"{name}: carries no gradient, since it is {kinds}."
    word = look.verdict(row.bits)
    if word == "unused":
        return f"{name}: {_ZERO} {_output(look)} is not computed from it."
    if word == "cut":
        return f"{name}: {_ZERO} Every path to {_output(look).lower()} is cut."
    if word == "unknown":
        ops = look.analysis.refusing(row.bits)
        places = ", ".join(dict.fromkeys(map(_unknown, ops)))
        if all(_jax.gate_name(op.eqn) == "prevent_gradient" for op in ops):
            return f"{name}: a gradient arrives at {places}, which raises."
        return f"{name}: unknown. jax.grad raises at what has no rule for it: {places}."
    through = _through(look, row)
    analysis = look.analysis
    masked = row.bits & ~analysis.reached(analysis.unmasked, analysis.sinks)
    if masked != row.bits:  # of the first layers of a relu network it is true, and idle
        return f"{name}: gets a gradient{through}."
    ops = analysis.lost_on_the_way(masked, analysis.unmasked)
    names = list(dict.fromkeys(_mask(look, op) for op in ops))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    zero = f"may be zero at some inputs: {', '.join(names[:3])}{more}"
    return f"{name}: connected{through}; {zero}."


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
    if len(reached) == len(names):
        return f", through {listed(reached)}"
    return f", through {listed(reached)} only"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _mask(look: Look, op: Op) -> str:
    if op.spot is None:
        return op.name
    here = op.spot.file == look.file
    return f"{op.name}, line {op.spot.frame.line}" if here else _unknown(op)


def _unknown(op: Op) -> str:
    return f"{op.name} ({op.spot.place})" if op.spot else op.name


def _row(look: Look, row: Folded, with_cuts: bool) -> Iterator[list[Part]]:
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
        zeros = f"jax.grad returns zeros of the right shape for {row.path}"
        yield [(f"  {zeros}, not None and not an error.", "")]
        for line in dict.fromkeys(map(_advice, _mistakes(cuts))):
            yield [(f"  {line}", "")]
    elif cuts:
        cells = zip(look.terms, look.cells(row.bits), strict=True)
        lost = [name for (name, _), cell in cells if cell == "cut"]
        if lost:
            verb = "do" if lost[1:] else "does"
            yield []
            yield [(f"  So {listed(lost)} {verb} not train {row.path}.", "")]


def cuts_of(look: Look, row: Folded) -> list[Cut]:
    """The cuts of an input's gradient; comparisons only if there are no others."""
    cuts = [cut for cut in look.analysis.cuts if cut.lost & row.bits]
    loud = [cut for cut in cuts if not cut.is_quiet]
    return loud or (cuts if look.verdict(row.bits) == "cut" else [])


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
    function = spot.function.split(".<locals>.")[-1]
    yield [(f"     --> {spot.place} in {function}()", "dim")]
    yield from snippet(spot, f"{way} ends here", 6)


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


def _advice(cut: Cut) -> str:
    """Say how to pass a gradient where one ends by mistake."""
    spot, call = cut.spot, "sg.straight_through(forward, backward)(x)"
    if cut.reason == "zero_derivative" and spot and spot.is_current:
        function, argument = spot.source.call(spot.position)
        if function and argument:
            call = f"sg.straight_through({function})({argument})"
    return (
        "To keep the forward value and pass a gradient, use a straight-through rule: "
        f"{call}."
    )
