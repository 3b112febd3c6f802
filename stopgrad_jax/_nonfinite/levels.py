"""What ran: operations, and the values between them.

A *level* is a list of operations that ran, with all the values between them: the
equations of a jaxpr, or the rounds of a loop. What is inside an operation is again a
level (`stepper.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from stopgrad_jax._program.wiring import Body
from stopgrad_jax._source.labels import Path
from stopgrad_jax._source.roles import COTANGENT, is_backward

from .devices import gathered
from .shards import Shards


@dataclasses.dataclass(frozen=True, eq=False)
class Executed:
    """One equation that ran, or one round of the loop that it is.

    Attributes:
      eqn: the equation.
      reads: the numbers of its operands among the values of its level.
      writes: the numbers of its results.
      run: computes the results anew from other operands.
      path: the user's calls that made it.
      transforms: JAX's transforms of all equations that it lies in, and its own.
      role: what it computes (`_source/roles.py`).
      lives: for each result, whether it is a part of the function's own value.
      body: what a round of a loop runs.
      step: which round it is: of a scan, the index into what is scanned.
    """

    eqn: Any
    reads: Sequence[int]
    writes: Sequence[int]
    run: Callable[..., list[Any]]
    path: Path
    transforms: tuple[str, ...]
    role: str
    lives: Sequence[bool]
    body: Body | None = None
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What is around a level: the user's calls, JAX's transforms, the mesh.

    `backward`: it is inside a backward pass. `careful`: each operation is waited for.
    """

    path: Path
    transforms: tuple[str, ...] = ()
    backward: bool = False
    shards: Shards | None = None
    careful: bool = False


class Failed(Exception):
    """An operation raised: which one, and what."""

    def __init__(self, level: Level, op: Executed, error: Exception) -> None:
        """Keep what is needed to look inside the operation."""
        super().__init__(level, op, error)
        self.level, self.op, self.error = level, op, error


class Level:
    """Operations in the order in which they ran.

    Attributes:
      values: all values; `maker` holds the number of the operation that made one.
      outputs: the numbers of each result of the level: one, or one for each step of
        the loop that it is.
      given: for what came in, the operand of the equation around that it is of.
      literals: the numbers that are written in the program.
      cotangents: the values that depend on what comes back in a backward pass.
      context: what is around it.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.values: list[Any] = []
        self.ops: list[Executed] = []
        self.maker: dict[int, int] = {}
        self.outputs: list[list[int]] = []
        self.given: dict[int, int] = {}
        self.literals: set[int] = set()
        self.cotangents: set[int] = set()

    def add(self, value: Any) -> int:
        """Number a value."""
        self.values.append(value)
        return len(self.values) - 1

    def read(self, op: Executed) -> list[Any]:
        """Operands of an operation."""
        return [self.values[k] for k in op.reads]

    def take(self, value: Any, operand: int, is_cotangent: bool) -> int:
        """Number a value that comes in."""
        number = self.add(value)
        self.given[number] = operand
        if is_cotangent:
            self.cotangents.add(number)
        return number

    def run(
        self, run: Callable[..., list[Any]], reads: Sequence[int], **op: Any
    ) -> list[int]:
        """Run an operation and keep its results."""
        writes: list[int] = []
        made = Executed(reads=reads, writes=writes, run=run, **op)
        try:
            results = run(*self.read(made))
            # JAX runs ahead: what a callback raises would come up at a later operation.
            if self.context.careful:
                jax.block_until_ready(results)
        except Failed:
            raise
        except Exception as error:
            raise Failed(self, made, error) from error
        writes += [self.add(gathered(x)) for x in results]
        self.maker.update((k, len(self.ops)) for k in writes)
        if made.role == COTANGENT:
            self.cotangents.update(writes)
        self.ops.append(made)
        return writes

    def flags(self, op: Executed) -> list[bool]:
        """Tell which operands depend on what comes back in a backward pass.

        A literal may be the cotangent of the whole program.
        """
        return [k in self.cotangents or k in self.literals for k in op.reads]

    def context_of(self, op: Executed) -> Context:
        """What is around the inside of an operation."""
        around = self.context
        return dataclasses.replace(
            around,
            path=op.path,
            transforms=op.transforms,
            backward=around.backward or is_backward(op.eqn),
        )
