"""The table of a flow: which input trains which term, and where gradients end."""

from __future__ import annotations

from collections.abc import Iterator

import stopgrad_jax._words.flow as _words
from stopgrad_jax._address import Address, nodes
from stopgrad_jax._page import Part
from stopgrad_jax._program.trace import Static
from stopgrad_jax._reach.cuts import Cut

from .analysis import Look
from .inputs import Folded
from .steps import variable

_STYLE = {"flows": "flow", "cut": "cut", "unused": "dim", "unknown": "gate"}
_WIDEST = 44  # characters of an expression


def table(look: Look, place: str, steps: int, ops: int) -> Iterator[list[Part]]:
    """Lay out the header, the table and the cuts."""
    cuts = list(_cuts(look))
    counts = f"{ops:,} ops in {_many(steps, 'step')}, {_many(len(cuts), 'cut')}"
    name = look.traced.name
    yield [
        ("gradient flow of ", ""),
        (name, "bold"),
        (f"   {place}" if place else "", "dim"),
        (f"    {counts}", ""),
    ]
    yield []
    yield from _rows(look)
    if cuts:
        yield []
        yield from cuts
    for spot, words in look.dropped:
        text = f"{spot.place}  {spot.expression}  {words}"
        yield [("  no use   ", "cut"), (text, "")]
    if (row := _interesting(look)) is not None:
        address = look.address_of(row)
        asked = "" if address is None else spelled(address)
        ways = f'flow.explain({asked}), flow.source(), flow.save("flow.svg")'
        yield [("  next: " + ways, "dim")]
    if look.xs is None and look.rows and len(look.traced.arguments) > 1:
        first = next(iter(look.traced.arguments))
        yield [(f'  xs="{first}" in the call makes the other arguments data', "dim")]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def _rows(look: Look) -> Iterator[list[Part]]:
    """Yield a row for each input, in columns that are as wide as their words."""
    if not look.rows:
        yield [(f"  {_words.NO_INPUTS.format(inputs=_untraced(look))}", "bold")]
        return
    names = [name for name, _ in look.terms]
    rows = []
    for row in look.rows:
        one = len(row.leaves) == 1
        size = row.size if row.data and one else f"{row.count:,}"
        words = (
            ["data"] if row.data else [look.verdict(row.bits), *look.cells(row.bits)]
        )
        rows.append((row.path, size, words))
    first = max([5, *(len(path) for path, _, _ in rows)])
    second = max([6, *(len(size) for _, size, _ in rows)])
    head = ["gradient", *names]
    widths = [max(len(name), 7) for name in head]
    titles = "  ".join(n.center(w) for n, w in zip(head, widths, strict=True))
    yield [(f"  {'input':{first}}  {'values':>{second}}  {titles}".rstrip(), "bold")]
    for path, size, words in rows:
        line: list[Part] = [(f"  {path:{first}}", ""), (f"  {size:>{second}}", "")]
        for word, width in zip(words, widths, strict=False):
            line += [("  ", ""), (word.center(width), _STYLE.get(word, "dim"))]
        yield line


def _untraced(look: Look) -> str:
    """List the arguments that are no arrays, with their types."""
    values = [
        f"{path} is {_article(type(node.value).__name__)}"
        for root, tree in look.traced.named.items()
        for path, node in nodes(tree, root)
        if isinstance(node, Static)
    ]
    return ", ".join(values) or "there is no argument"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _cuts(look: Look) -> Iterator[list[Part]]:
    """Yield a line for each cut; those that would read alike are one."""
    lines = []
    for cut in look.cuts:
        group = look.grouping.groups[look.grouping.group_of[cut.op]]
        label = variable(group, look.grouping.root)
        expression = cut.spot.expression if cut.spot else ""
        if len(expression) > _WIDEST:
            expression = expression[: _WIDEST - 3] + "..."
        lines.append((cut.place or "(no source)", label, expression, _brief(cut)))
    lines = list(dict.fromkeys(lines))
    widths = [max([0, *(len(line[k]) for line in lines)]) for k in range(3)]
    for number, line in enumerate(lines):
        head = "  cut at   " if not number else "           "
        cells = [text.ljust(w) for text, w in zip(line, widths, strict=False)]
        text = "  ".join([*cells, line[3]]).rstrip()
        yield [(head, "cut"), (text, "")]


def _brief(cut: Cut) -> str:
    """Say in a few words what a cut is; of one in another library, what and where."""
    inside = cut.path.inside
    if inside is None:
        return cut.brief
    called = inside.callee or inside.expression[:_WIDEST]
    if cut.reason == "zero_derivative" and cut.brief != _words.ZERO_BRIEF:
        called = ""  # its own derivative need not be zero
    words = " ".join(filter(None, [called, cut.brief]))
    return f"{words} ({inside.place})"


def spelled(address: Address) -> str:
    """Spell an address as it is written in a program."""
    plain = isinstance(address, str) and not {'"', "\\"} & set(address)
    return f'"{address}"' if plain else repr(address)


def _interesting(look: Look) -> Folded | None:
    """The input that it is most worth to ask about: one with a cut."""
    rows = [row for row in look.rows if not row.data]

    def interest(row: Folded) -> tuple[bool, bool]:
        words = [look.verdict(row.bits), *look.cells(row.bits)]
        is_cut = any(look.told(cut) & row.bits for cut in look.cuts)
        return is_cut and any(word != "flows" for word in words), is_cut

    return max(rows, key=interest, default=None)  # the first of the best
