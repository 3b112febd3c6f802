"""What a gradient flow is made of: steps, edges, boxes and sites; plain values.

Everything that is drawn or printed is drawn and printed from these.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in source code.

    Attributes:
      file: the file's path; `path:line` is clickable in terminals and editors.
      line: first line of the expression, from 1; `end_line` its last one.
      col: first column in characters, from 0; `end_col` is behind the last one.
      function: qualified name of the function that holds it.
      expr: text of the expression, or "" where there is no source.
      origin: "user", "library" or "jax": whose code it is.
    """

    file: str
    line: int
    col: int
    end_line: int
    end_col: int
    function: str
    expr: str
    origin: str

    @property
    def place(self) -> str:
        """`file:line` as it is printed; `In[2]:3` in a notebook."""
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Step:
    """One node of the picture: a statement of the user's code, or a part of one.

    Attributes:
      id: its number, the index in `Flow.steps`.
      kind: "input", "step", "cut", "replace", "gate" or "output".
      label: the variable that is assigned, the name of a point, an input's address.
      type: `f32[4,8]`, or "4 leaves, 2,344 values"; "" if it has several.
      callee: `encoder()` where the step is a call that stays folded, or "".
      detail: a word on what happens here: "argmin returns int32", "scale 0.5",
        "rule: models.py:12", "returned by quantise()"; or "".
      site: where; None for inputs and outputs.
      repeat: how often the statement ran (a Python loop).
      box: the number of the box it lies in, or None.
      reason: for a cut, one of "stop_gradient", "zero_derivative", "integer",
        "comparison", "sampled", "zero_rule", "overwritten", "held"; or "".
      flows: a gradient passes here: it comes from the output and goes on to an input.
      data: an input that nobody wants the gradient of.
    """

    id: int
    kind: str
    label: str
    type: str = ""
    callee: str = ""
    detail: str = ""
    site: Site | None = None
    repeat: int = 1
    box: int | None = None
    reason: str = ""
    flows: bool = False
    data: bool = False


# The statuses of an edge, by how much they say: the first of several is drawn.
STATUSES = ("flow", "replace", "gate", "cut", "shadow", "value")


@dataclasses.dataclass(frozen=True)
class Edge:
    """A value that one step hands to another.

    `status`: "flow" (its gradient comes back), "cut" (a gradient could come back and
    ends at the target), "replace" or "gate" (it flows, into such a step), "shadow"
    (differentiable, but no gradient arrives) or "value" (it carries no gradient).
    """

    source: int
    target: int
    status: str


@dataclasses.dataclass(frozen=True)
class Box:
    """A call that is drawn open, since a gradient ends or changes inside it."""

    id: int
    label: str
    site: Site | None
    parent: int | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A graph to be drawn; `title` says in one sentence what is to be seen."""

    title: str
    steps: tuple[Step, ...]
    edges: tuple[Edge, ...]
    boxes: tuple[Box, ...]
