"""The part of a flow that some inputs reach."""

from __future__ import annotations

import dataclasses

from .analysis import Look
from .model import Picture


def reached(look: Look, title: str) -> Picture:
    """Only what the inputs that were asked for reach, and what is used."""
    layout, analysis = look.layout, look.analysis
    reached = {
        layout.step_of[v] for v in range(len(layout.step_of)) if analysis.value[v]
    }
    before: dict[int, list[int]] = {}
    for edge in layout.edges:
        before.setdefault(edge.target, []).append(edge.source)
    outputs = {s.id for s in layout.steps if s.kind == "output"}
    for step in layout.steps:  # a value inside that is asked for is its own end
        labels = [layout.steps[k].label for k in before.get(step.id, ())]
        if step.id in outputs and labels == [step.label]:
            outputs.discard(step.id)
    kept = [s for s in layout.steps if s.id in reached or s.id in outputs]
    kept = [s for s in kept if not s.data]
    number = {s.id: k for k, s in enumerate(kept)}
    boxes = {s.box for s in kept if s.box is not None}
    parents = {box.id: box.parent for box in layout.boxes}
    for box in list(boxes):
        while (box := parents[box]) is not None:
            boxes.add(box)
    shown = [box for box in layout.boxes if box.id in boxes]
    renamed: dict[int | None, int] = {box.id: k for k, box in enumerate(shown)}
    steps = [
        dataclasses.replace(s, id=number[s.id], box=renamed.get(s.box)) for s in kept
    ]
    edges = [
        dataclasses.replace(e, source=number[e.source], target=number[e.target])
        for e in layout.edges
        if e.source in number and e.target in number
    ]
    frames = [
        dataclasses.replace(b, id=renamed[b.id], parent=renamed.get(b.parent))
        for b in shown
    ]
    return Picture(title, tuple(steps), tuple(edges), tuple(frames))
