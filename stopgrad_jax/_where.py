"""`where`: which leaves of a bare pytree are meant.

A path, a list of paths, a tree of booleans, or a function of (path, leaf): the same
language in every function that takes one. Paths are those of `_address.py`, from the
tree's root.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax

import stopgrad_jax._jax as _jax

from ._address import (
    Address,
    Op,
    Point,
    Var,
    has_wildcard,
    is_address,
    joined,
    leaf_paths,
    matching,
    nodes,
    paths_of,
    printed,
    require_one_meaning,
)
from ._checks import shown
from ._errors import AddressError, function_name, quoted, wrong

Where = Any  # an address, a list of them, a boolean (prefix) pytree, or a predicate


def selected(tree: Any, where: Where, called: str) -> list[bool]:
    """Tell for each leaf of a tree whether `where` selects it, in JAX's order.

    A leaf that carries no gradient is never selected. What selects nothing raises.
    """
    leaves = jax.tree.leaves(tree)
    if where is None:
        chosen = [True] * len(leaves)
    elif is_predicate(where):
        _check_predicate(where, called)
        pairs = _leaves_or_boxes(tree)
        chosen = [_asked(where, path, leaf, called) for path, leaf in pairs]
    elif addresses := _as_addresses(where):
        chosen = _at_addresses(tree, addresses, called)
    else:
        chosen = _at_mask(tree, where, called)
    return _some_gradient(tree, chosen, where, called)


def is_predicate(where: Where) -> bool:
    """Tell a function of (path, leaf) from everything else that selects."""
    # A module of booleans may be callable too, but it is a tree and no leaf.
    if isinstance(where, functools.partial):  # jax.tree_util.Partial is a tree too
        return True
    return callable(where) and jax.tree.leaves(where) == [where]


def _check_predicate(where: Callable[..., Any], called: str) -> None:
    try:
        inspect.signature(where).bind("path", None)
    except TypeError:
        raise wrong(
            TypeError,
            called,
            "a function in where is asked of each leaf: (path, leaf) -> bool",
            f"{function_name(where)}{inspect.signature(where)}",
            'where=lambda path, leaf: ..., or a path such as "encoder"',
        ) from None
    except ValueError:  # a builtin that cannot be asked
        pass


def _asked(where: Callable[..., Any], path: str, leaf: Any, called: str) -> bool:
    answer = where(path, leaf)
    if isinstance(answer, bool) or _is_bool(answer):
        return bool(answer)
    raise wrong(
        TypeError,
        called,
        "a function in where answers True or False",
        f'{answer!r:.60} for "{path}"',
        "where=lambda path, leaf: bool(...)",
    )


def _as_addresses(where: Where) -> list[Any]:
    if is_address(where):
        return [where]
    is_list = isinstance(where, list | tuple | set | frozenset)
    return list(where) if is_list and all(map(is_address, where)) else []


def _at_addresses(tree: Any, addresses: list[Any], called: str) -> list[bool]:
    """Tell for each leaf whether one of the addresses selects it."""
    every = paths_of(tree)
    known = dict.fromkeys(path for above in every for path in above)
    selected, excluded = set[str](), list[set[str]]()
    for address in addresses:
        negated, tops = _tops(tree, address, known, called)
        if negated:
            excluded.append(tops)
        else:
            selected |= tops
    # Addresses add up, those with "!" too: "!a" and "!b" are together all leaves.
    return [
        not selected.isdisjoint(above)
        or any(tops.isdisjoint(above) for tops in excluded)
        for above in every
    ]


def _tops(
    tree: Any, address: Address, known: dict[str, None], called: str
) -> tuple[bool, set[str]]:
    """Return whether all else is meant, and the paths that an address matches."""
    if isinstance(address, Point | Op | Var):
        raise wrong(
            TypeError,
            called,
            "where selects leaves of a tree, by their paths",
            repr(address),
            'a path such as "encoder/**/kernel"',
        )
    text = str(address)
    # A key may begin with "!" itself.
    negated = text.startswith("!") and text not in known
    wanted = text[1:] if negated else text
    tops = matching(wanted, known)
    require_one_meaning(wanted, tops, called)
    if not tops:
        leaves = quoted(path for path, _ in _leaves(tree))
        able = dict.fromkeys(_selectable(tree, negated))
        known = able if able or negated else known
        sign = "!" if negated else ""
        raise wrong(
            AddressError,
            called,
            "where must match a path of the tree",
            f'"{wanted}", which matches nothing; '
            + ("the tree is one leaf" if leaves == '""' else f"paths are {leaves}"),
            _instead(wanted, list(known), sign) if known else "the call without where",
        )
    return negated, set(tops)


def _selectable(tree: Any, negated: bool) -> Iterator[str]:
    """Yield the paths below which, or but for which, a leaf carries a gradient."""
    every = paths_of(tree)
    pairs = zip(every, jax.tree.leaves(tree), strict=True)
    carry = [above for above, leaf in pairs if _jax.carries_gradient(leaf)]
    for path in dict.fromkeys(path for above in every for path in above):
        if any((path in above) != negated for above in carry):
            yield path


def _instead(wanted: str, known: list[str], sign: str) -> str:
    def listed(paths: list[str], most: int = 3) -> str:
        return quoted([sign + path for path in paths], most)

    if has_wildcard(wanted):
        deeper = matching(f"**/{wanted}", known)
        write = "a pattern such as " + listed(known[:3])
        return f'"{sign}**/{wanted}"' if deeper else write
    ends = [p for p in known if p.endswith("/" + wanted)]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return listed([*ends, *near] or known)


def _at_mask(tree: Any, mask: Any, called: str) -> list[bool]:
    expected = "where is a path, a list of them, a function of (path, leaf), or a "
    expected += "tree of booleans with the structure of the tree or a prefix of it"
    try:
        every = jax.tree.leaves(jax.tree.broadcast(mask, tree))
    except ValueError:
        came = _mismatch(mask, tree, "")
        raise wrong(ValueError, called, expected, came, "sg.mask(tree, path)") from None
    others = [x for x in every if not isinstance(x, bool) and not _is_bool(x)]
    if others:
        came = f"{others[0]!r:.60} of type {type(others[0]).__name__}"
        raise wrong(TypeError, called, expected, came, "sg.mask(tree, path)")
    return [bool(x) for x in every]


def _mismatch(mask: Any, tree: Any, path: str) -> str:
    """Say where a tree of booleans is no prefix, outermost first."""
    if jax.tree_util.all_leaves([mask]):
        return ""
    flat = [
        jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda node, x=x: node is not x)
        for x in (mask, tree)
    ]
    (ours, own), (theirs, other) = flat
    at = f' at "{path}"' if path else ""
    if own != other:
        return f"{shown(mask)}{at}, where the tree is {shown(tree)}"
    for (key, one), (_, two) in zip(ours, theirs, strict=True):
        if key and (told := _mismatch(one, two, joined(path, printed(key)))):
            return told
    return ""


def _is_bool(x: Any) -> bool:
    return str(getattr(x, "dtype", "")) == "bool" and getattr(x, "ndim", 1) == 0


def _some_gradient(
    tree: Any, chosen: list[bool], where: Where, called: str
) -> list[bool]:
    """Keep what carries a gradient of a selection; refuse one in which nothing does."""
    leaves = _leaves(tree)
    pairs = zip(chosen, leaves, strict=True)
    chosen = [c and _jax.carries_gradient(leaf) for c, (_, leaf) in pairs]
    if not any(chosen):
        carry = [path for path, leaf in leaves if _jax.carries_gradient(leaf)]
        raise wrong(
            AddressError,
            called,
            "at least one leaf that carries a gradient (float or complex)",
            "none" if where is None else f"none where {where!r:.60}",
            f"a selection of {quoted(carry)}" if carry else "a tree with one",
        )
    return chosen


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    paths = leaf_paths(tree)
    return list(zip(paths, jax.tree.leaves(tree), strict=True))


def _leaves_or_boxes(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths; for one in a flax box, the box."""
    boxes = {p: n for p, n in nodes(tree) if type(n).__module__.startswith("flax.")}
    pairs = ((path.removesuffix("/value"), path, leaf) for path, leaf in _leaves(tree))
    return [(path, boxes.get(box, leaf)) for box, path, leaf in pairs]


def leaves_like(tree: Any, like: Any) -> list[Any]:
    """Leaves of `tree` at the leaves of `like`; None stands for a whole subtree.

    Raises a ValueError where the structures differ.
    """
    if tree is None:
        return [None] * len(jax.tree.leaves(like))
    if jax.tree_util.all_leaves([like]):  # not so an empty container, nor None
        return [tree]
    # Level by level, since None may stand for a whole subtree at each.
    is_child = lambda node: node is not like  # noqa: E731
    children, structure = jax.tree.flatten(like, is_leaf=is_child)
    parts = structure.flatten_up_to(tree)
    pairs = zip(parts, children, strict=True)
    return [leaf for part, child in pairs for leaf in leaves_like(part, child)]
