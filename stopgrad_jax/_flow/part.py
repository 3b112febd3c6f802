"""The part of a flow that some inputs reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .analysis import Look
from .model import Picture, Step
from .steps import Layout


def reached(look: Look, title: str) -> Picture:
    """Only what the inputs that were asked for reach, and what is used."""
    layout, value = look.layout, look.analysis.value
    shown = {step for v, step in enumerate(layout.step_of) if value[v]}
    shown |= _ends(layout)
    steps = [s for s in layout.steps if s.id in shown and not s.data]
    return keep(Picture(title, layout.steps, layout.edges, layout.boxes), steps)


def _ends(layout: Layout) -> set[int]:
    """The outputs, but for a value inside that is asked for: it is its own end."""
    before: dict[int, list[str]] = {}
    for edge in layout.edges:
        label = layout.steps[edge.source].label
        before.setdefault(edge.target, []).append(label)
    outputs = (s for s in layout.steps if s.kind == "output")
    return {s.id for s in outputs if before.get(s.id) != [s.label]}


def keep(picture: Picture, steps: Sequence[Step]) -> Picture:
    """Keep some steps, the edges between them, and the boxes that they lie in."""
    parents, around = {box.id: box.parent for box in picture.boxes}, set[int]()
    for box in {step.box for step in steps}:
        while box is not None:
            around.add(box)
            box = parents[box]
    boxes = tuple(box for box in picture.boxes if box.id in around)
    return renumber(dataclasses.replace(picture, steps=tuple(steps), boxes=boxes))


def renumber(picture: Picture) -> Picture:
    """Number steps and boxes from zero, and leave out edges of what is not there."""
    # An id is the index of its step: with gaps, it would be that of another one.
    step = {s.id: k for k, s in enumerate(picture.steps)}
    box: dict[int | None, int] = {b.id: k for k, b in enumerate(picture.boxes)}
    return dataclasses.replace(
        picture,
        steps=tuple(
            dataclasses.replace(s, id=step[s.id], box=box.get(s.box))
            for s in picture.steps
        ),
        edges=tuple(
            dataclasses.replace(e, source=step[e.source], target=step[e.target])
            for e in picture.edges
            if e.source in step and e.target in step
        ),
        boxes=tuple(
            dataclasses.replace(b, id=box[b.id], parent=box.get(b.parent))
            for b in picture.boxes
        ),
    )
