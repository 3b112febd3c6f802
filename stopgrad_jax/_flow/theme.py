"""What a picture looks like: the words of its nodes, its lines and its colours.

Every status is told three times: by colour, by line style with its end shape, and by
a word in the node.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable
from typing import Literal, get_args

from stopgrad_jax._checks import option

from .model import Box, Step

# resvg and some viewers do no font matching of their own: name what Linux has
FONT = "Helvetica,Arial,Liberation Sans,DejaVu Sans,sans-serif"
NAME_SIZE, DETAIL_SIZE, LINE = 12.0, 10.5, 14.0

_REASONS = {
    "stop_gradient": "on purpose",
    "zero_derivative": "the derivative is zero",
    "integer": "integers carry no gradient",
    "comparison": "comparisons carry no gradient",
    "sampled": "a sample carries no gradient",
    "zero_rule": "its rule returns zeros",
    "unknown": "reason unknown",
}


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of one theme; `tint` maps a class of nodes to its fill."""

    card: str
    text: str
    quiet: str
    line: str
    box: str
    output: tuple[str, str]
    flow: str
    cut: str
    replace: str
    gate: str
    tint: dict[str, str]


ThemeName = Literal["light", "dark"]
THEMES = {
    "light": Theme(
        card="#FFFFFF",
        text="#1A1A1A",
        quiet="#5F5F5F",
        line="#8A8A8A",
        box="#F6F6F6",
        output=("#1A1A1A", "#FFFFFF"),
        flow="#0072B2",
        cut="#D55E00",
        replace="#7B3F98",
        gate="#A86B00",
        tint={
            "input": "#E1F0FA",
            "step": "#FFFFFF",
            "cut": "#FDEBDF",
            "replace": "#F3E8F8",
            "gate": "#FFF3D6",
            "still": "#EFEFEF",
        },
    ),
    "dark": Theme(
        card="#1B1B1D",
        text="#F0F0F0",
        quiet="#B4B4B4",
        line="#949494",
        box="#242427",
        output=("#000000", "#FFFFFF"),
        flow="#56B4E9",
        cut="#FF8F4D",
        replace="#CFA0E8",
        gate="#F0B840",
        tint={
            "input": "#123A52",
            "step": "#1B1B1D",
            "cut": "#47260F",
            "replace": "#372342",
            "gate": "#40300A",
            "still": "#303034",
        },
    ),
}

Direction = Literal["TB", "LR"]
DIRECTIONS = get_args(Direction)

# status: line style, width, end shape, and what the legend says
LINES = {
    "flow": ("solid", 2.2, "normal", "gradient flows"),
    "cut": ("dashed", 1.8, "tee", "cut: gradient ends here"),
    "replace": ("solid", 2.2, "diamond", "a rule replaces the gradient"),
    "gate": ("solid", 2.2, "dot", "a gate changes the gradient"),
    "shadow": ("solid", 0.9, "vee", "no gradient arrives"),
    "value": ("dotted", 1.1, "vee", "value only"),
}


def check(name: str, value: str, known: Iterable[str]) -> None:
    """Raise where an option of a picture has a value that is not known."""
    option(value, name, tuple(known), "drawing a picture")


def clean(text: str) -> str:
    """Put text on one line, without the characters that XML or DOT cannot hold."""
    text = " ".join(str(text).split())
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cn", "Co") else c
        for c in text
    )


def fitted(text: str, most: int, *, keep_end: bool = False) -> str:
    """Cut a long text down to `most` characters, at its front if `keep_end`."""
    text = clean(text)
    if len(text) <= most:
        return text
    return "..." + text[3 - most :] if keep_end else text[: most - 3] + "..."


def node_lines(step: Step) -> list[str]:
    """Return the at most three lines of a node: name, what happens there, where."""
    lines = [fitted(step.label, 36) or "?", fitted(_what(step), 48)]
    if step.site is not None:
        lines.append(fitted(step.site.place, 40, keep_end=True))
    elif step.kind == "input":
        still = "data" if step.data else "no gradient"
        lines.append("can get a gradient" if step.flows else still)
    return [line for line in lines if line]


def _what(step: Step) -> str:
    times = f"x{step.repeat}" if step.repeat > 1 else ""
    if step.kind == "cut":
        why = step.detail or _REASONS.get(step.reason, step.reason)
        parts = [f"cut: {why}" if why else "cut", times]
    elif step.kind == "replace":
        parts = ["replaced", step.detail, times]
    elif step.kind == "gate":
        parts = [f"gate: {step.detail}" if step.detail else "gate", times]
    else:
        still = step.kind == "step" and not step.flows
        said = "no gradient" if still else ""
        parts = [said, times, step.callee, step.detail, step.type]
    return " · ".join(part for part in parts if part)


def caption(box: Box) -> str:
    """Return the one line over a box: what is called, and where."""
    place = "" if box.site is None else fitted(box.site.place, 40, keep_end=True)
    return f"{fitted(box.label, 36)}   {place}".strip() or "?"


def width_of(text: str, size: float, *, bold: bool = False) -> float:
    """Estimate the width of a text in points, in the widest font it may be set in."""
    return sum(_em(c) for c in text) * size * (1.12 if bold else 1.0)


def _em(c: str) -> float:
    if unicodedata.east_asian_width(c) in "WF":
        return 1.0
    if c in "ijlItf.,:;'|![]()/\\ ·-`":
        return 0.38
    return 0.9 if c in "mwMW@%" else 0.63 if c.islower() or c.isdigit() else 0.7
