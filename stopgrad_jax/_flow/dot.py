"""A picture as text: DOT for Graphviz, mermaid for pages that draw it themselves.

Node sizes are set here, so that all versions of Graphviz, which measure text
differently, lay a picture out alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .model import Box, Edge, Picture, Step
from .theme import (
    DETAIL_SIZE,
    DIRECTIONS,
    FONT,
    LINE,
    LINES,
    NAME_SIZE,
    THEMES,
    Theme,
    caption,
    check,
    clean,
    fitted,
    node_lines,
    width_of,
)


def to_dot(picture: Picture, *, theme: str = "light", direction: str = "TB") -> str:
    """Write a picture in the DOT language.

    Args:
      picture: what to draw.
      theme: "light" or "dark".
      direction: "TB" for top to bottom, "LR" for left to right.

    Returns:
      DOT text with plain labels; the same text for the same picture.

    Raises:
      ValueError: the theme or the direction is not one of these.
    """
    check("theme", theme, THEMES)
    check("direction", direction, DIRECTIONS)
    look = THEMES[theme]
    lines = ["digraph flow {", *_defaults(look, picture.title, direction)]
    for margin, part in _walk(picture):
        if isinstance(part, Box):
            lines.append(f"{margin}subgraph cluster_{part.id} {{")
            lines.append(f"{margin}  graph [{_frame(part, look)}]")
        else:
            lines.append(margin + ("}" if part is None else _node(part, look)))
    edges = tuple(dict.fromkeys(picture.edges))
    lines += [f"  {_edge(edge, look)}" for edge in edges]
    lines += _legend(picture, look, direction)
    return "\n".join([*lines, "}", ""])


def _defaults(look: Theme, title: str, direction: str) -> Iterator[str]:
    face = f'fontname="{FONT}"'
    lines = _quoted(*_wrapped(clean(title), 76), " ")  # and some space below
    yield (
        f'  graph [rankdir={direction}, bgcolor="{look.card}", pad=0.25, nodesep=0.25, '
        f"ranksep={28 / 72:.4f}, newrank=true, labelloc=t, labeljust=l, fontsize=13, "
        f"{face}, "
        f'fontcolor="{look.text}", label={lines}]'
    )
    yield f'  node [shape=box, fontsize=10.5, {face}, fontcolor="{look.text}"]'
    yield f"  edge [arrowsize=0.75, fontsize=10.5, {face}]"


def _wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [fitted(line, most) for line in lines[:3]]


def _quoted(*lines: str) -> str:
    # Graphviz decodes entities such as &lt; in labels: an & must say that it is one.
    escape = str.maketrans({"\\": "\\\\", '"': '\\"', "&": "&amp;"})
    return '"' + "\\n".join(line.translate(escape) for line in lines) + '"'


def _walk(picture: Picture) -> Iterator[tuple[str, Step | Box | None]]:
    """Yield every step and box as it is written down: boxes open, hold, and close."""
    members: dict[int | None, list[Step]] = {}
    for step in picture.steps:
        members.setdefault(step.box, []).append(step)
    children: dict[int | None, list[Box]] = {}
    for box in picture.boxes:
        children.setdefault(box.parent, []).append(box)

    def inside(key: int | None, margin: str) -> Iterator[tuple[str, Step | Box | None]]:
        for step in members.get(key, ()):
            yield margin, step
        for box in children.get(key, ()):
            yield margin, box
            yield from inside(box.id, margin + "  ")
            yield margin, None

    return inside(None, "  ")


def _frame(box: Box, look: Theme) -> str:
    return (
        f'style="rounded,filled", fillcolor="{look.box}", color="{look.line}", '
        f'penwidth=0.8, margin=12, fontsize=10.5, fontcolor="{look.quiet}", '
        f"label={_quoted(caption(box))}"
    )


def _node(step: Step, look: Theme) -> str:
    lines = node_lines(step)
    sizes = [NAME_SIZE] + [DETAIL_SIZE] * (len(lines) - 1)
    widths = [
        width_of(line, size, bold=size == NAME_SIZE)
        for line, size in zip(lines, sizes, strict=True)
    ]
    extra = 44 if step.kind in ("input", "gate") else 26
    size = _size(max(widths) + extra, LINE * len(lines) + 14)
    return (
        f"s{step.id} [class={step.kind}, label={_quoted(*lines)}, "
        f"{size}, {_skin(step, look)}]"
    )


def _size(width: float, height: float) -> str:
    # Even numbers of points, since old versions round to whole ones from the middle.
    inches = [2 * math.ceil(points / 2) / 72 for points in (width, height)]
    return f"width={inches[0]:.4f}, height={inches[1]:.4f}, fixedsize=true"


def _class(step: Step) -> str:
    """Return what a node is drawn as: its kind, or "still" where no gradient is."""
    still = step.kind in ("input", "step") and not step.flows
    return "still" if still else step.kind


def _paint(kind: str, look: Theme) -> tuple[str, str, str]:
    """Return the colours of a class of nodes: outline, fill and text."""
    if kind == "output":
        return look.text, *look.output
    lines = {"cut": look.cut, "replace": look.replace, "gate": look.gate}
    line = lines.get(kind, look.line if kind == "still" else look.flow)
    return line, look.tint[kind], look.text


def _skin(step: Step, look: Theme) -> str:
    kind = _class(step)
    line, fill, text = _paint(kind, look)
    style, form = {
        "cut": ("rounded,filled,dashed", ""),
        "replace": ("filled", ", peripheries=2"),
        "gate": ("filled", ", shape=hexagon"),
        "output": ("filled", ""),
    }.get(kind, ("rounded,filled", ""))
    return (
        f'style="{style}"{form}, penwidth={0.9 if kind == "still" else 1.5}, '
        f'color="{line}", fillcolor="{fill}", fontcolor="{text}"'
    )


def _edge(edge: Edge, look: Theme) -> str:
    weight = {"flow": 4, "replace": 4, "gate": 4}.get(edge.status, 1)
    style = _stroke(edge.status, look)
    return f"s{edge.source} -> s{edge.target} [{style}, weight={weight}]"


def _stroke(status: str, look: Theme) -> str:
    style, width, head, _ = LINES[status]
    color = getattr(look, status, look.line)
    return f'style={style}, penwidth={width}, arrowhead={head}, color="{color}"'


def _legend(picture: Picture, look: Theme, direction: str) -> Iterator[str]:
    """Yield a key of the lines that occur: rows below the output, or a column."""
    there = {edge.status for edge in picture.edges}
    shown = [status for status in LINES if status in there]
    if not shown:
        return
    down = direction == "TB"
    words = [LINES[status][3] for status in shown]
    widths = [width_of(word, DETAIL_SIZE) + 8 for word in words]
    yield "  subgraph cluster_key {"
    yield '    graph [peripheries=0, margin=4, label=""]'
    yield f'    node [class=key, color="{look.card}"]'
    for index, status in enumerate(shown):
        size = _size(widths[index] if down else max(widths), 14)
        yield f"    k{index} [shape=point, style=invis, width=0.01]"
        yield f"    t{index} [label={_quoted(words[index])}, {size}]"
        long = ", minlen=2" if down else ""
        yield f"    k{index} -> t{index} [{_stroke(status, look)}{long}]"
    if down:
        yield from _rows(picture, len(shown))
    yield "  }"


def _rows(picture: Picture, entries: int) -> Iterator[str]:
    most = math.ceil(entries / math.ceil(entries / 3))
    for start in range(0, entries, most):
        row = range(start, min(start + most, entries))
        yield f"    {{ rank=same; {' '.join(f'k{i}; t{i};' for i in row)} }}"
        for i in row[1:]:
            yield f"    t{i - 1} -> k{i} [style=invis]"
        if start:
            yield f"    k{start - most} -> k{start} [style=invis, weight=9]"
    last = max(picture.steps, key=lambda step: step.kind == "output")
    yield f"    s{last.id} -> k{most // 2} [style=invis]"


def to_mermaid(picture: Picture, *, direction: str = "TB") -> str:
    """Write a picture as a mermaid flowchart, for pages that draw mermaid.

    Args:
      picture: what to draw.
      direction: "TB" for top to bottom, "LR" for left to right.

    Returns:
      The flowchart; the same text for the same picture.

    Raises:
      ValueError: the direction is not one of these.
    """
    check("direction", direction, DIRECTIONS)
    look = THEMES["light"]
    lines = [f"flowchart {direction}", f"  accTitle: {_spoken(picture.title)}"]
    for margin, part in _walk(picture):
        if isinstance(part, Box):
            lines.append(f'{margin}subgraph b{part.id} ["{_entities(caption(part))}"]')
        else:
            lines.append(margin + ("end" if part is None else _mermaid_node(part)))
    edges = tuple(dict.fromkeys(picture.edges))
    lines += [f"  s{e.source} {_ARROWS[e.status]} s{e.target}" for e in edges]
    lines += _mermaid_styles(picture.steps, edges, look)
    return "\n".join([*lines, ""])


_ARROWS = {
    "flow": "==>",
    "cut": "--x",
    "replace": "==>",
    "gate": "==o",
    "shadow": "-->",
    "value": "-.->",
}
_FORMS = {
    "input": ("([", "])"),
    "replace": ("[[", "]]"),
    "gate": ("{{", "}}"),
    "output": ("[", "]"),
}


def _mermaid_node(step: Step) -> str:
    text = "<br/>".join(_entities(line) for line in node_lines(step))
    opening, closing = _FORMS.get(step.kind, ("(", ")"))
    return f's{step.id}{opening}"{text}"{closing}:::{_class(step)}'


def _mermaid_styles(
    steps: tuple[Step, ...], edges: tuple[Edge, ...], look: Theme
) -> Iterator[str]:
    """Yield how each kind of node, and the edges of each status, are to look."""
    for kind in dict.fromkeys(_class(step) for step in steps):
        line, fill, text = _paint(kind, look)
        dashes = ",stroke-dasharray:6 3" if kind == "cut" else ""
        yield (
            f"  classDef {kind} fill:{fill},stroke:{line},color:{text},"
            f"stroke-width:{1 if kind == 'still' else 2}px{dashes}"
        )
    gaps = {"dashed": ",stroke-dasharray:6 4", "dotted": ",stroke-dasharray:1 4"}
    for status, (style, width, _, _) in LINES.items():
        # Mermaid styles edges by their numbers, in the order in which they are written.
        which = [str(i) for i, edge in enumerate(edges) if edge.status == status]
        color = getattr(look, status, look.line)
        stroke = f"stroke:{color},stroke-width:{width}px{gaps.get(style, '')}"
        if which:
            yield f"  linkStyle {','.join(which)} {stroke}"


def _entities(text: str) -> str:
    """Write what mermaid could read as syntax as entities: `#60;` is `<`."""
    # mermaid edits lines that hold `style` or `classDef`, even inside of labels
    text = "".join(
        c if c.isalnum() or c in " ._,:()[]=+-/*·" else f"#{ord(c)};" for c in text
    )
    return text.replace("style", "styl#101;").replace("classDef", "class#68;ef")


def _spoken(text: str) -> str:
    return clean("".join(c if c.isalnum() or c in ".,_()'" else " " for c in text))
