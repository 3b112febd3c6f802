"""Text with a style on each part: plain, coloured for a terminal, or HTML."""

from __future__ import annotations

import dataclasses
import html
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

Part = tuple[str, str]  # text, style

_ANSI = {
    "flow": "1;34",
    "cut": "1;33",
    "gate": "33",
    "replace": "35",
    "dim": "2",
    "bold": "1",
}
_CSS = {
    "flow": "color:#0072B2;font-weight:bold",
    "cut": "color:#B34E00;font-weight:bold",
    "gate": "color:#8A5A00",
    "replace": "color:#7B3294",
    "dim": "color:#6e6e6e",
    "bold": "font-weight:bold",
}
_FONT = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
_ASCII = str.maketrans({"┃": "|", "╳": "x", "┊": ":", "→": ">", "·": "-"})


@dataclasses.dataclass(frozen=True)
class Page:
    """Lines of styled text.

    Printed, it is coloured on a terminal (unless `NO_COLOR` is set) and plain anywhere
    else; where the stream cannot encode the bars of the margin they are ASCII.
    """

    lines: tuple[tuple[Part, ...], ...]

    @property
    def plain(self) -> str:
        """The text without any style."""
        rows = ("".join(text for text, _ in line).rstrip() for line in self.lines)
        return "\n".join(rows)

    def __str__(self) -> str:
        stream = sys.stdout
        coloured = _is_terminal(stream) and not os.environ.get("NO_COLOR")
        text = self.ansi if coloured else self.plain
        try:
            text.encode(getattr(stream, "encoding", None) or "utf-8")
        except (UnicodeEncodeError, LookupError):
            text = text.translate(_ASCII)
        return text

    __repr__ = __str__

    @property
    def ansi(self) -> str:
        """The text with a terminal's colours."""

        def part(text: str, style: str) -> str:
            code = _ANSI.get(style)
            return f"\x1b[{code}m{text}\x1b[0m" if code and text.strip() else text

        return "\n".join("".join(part(*p) for p in line) for line in self.lines)

    @property
    def html(self) -> str:
        """The text as HTML."""

        def part(text: str, style: str) -> str:
            css = _CSS.get(style)
            text = html.escape(text)
            return f'<span style="{css}">{text}</span>' if css else text

        rows = ("".join(part(*p) for p in line) for line in self.lines)
        # A notebook's theme may set text in a font whose letters differ in width.
        style = "white-space:pre;overflow-x:auto;line-height:1.35;" + _FONT
        return f'<pre style="{style}">' + "\n".join(rows) + "</pre>"

    def _repr_html_(self) -> str:
        return self.html

    def __rich__(self) -> Any:
        # No dependency: only rich itself asks for this.
        from rich.text import Text

        return Text.from_ansi(self.ansi)


def underlined(text: str, start: int, end: int, mark: str) -> tuple[str, str]:
    """Return a row of source and, below it, marks under characters start to end.

    Tabs are spread, wide characters count as two columns, and of a very long row the
    part around the marks is shown.
    """
    before, marked = _spread(text[:start]), _spread(text[:end])
    whole = _spread(text)
    indent = len(whole) - len(whole.lstrip(" "))
    first = max(indent, len(before) - _WIDEST // 2) if len(whole) > _WIDEST else indent
    first = min(first, len(before))
    shown = whole[first : first + _WIDEST]
    head, tail = (
        "..." if first > indent else "",
        "..." if whole[len(shown) + first :] else "",
    )
    lead = head + whole[first : len(before)]
    below = whole[len(before) : min(len(marked), first + _WIDEST)]
    return head + shown + tail, " " * _columns(lead) + mark * max(1, _columns(below))


def snippet(spot: Any, words: str, indent: int) -> Iterator[list[Part]]:
    """Yield the row of source that an expression is in, and words below it.

    Of an expression over several rows the first; where the source is not to be had, the
    words alone.
    """
    line, col, end_line, end_col = spot.position
    rows = spot.source.rows(line, line) if spot.is_current else []
    margin = " " * indent
    if not rows:
        yield [(f"{margin}   {spot.expression} {words}".rstrip(), "cut")]
        return
    text = rows[0][1]
    start = spot.source.column(line, col)
    end = spot.source.column(line, end_col) if end_line == line else len(text)
    gutter = f"{line:>4}"
    shown, marks = underlined(text, start, end, "^")
    yield [(f"{margin}{gutter} | ", "dim"), (shown, "")]
    yield [
        (f"{margin}{' ' * len(gutter)} | ", "dim"),
        (f"{marks} {words}", "cut"),
    ]


_WIDEST = 110  # columns of a row of source


def _spread(text: str) -> str:
    return _visible(text.expandtabs(4))


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    # The latter is raised by a stream that is closed.
    except (AttributeError, ValueError):
        return False


def page(lines: Iterable[Iterable[Part] | str]) -> Page:
    """Make a page of lines; a bare string has no style."""
    made = []
    for line in lines:
        parts = [(line, "")] if isinstance(line, str) else line
        made.append(tuple((_visible(text), style) for text, style in parts))
    return Page(tuple(made))


def _visible(text: str) -> str:
    """Source text may hold anything; a terminal must not obey it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
