"""The values that one address selects, put together: leaves become trees again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .edits import assembled
from .plan import Found, Hit
from .trace import Place, Static


def together(root: str, group: Iterable[tuple[int, Found, Hit]]) -> Iterator[Any]:
    """Put what one address selects together, place by place in program order."""
    parts: dict[str, Any] = {}
    last: Hit | None = None

    def whole() -> Any:
        if last is not None and last.tree is not None:
            # JAX removes a leaf from the program where nothing uses it.
            return assembled(last, [parts.get(p, Static(None)) for p in last.parts])
        return parts[""] if "" in parts else _nest(parts)

    for k, found, hit in group:
        alone = hit.tree is None
        part = found.name[len(root) + 1 :] if alone else hit.parts[hit.position]
        same = last is not None and hit.parts == last.parts
        # The next value begins: a part comes twice, as of a name in a Python loop, or
        # it is of another tree.
        if parts and (not same or part in parts or "" in (part, *parts)):
            yield whole()
            parts = {}
        parts[part], last = Place("point", k), hit
    yield whole()


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}: leaves that other libraries name one by one."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out
