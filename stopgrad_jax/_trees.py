"""Leaves divided by flags, and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Split:
    """Which of the leaves of a tree are chosen, a flag for each."""

    flags: Sequence[bool]

    def chosen(self, leaves: Iterable[Any]) -> list[Any]:
        """Return the leaves that are chosen."""
        return [x for x, is_one in zip(leaves, self.flags, strict=True) if is_one]

    def joined(self, chosen: Iterable[Any], others: Iterable[Any]) -> list[Any]:
        """Put chosen leaves in their places; `others` holds a leaf for every place."""
        new = iter(chosen)
        pairs = zip(others, self.flags, strict=True)
        return [next(new) if is_one else x for x, is_one in pairs]
