"""Exception classes, and how a type, a value or a source line is phrased.

Every error of this library has four beats: what you called, what was expected,
what came, and what to write instead. `beats` is the one place that lays them out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any, TypeVar


class AddressError(LookupError):
    """An address matches nothing, or more than one kind of thing."""

    __module__ = "stopgrad_jax"  # where users find it


def beats(called: str, expected: str, came: str, instead: str) -> str:
    """Lay out the four beats of an error message."""
    return f"{called}: {expected}\n  got:   {came}\n  write: {instead}"


E = TypeVar("E", bound=Exception)


def wrong(kind: type[E], called: str, expected: str, came: str, instead: str) -> E:
    """Return an error of a kind that says the four beats."""
    return kind(beats(called, expected, came, instead))


def has_beats(error: BaseException) -> bool:
    """Tell whether an error says all four already."""
    text = str(error)
    return "\n  got:   " in text and "\n  write: " in text


def rows(lines: Iterable[str], most: int = 6) -> str:
    """Put the lines of one beat below each other, at most `most` of them."""
    shown = list(lines)
    if len(shown) > most:
        shown[most:] = [f"and {len(shown) - most} more"]
    return "\n         ".join(shown)


def folded(text: str, width: int = 100) -> str:
    """Break a long beat into lines, between words."""
    return rows(
        (
            line
            for part in text.split("\n")
            for line in textwrap.wrap(
                part.strip(), width, break_long_words=False, break_on_hyphens=False
            )
        ),
        most=20,
    )


def function_name(fun: Any) -> str:
    """Name a callable the way its author would."""
    inner = getattr(fun, "func", None)  # functools.partial
    if inner is not None and not hasattr(fun, "__name__"):
        return function_name(inner)
    return getattr(fun, "__name__", None) or type(fun).__name__


_SHORT = {"float": "f", "int": "i", "uint": "u", "complex": "c", "bfloat": "bf"}


def type_of(aval: Any) -> str:
    """Phrase a shape and dtype as `f32[4,8]`."""
    dtype = str(aval.dtype)
    letters = dtype.rstrip("0123456789")
    short = _SHORT[letters] + dtype[len(letters) :] if letters in _SHORT else dtype
    return f"{short}[{','.join(map(str, aval.shape))}]"


def quoted(names: Iterable[Any], most: int = 8) -> str:
    """List names for a message, at most `most` of them."""
    shown = list(dict.fromkeys(str(name) for name in names))
    text = ", ".join(f'"{name}"' for name in shown[:most])
    if len(shown) > most:
        text += f" and {len(shown) - most} more"
    return text or "none"


def shortened(error: Exception, most: int = 300) -> str:
    """Return another library's message on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."
