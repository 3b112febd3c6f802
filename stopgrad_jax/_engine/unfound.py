"""Why `sg.var` finds no value, or more than one: said with lines and what to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stopgrad_jax._address import Var, nearest
from stopgrad_jax._errors import AddressError, beats, quoted

from .labels import printed_file
from .variables import Variables


def refuse_variables(variables: Variables, targets: Sequence[Any], called: str) -> None:
    """Raise if several statements assign a variable or its value cannot be told."""
    for target, statements in variables.statements.items():
        var, places = targets[target], list(statements.values())
        if len(places) > 1:
            raise AddressError(
                beats(
                    f"{called}: address {var!r}",
                    "one statement must assign the variable",
                    f"{len(places)}: {', '.join(places)}",
                    f"{_qualified(var, places)}sg.name in the source, where one "
                    "function has both",
                )
            )
    for target, (place, why) in variables.unclear.items():
        raise AddressError(
            beats(
                f"{called}: address {targets[target]!r} ({place})",
                "it must be clear which array the variable is given",
                why,
                "sg.name in the source there, or the variable of a statement that "
                "computes one array",
            )
        )


def _qualified(var: Var, places: Sequence[str]) -> str:
    """Offer the qualified names, if they tell the statements apart."""
    functions = [place.partition(" (")[2][:-1] for place in places]
    if len(set(functions)) < len(functions):
        return ""
    name = var.label if "self." in var.label else var.label.split(".")[-1]
    return "".join(f'sg.var("{f}.{name}") or ' for f in functions)


def no_variable(
    variables: Variables, var: Var, called: str, function: str
) -> AddressError:
    """Return the error for a variable that no statement with equations assigns."""
    known = list(variables.known)
    *qualification, name = var.label.split(".")
    function = qualification[-1] if qualification else ""
    lines = [
        f"{printed_file(file)}:{line}"
        for file, spot in variables.files.items()
        if spot.is_current
        for line in spot.source.lines_assigning(name, function)
    ]
    missing = "".join(
        f"; no variables of {file}: {what.strip('()')}"
        for file, what in variables.sourceless.items()
    )
    if name in known:
        came = f"{name}, in another function"
    elif lines:
        came = (
            f"{', '.join(lines[:3])}, which computes no array here: a new name for "
            "one, or not run"
        )
    else:
        came = f"variables {quoted(n for n in known if '.' not in n)}"
    near = nearest(var.label, known) or nearest(name, known)
    write = f'sg.var("{near[0]}")' if near else "sg.name in the source"
    if variables.sourceless and not near:
        write += "; sg.var reads the source text"
    return AddressError(
        beats(
            called,
            f"it must match a variable that a statement of {function} assigns",
            came + missing,
            write,
        )
    )
