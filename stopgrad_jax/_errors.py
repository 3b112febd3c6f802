"""Exception classes, and how a type, a value or a source line is phrased.

Every error of this library has four beats: what you called, what was expected,
what came, and what to write instead. `beats` is the one place that lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class AddressError(LookupError):
    """An address matches nothing, or more than one kind of thing."""

    __module__ = "stopgrad_jax"  # where users find it


def beats(called: str, expected: str, came: str, instead: str) -> str:
    """Lay out the four beats of an error message."""
    return f"{called}: {expected}\n  got:   {came}\n  write: {instead}"


def has_beats(error: BaseException) -> bool:
    """Tell whether an error says all four already."""
    text = str(error)
    return "\n  got:   " in text and "\n  write: " in text


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
