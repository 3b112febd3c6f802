"""The function that a jaxpr was traced from."""

from __future__ import annotations

from typing import Any, NamedTuple


class Origin(NamedTuple):
    """The function that a jaxpr was traced from, as JAX noted it.

    `line` is that of its first decorator; `inputs` maps how each input is spelled from
    its parameters ("x", "batch['x']") to its number.
    """

    name: str
    file: str
    line: int
    inputs: dict[str, int]


def origin_of(jaxpr: Any) -> Origin | None:
    """Return the function that an open jaxpr was traced from; None if not known.

    From `debug_info`, which is not documented. Values that a function closes over are
    inputs too, and have no name there.
    """
    info = getattr(jaxpr, "debug_info", None)
    names = getattr(info, "arg_names", None)
    if info is None or names is None or len(names) != len(jaxpr.invars):
        return None
    name, _, place = info.func_src_info.partition(" at ")
    file, _, line = place.rpartition(":")
    inputs = {spelled: k for k, spelled in enumerate(names) if spelled}
    return Origin(name, file, int(line), inputs) if line.isdigit() else None
