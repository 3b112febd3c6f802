"""What an error says to write is tried where it is raised, in the whole test-suite.

Each suggestion of an `AddressError` is looked up at once, in the very function or tree
that the wrong address was meant for: one that does not work fails the test.
"""

import re
import sys

import stopgrad_jax as sg
from stopgrad_jax import _where
from stopgrad_jax._program import lookup as select

VALUES = r"sg\.(?:var|op|point)\((?:[^()]|\([^()]*\))*\)"
tried: dict[str, int] = {"address": 0, "where": 0}


class Unworkable(Exception):
    """An error suggested what does not work."""


def suggestions(error):
    """Return the addresses that an error says to write."""
    text = str(error).partition("\n  write: ")[2]
    if "a pattern such as" in text or "a selection of" in text:
        text = text.partition(" of ")[2] or text
    values = re.findall(VALUES, text)
    rest = re.sub(r"sg\.\w+\((?:[^()]|\([^()]*\))*\)", "", text)
    found = [eval(value, {"sg": sg}) for value in values]
    return found + re.findall(r'"([^"]+)"', rest)


def trying(refuse, kind, asked):
    """Wrap what refuses addresses; `asked` makes its second argument of one of them."""

    def tried_out(subject, wanted, called, *takes):
        try:
            return refuse(subject, wanted, called, *takes)
        except sg.AddressError as error:
            for address in suggestions(error):
                tried[kind] += 1
                try:
                    refuse(subject, asked(address), "the suggestion")
                except Exception as again:
                    raise Unworkable(f"{error}\n-> {address!r}: {again}") from error
            raise

    return tried_out


def install():
    """Try the suggestions of every refusal from now on."""
    wrapped = {
        "look_up": (select.look_up, "address", lambda address: [address]),
        "selected": (_where.selected, "where", lambda path: path),
    }
    for name, (refuse, kind, asked) in wrapped.items():
        replacement = trying(refuse, kind, asked)
        for key, module in list(sys.modules.items()):
            ours = key.startswith("stopgrad_jax")
            if ours and getattr(module, name, None) is refuse:
                setattr(module, name, replacement)
