"""Requests that no evaluation could answer rightly: they raise, and say why."""

from __future__ import annotations

from collections.abc import Iterable

from stopgrad_jax._address import RETURN, Address
from stopgrad_jax._errors import AddressError, wrong

from .lookup import LookedUp
from .search import Found


def refuse_loops(program: LookedUp, addresses: Iterable[Address], called: str) -> None:
    """Values in a while loop cannot be stacked, nor differentiated in reverse."""
    for found in program.found(addresses).values():
        if found.dynamic:
            raise _refusal(
                called,
                found,
                "the number of steps must be known: values are stacked over them, "
                "and reverse mode has to store each",
                "a while_loop, or a fori_loop whose bounds are traced",
                "jax.lax.scan, or jax.lax.fori_loop with Python integers",
            )


def refuse_rules(program: LookedUp, addresses: Iterable[Address], called: str) -> None:
    """What happens in the body of a custom rule is its author's to say."""
    for found in program.found(addresses).values():
        if found.rule:
            raise _refusal(
                called,
                found,
                "the value must lie outside custom_jvp and custom_vjp functions: "
                "a derivative passes by their bodies",
                f'"{found.name}" in the body of one',
                "a name for an operand or a result of that function; sg.capture "
                "can read the value",
            )


def refuse_factors(
    program: LookedUp, addresses: Iterable[Address], called: str
) -> None:
    """A derivative already taken reads the array, as well as what is computed of it.

    To differentiate by it would be by both: by the variable it is not by its rule.
    """
    for found in program.found(addresses).values():
        if found.feeds:
            raise _refusal(
                called,
                found,
                "the value must be read by later operations only",
                f'"{found.name}", where jax.grad, jvp or linearize was called: the '
                "derivative of the operation that makes it is computed from it",
                "a name there, sg.name(value, ...); sg.capture can read the value",
            )


def refuse_differentiated(
    program: LookedUp, addresses: Iterable[Address], fun: str, called: str
) -> None:
    """An edit here would change a value and not the derivative already taken."""
    for found in program.found(addresses).values():
        if found.differentiated:
            raise _refusal(
                called,
                found,
                "the value must lie where no derivative has been taken yet",
                f"{fun} calls jax.grad, jvp or linearize on the part with "
                f'"{found.name}": an edit would change the value and not its '
                "derivative",
                "jax.grad(sg.edit(f, ...)): edit the inner function first",
            )


def _refusal(
    called: str, found: Found, expected: str, came: str, instead: str
) -> ValueError:
    place = f"{called} ({found.line})" if found.line else called
    return wrong(ValueError, place, expected, came, instead)


def refuse_outputs(
    program: LookedUp,
    addresses: Iterable[Address],
    called: str,
    what: str = "xs and stop_gradients",
    ys: bool = True,
) -> None:
    """The function's output is what is differentiated, not what by.

    `ys`: the call takes what is differentiated, too.
    """
    named = "a name for the value before it is returned"
    for address in addresses:
        if isinstance(address, str) and address.split("/")[0] == RETURN:
            raise wrong(
                AddressError,
                called,
                f"{what} must be arguments or values inside {program.traced.name}",
                f'"{address}", its output',
                f'ys="{address}", or {named}' if ys else named,
            )
