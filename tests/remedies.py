"""What an error says to write is tried where it is raised, in the whole test-suite.

Each suggestion of an `AddressError` is looked up at once, in the very function or tree
that the wrong address was meant for: one that does not work fails the test.
"""

import re
import sys

import stopgrad_jax as sg
from stopgrad_jax import _where
from stopgrad_jax._engine import select

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


def install():
    """Try the suggestions of every refusal from now on."""
    look_up, selected = select.look_up, _where.selected

    def trying_look_up(traced, addresses, called):
        try:
            return look_up(traced, addresses, called)
        except sg.AddressError as error:
            for address in suggestions(error):
                tried["address"] += 1
                try:
                    look_up(traced, [address], "the suggestion")
                except Exception as again:
                    raise Unworkable(f"{error}\n-> {address!r}: {again}") from error
            raise

    def trying_selected(tree, where, called):
        try:
            return selected(tree, where, called)
        except sg.AddressError as error:
            for path in suggestions(error):
                tried["where"] += 1
                try:
                    selected(tree, path, "the suggestion")
                except Exception as again:
                    raise Unworkable(f"{error}\n-> {path!r}: {again}") from error
            raise

    for name, module in list(sys.modules.items()):
        if name.startswith("stopgrad_jax"):
            if getattr(module, "look_up", None) is look_up:
                module.look_up = trying_look_up
            if getattr(module, "selected", None) is selected:
                module.selected = trying_selected
