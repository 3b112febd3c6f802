"""Leaves that the loss cannot train: how they are named, and how one freezes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

import stopgrad_jax._words.train as words
from stopgrad_jax._address import is_address, paths_of
from stopgrad_jax._errors import AddressError
from stopgrad_jax._where import Where, selected

OPTIONS = ("warn", "error", "freeze", "ignore")


def by_cause(
    params: Any, trained: Sequence[int], causes: Mapping[int, str], root: str
) -> dict[str, list[str]]:
    """Return {cause: paths}: of whole subtrees, where all that trains in one shares it.

    Args:
      params: all parameters.
      trained: the numbers of the leaves that train, in JAX's order.
      causes: why leaves are untrained, by number.
      root: what the parameters are called, where they are one array.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    below: dict[Any, set[int]] = {}
    for k in trained:
        path = flat[k][0]
        for length in range(1, len(path) + 1):
            below.setdefault(path[:length], set()).add(k)
    every = paths_of(params)
    groups: dict[str, set[int]] = {}
    for k, why in causes.items():
        groups.setdefault(why, set()).add(k)
    found: dict[str, list[str]] = {}
    for why, group in groups.items():
        paths = []
        for k in sorted(group):
            path, names = flat[k][0], every[k]
            tops = range(1, len(path) + 1)
            top = next((n for n in tops if below[path[:n]] <= group), 0)
            paths.append(names[top - 1] if top else root)
        found[why] = list(dict.fromkeys(paths))
    return found


def frozen_too(
    params: Any, trained: Sequence[int], causes: Mapping[int, str], frozen: Where
) -> str:
    """Spell the `frozen=` that freezes these leaves too; "" where no paths say it."""
    before = frozen if isinstance(frozen, list | tuple) else [frozen]
    before = [where for where in before if where is not None]
    paths = [p for ps in by_cause(params, trained, causes, "").values() for p in ps]
    wanted = [*before, *paths]
    if len(wanted) > 8 or not all(map(is_address, wanted)):
        return ""
    try:
        chosen = selected(params, wanted, "")
    except (AddressError, TypeError, ValueError):  # a key that holds "/" or "*"
        return ""
    right = all(chosen[k] == (k in causes) for k in trained)
    return words.frozen(wanted) if right else ""
