"""Every sentence that the debugger can print, and the condition under which it is true.

One module for each thing that speaks. A sentence is here once, whatever prints it; its
comment is what must have been seen before it may be said.
"""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
