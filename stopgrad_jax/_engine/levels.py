"""Run a program one equation at a time, and open the equations that hold programs.

A *level* is a list of operations that ran, with all the values between them: the
equations of a jaxpr, or the rounds of a loop. `enter` opens one operation: what is
inside it is again a level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

import stopgrad_jax._jax as _jax

from .labels import Labels, Path
from .nested import Body, nested


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One equation that ran, or one round of the loop that it is.

    Attributes:
      eqn: the equation.
      reads: the numbers of its operands among the values of its level.
      writes: the numbers of its results.
      run: computes the results anew from other operands.
      path: the user's calls that made it.
      scopes: the name stacks of all equations that it lies in, and its own.
      body: what a round of a loop runs.
      step: which round it is: of a scan, the index into what is scanned.
    """

    eqn: Any
    reads: Sequence[int]
    writes: Sequence[int]
    run: Callable[..., list[Any]]
    path: Path
    scopes: str
    body: Body | None = None
    step: int | None = None


class Level:
    """Operations in the order in which they ran.

    `outputs` holds the numbers of each result of the level: one, or one for each round
    of the loop that it is.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.ops: list[Op] = []
        self.maker: dict[int, int] = {}
        self.outputs: list[list[int]] = []

    def add(self, value: Any) -> int:
        """Number a value."""
        self.values.append(value)
        return len(self.values) - 1

    def read(self, op: Op) -> list[Any]:
        """Operands of an operation."""
        return [self.values[k] for k in op.reads]

    def run(
        self, run: Callable[..., list[Any]], reads: Sequence[int], **op: Any
    ) -> list[int]:
        """Run an operation and keep its results."""
        results = run(*[self.values[k] for k in reads])
        writes = [self.add(x) for x in results]
        self.maker.update((k, len(self.ops)) for k in writes)
        self.ops.append(Op(reads=reads, writes=writes, run=run, **op))
        return writes


Visit = Callable[[Level], None]


class Runner:
    """Runs programs level by level, with the user's words for each operation."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels

    def flat(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        operands: Sequence[Any],
        path: Path,
        scopes: str = "",
    ) -> Level:
        """Run a jaxpr; it was reached by `path`, in the name stacks `scopes`."""
        level = Level()
        inputs = [level.add(x) for x in (*consts, *operands)]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

        def number(atom: Any) -> int:
            known = isinstance(atom, _jax.Literal)
            return level.add(atom.val) if known else env[atom]

        for eqn in jaxpr.eqns:
            writes = level.run(
                functools.partial(_jax.bind, eqn),
                [number(atom) for atom in eqn.invars],
                eqn=eqn,
                path=self._labels.path(eqn, path),
                scopes=f"{scopes}/{_jax.scopes_of(eqn)}",
            )
            env.update(zip(eqn.outvars, writes, strict=True))
        level.outputs = [[number(atom)] for atom in jaxpr.outvars]
        return level

    def enter(self, op: Op, operands: Sequence[Any], visit: Visit) -> bool:
        """Open an operation; tell whether there was anything to open.

        `visit` is called where the values are known: in the `shard_map`, if it is one.
        """
        eqn, name = op.eqn, op.eqn.primitive.name
        inner = nested(eqn)
        if op.body is not None:
            visit(self._body(op, op.body, operands))
        elif inner is None:
            return False
        elif name == "scan":
            visit(self._scan(op, operands))
        elif name == "while":
            visit(self._while(op, operands))
        elif name == "cond":
            last = len(inner.bodies) - 1
            index = min(max(int(_jax.known(operands[0]).flat[0]), 0), last)
            visit(self._body(op, inner.bodies[index], operands[1:]))
        elif name == "shard_map":
            self._shard_map(op, inner.bodies[0], operands, visit)
        else:
            visit(self._body(op, inner.bodies[0], operands))
        return True

    def _body(self, op: Op, body: Body, operands: Sequence[Any]) -> Level:
        return self.flat(body.jaxpr, body.consts, operands, op.path, op.scopes)

    def _shard_map(
        self, op: Op, body: Body, operands: Sequence[Any], visit: Visit
    ) -> None:
        def run(*operands: Any) -> tuple[()]:
            visit(self._body(op, body, operands))
            return ()

        params = op.eqn.params
        jax.shard_map(
            run,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(),
            check_vma=params["check_vma"],
            axis_names=params["newly_manual_axes"],
        )(*operands)

    def _scan(self, op: Op, operands: Sequence[Any]) -> Level:
        eqn, level = op.eqn, Level()
        num_consts, num_carry = _jax.scan_arity(eqn)
        (body,) = _bodies(eqn)
        numbers = [level.add(x) for x in operands[: num_consts + num_carry]]
        consts, carry = numbers[:num_consts], numbers[num_consts:]
        xs = operands[num_consts + num_carry :]
        steps = range(eqn.params["length"])
        stacked: list[list[int]] = []
        run = _jitted(body)
        for step in reversed(steps) if eqn.params["reverse"] else steps:
            reads = [*consts, *carry, *(level.add(x[step]) for x in xs)]
            writes = self._round(level, op, run, body, reads, step)
            carry = writes[:num_carry]
            stacked.append(writes[num_carry:])
        level.outputs = [[k] for k in carry]
        count = len(eqn.outvars) - num_carry
        level.outputs += [[ys[k] for ys in stacked] for k in range(count)]
        return level

    def _while(self, op: Op, operands: Sequence[Any]) -> Level:
        level = Level()
        n, m = op.eqn.params["cond_nconsts"], op.eqn.params["body_nconsts"]
        cond, body = _bodies(op.eqn)
        goes_on = _jitted(cond)
        consts = [level.add(x) for x in operands[n : n + m]]
        carry, step, run = [level.add(x) for x in operands[n + m :]], 0, _jitted(body)
        while _jax.known(
            goes_on(*operands[:n], *[level.values[k] for k in carry])[0]
        ).flat[0]:
            carry = self._round(level, op, run, body, [*consts, *carry], step)
            step += 1
        level.outputs = [[k] for k in carry]
        return level

    @staticmethod
    def _round(
        level: Level, op: Op, run: Any, body: Body, reads: Sequence[int], step: int
    ) -> list[int]:
        same = {"eqn": op.eqn, "path": op.path, "scopes": op.scopes}
        return level.run(run, reads, body=body, step=step, **same)


def _bodies(eqn: Any) -> Sequence[Body]:
    inner = nested(eqn)
    return inner.bodies if inner else ()


def _jitted(body: Body) -> Callable[..., list[Any]]:
    jaxpr, consts = body.jaxpr, body.consts
    return jax.jit(lambda *operands: _jax.evaluate(jaxpr, consts, operands))
