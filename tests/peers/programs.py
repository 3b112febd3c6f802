"""Random programs that read the same in JAX and in TensorFlow.

A program is inputs, statements that each give a value a name, and one query. It is
data; `source` prints it as a script for both libraries, and that script is what the
test executes, so what a failure prints is what was run.

What the two libraries define differently (ties of max, abs and sign at 0, bounds of
clip, products with a literal 0, complex numbers, operations of several outputs) is not
in the table of operations. Jumps (rounding, casts, comparisons) are in it, but never
nearer to a jump than `MARGIN`, so no rounding error decides on which side a value is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

BOUND = 8.0
MARGIN = 1e-3
SHAPES = ((), (2,), (3,), (2, 2), (2, 3), (3, 2), (3, 3))
NUMBERS = ("-1.2", "-0.7", "0.3", "0.8", "1.3")


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: which operands it takes and how it is spelled with JAX's names.

    A slot is the ranks that a float operand may have ("12"), or "int", or "number", or
    the kind of a nested call ("rounding", "mask", "predicate", "branch").
    """

    kind: str
    slots: str
    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation applied to names, literals and further calls."""

    op: str
    operands: tuple[str | Call, ...]


@dataclasses.dataclass(frozen=True)
class Statement:
    """One line of a program: `target = call`."""

    target: str
    call: Call


@dataclasses.dataclass(frozen=True)
class Program:
    """Inputs, statements and the query; names in it are inputs or targets."""

    title: str
    inputs: dict[str, np.ndarray]
    statements: tuple[Statement, ...]
    xs: tuple[str, ...]
    ys: tuple[str, ...]
    grad_ys: tuple[np.ndarray | None, ...]
    stops: tuple[str, ...]


OPS = {
    "sin": Op("elementwise", "012", "jnp.sin({0})"),
    "cos": Op("elementwise", "012", "jnp.cos({0})"),
    "tanh": Op("elementwise", "012", "jnp.tanh({0})"),
    "exp": Op("elementwise", "012", "jnp.exp(-{0} * {0})"),
    "sqrt": Op("elementwise", "012", "jnp.sqrt(1.0 + {0} * {0})"),
    "sigmoid": Op("elementwise", "012", "nn.sigmoid({0})"),
    "softplus": Op("elementwise", "012", "nn.softplus({0})"),
    "cube": Op("elementwise", "012", "0.1 * {0} ** 3"),
    "scale": Op("elementwise", "012 number", "{1} * {0}"),
    "shift": Op("elementwise", "012 number", "{0} + {1}"),
    "add": Op("elementwise", "012 012", "{0} + {1}"),
    "subtract": Op("elementwise", "012 012", "{0} - {1}"),
    "multiply": Op("elementwise", "012 012", "{0} * {1}"),
    "divide": Op("elementwise", "012 012", "{0} / (1.5 + {1} * {1})"),
    "matmul": Op("matmul", "2 2", "jnp.matmul({0}, {1})"),
    "matvec": Op("matmul", "2 1", "jnp.matvec({0}, {1})"),
    "dot": Op("matmul", "1 1", "jnp.tensordot({0}, {1}, 1)"),
    "einsum": Op("matmul", "2 2", "jnp.einsum('ij,kj->ik', {0}, {1})"),
    "sum": Op("reduction", "12", "jnp.sum({0})"),
    "rows": Op("reduction", "12", "jnp.sum({0}, axis=0)"),
    "mean": Op("reduction", "12", "jnp.mean({0}, axis=-1)"),
    "var": Op("reduction", "12", "jnp.var({0})"),
    "softmax": Op("reduction", "12", "nn.softmax({0})"),
    "cumsum": Op("reduction", "12", "jnp.cumsum({0}, axis=0)"),
    "first": Op("indexing", "12", "{0}[0]"),
    "column": Op("indexing", "2", "{0}[:, 1]"),
    "tail": Op("indexing", "12", "{0}[1:]"),
    "head": Op("indexing", "12", "{0}[..., :2]"),
    "reverse": Op("indexing", "12", "{0}[::-1]"),
    "take": Op("indexing", "12", "jnp.take({0}, np.array([1, 0, 1]), axis=0)"),
    "transpose": Op("shape", "2", "jnp.transpose({0})"),
    "reshape": Op("shape", "2", "jnp.reshape({0}, [-1])[1:4]"),
    "stack": Op("shape", "01 01", "jnp.stack([{0}, {1}])"),
    "concat": Op("shape", "12 12", "jnp.concat([{0}, {1}], axis=0)"),
    "outer": Op("shape", "1 1", "{0}[:, None] * {1}[None, :]"),
    "stop": Op("stop_gradient", "012", "lax.stop_gradient({0})"),
    "gate": Op("stop_gradient", "012 012", "{0} * lax.stop_gradient({1})"),
    "article": Op(
        "stop_gradient", "012 rounding", "{0} + lax.stop_gradient({1} - {0})"
    ),
    "round": Op("rounding", "012", "jnp.round(2.0 * {0} + 0.2)"),
    "floor": Op("rounding", "012", "jnp.floor(2.0 * {0} + 0.2)"),
    "to_int": Op("cast", "012", "jnp.astype(2.5 * {0} + 0.2, jnp.int32)"),
    "to_float": Op("cast", "int", "0.5 * jnp.astype({0}, jnp.float32)"),
    "through_int": Op("cast", "integer", "jnp.astype({0}, jnp.float32)"),
    "integer": Op("integer", "012", "jnp.astype(2.5 * {0} + 0.2, jnp.int32)"),
    "where": Op("where", "mask 012 012", "jnp.where({0}, {1}, {2})"),
    "cond": Op(
        "cond", "predicate branch branch", "lax.cond({0}, lambda: {1}, lambda: {2})"
    ),
    "greater": Op("mask", "012", "{0} > 0.1"),
    "above": Op("predicate", "012", "jnp.sum({0}) > 0.1"),
    "true": Op("predicate", "", "jnp.asarray(True)"),
    "false": Op("predicate", "", "jnp.asarray(False)"),
}
# What TensorFlow calls otherwise; after these, its names are JAX's.
RENAMED = {
    "jnp.matvec": "tf.linalg.matvec",
    "jnp.sum": "tf.reduce_sum",
    "jnp.mean": "tf.reduce_mean",
    "jnp.var": "tf.math.reduce_variance",
    "jnp.take": "tf.gather",
    "jnp.astype": "tf.cast",
    "jnp.asarray": "tf.constant",
    "jnp.": "tf.",
    "lax.": "tf.",
    "nn.": "tf.nn.",
}
JUMPS = {"round", "floor", "integer", "to_int", "greater", "above"}
NESTED = {"mask", "predicate", "rounding", "integer"}
BRANCH = (*["elementwise"] * 3, "reduction", "indexing", "stop_gradient", "rounding")
KINDS = ("elementwise", "matmul", "reduction", "indexing", "shape", "stop_gradient")
KINDS += ("rounding", "cast", "where", "cond")
# Drawn from: what passes gradient more often than what cuts it, and `cond` more often
# because its operands often do not fit and the draw is then repeated.
DRAWN = (*KINDS, *["elementwise"] * 3, "cond", "cond")


def _cond(predicate: Any, then: Any, otherwise: Any) -> Any:
    """Take a branch as JAX does: both must have one type."""
    values = np.asarray(otherwise()), np.asarray(then())
    if values[0].shape != values[1].shape:
        raise ValueError("branches differ in shape")
    return values[int(predicate)]


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True)


# The JAX spelling evaluated by NumPy in float64: the generator's own oracle for shapes,
# bounds and jumps, which needs neither library.
NUMPY: dict[str, Any] = {
    "np": np,
    "jnp": SimpleNamespace(
        **vars(np) | {"astype": lambda x, dtype: np.asarray(x).astype(dtype)}
    ),
    "lax": SimpleNamespace(stop_gradient=lambda x: x, cond=_cond),
    "nn": SimpleNamespace(
        sigmoid=lambda x: 1 / (1 + np.exp(-x)),
        softplus=lambda x: np.log1p(np.exp(x)),
        softmax=_softmax,
    ),
}


def calls(call: Call) -> Iterator[Call]:
    """Yield a call and all calls inside it."""
    yield call
    for operand in call.operands:
        if isinstance(operand, Call):
            yield from calls(operand)


def render(call: str | Call, library: str) -> str:
    """Spell an expression for "jax" or "tf"."""
    if isinstance(call, str):
        return call
    text = OPS[call.op].text.format(*(render(x, "jax") for x in call.operands))
    for jax, tf in RENAMED.items() if library == "tf" else ():
        text = text.replace(jax, tf)
    return text


class _Generator:
    """A program in the making: its random numbers and the values so far."""

    def __init__(self, rng: np.random.Generator, inputs: dict[str, np.ndarray]) -> None:
        self.rng = rng
        self.values: dict[str, Any] = {k: np.float64(v) for k, v in inputs.items()}

    def pick(self, items: Any) -> Any:
        """Draw one, all alike."""
        return items[self.rng.integers(len(items))]

    def operand(self, slot: str) -> str | Call:
        """Draw what fits a slot; later values are likelier, so programs get deep."""
        if slot == "number":
            return self.pick(NUMBERS)
        if slot == "branch":
            return self.call(self.pick(BRANCH))
        if slot in NESTED:
            return self.call(slot)
        kind, ranks = ("i", "012") if slot == "int" else ("f", slot)
        fitting = [
            name
            for name, value in self.values.items()
            if value.dtype.kind == kind and str(np.ndim(value)) in ranks
        ]
        if not fitting:
            raise ValueError(f"no value fits {slot}")
        return fitting[int(len(fitting) * self.rng.random() ** 0.6)]

    def call(self, kind: str) -> Call:
        """Draw an operation of a kind, and its operands."""
        op = self.pick([name for name, op in OPS.items() if op.kind == kind])
        return Call(op, tuple(self.operand(slot) for slot in OPS[op].slots.split()))

    def value(self, call: Call, shift: float = 0.0) -> Any:
        """Evaluate a call where every float value is moved by `shift`."""
        moved = {
            k: v + shift if v.dtype.kind == "f" else v for k, v in self.values.items()
        }
        return np.asarray(eval(render(call, "jax"), NUMPY | moved))

    def jumps(self, call: Call) -> bool:
        """Tell whether a jump is near: these operations all grow with the operand."""
        return any(
            not np.array_equal(self.value(c, -MARGIN), self.value(c, MARGIN))
            for c in calls(call)
            if c.op in JUMPS
        )

    def statement(self) -> Statement:
        """Draw calls until one is well-typed, bounded and away from jumps."""
        while True:
            try:
                call = self.call(self.pick(DRAWN))
                value = self.value(call)
            except (ValueError, IndexError):
                continue
            small = value.shape in SHAPES and np.max(np.abs(value)) < BOUND
            if small and not self.jumps(call):
                target = f"h{sum(name.startswith('h') for name in self.values)}"
                kind = np.int64 if value.dtype.kind == "i" else np.float64
                self.values[target] = value.astype(kind)
                return Statement(target, call)


def generate(seed: int, number: int) -> Program:
    """Make program `number` of the run of a seed."""
    rng = np.random.default_rng([seed, number])
    shapes = {"a": (), "b": (3,), "c": (2, 3), "d": (3, 3)}
    inputs = {
        k: rng.uniform(-1.5, 1.5, s).astype(np.float32) for k, s in shapes.items()
    }
    made = _Generator(rng, inputs)
    statements = tuple(made.statement() for _ in range(rng.integers(6, 15)))
    names = list(made.values)
    late = [n for n in names[-6:] if made.values[n].dtype.kind == "f"] or ["a"]
    ys = tuple(made.pick(late) for _ in range(rng.integers(1, 4)))
    grad_ys = tuple(
        rng.uniform(-1, 1, made.values[y].shape).astype(np.float32)
        if rng.random() < 0.5
        else None
        for y in ys
    )
    xs = tuple(made.pick(names) for _ in range(rng.integers(2, 6)))
    stops = tuple(made.pick(names) for _ in range(rng.integers(0, 4)))
    title = f"program {number} of STOPGRAD_SEED={seed}"
    return Program(title, inputs, statements, xs, ys, grad_ys, stops)


def _array(value: np.ndarray) -> str:
    return f"np.array({value.tolist()}, np.float32)"


SCRIPT = """\
# {title}
import numpy as np
import tensorflow as tf
from jax import lax, nn
from jax import numpy as jnp

import stopgrad_jax as sg

inputs = [{inputs}]
grad_ys = [{grad_ys}]


def jax_program({names}):
    {jax}
    return {last}


def jax_gradients():
    stops = {stops}
    query = sg.gradients(
        jax_program, {xs}, ys={ys}, grad_ys=grad_ys, stop_gradients=stops
    )
    return query(*inputs)


def tf_gradients():
    {names} = map(tf.constant, inputs)
    {tf}
    cotangents = [None if g is None else tf.constant(g) for g in grad_ys]
    grads = tf.gradients({tf_ys}, {tf_xs}, cotangents, stop_gradients={tf_stops})
    return [None if g is None else tf.convert_to_tensor(g) for g in grads]


if __name__ == "__main__":
    print(jax_gradients())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        print([None if g is None else session.run(g) for g in tf_gradients()])
"""


def source(program: Program) -> str:
    """Print a program as a script that runs it in both libraries."""
    lines: dict[str, list[str]] = {"jax": [], "tf": []}
    for s in program.statements:
        named = f'sg.name({render(s.call, "jax")}, "{s.target}")'
        lines["jax"].append(f"{s.target} = {named}")
        lines["tf"].append(f"{s.target} = {render(s.call, 'tf')}")
    last = program.statements[-1].target
    cotangents = ["None" if g is None else _array(g) for g in program.grad_ys]
    return SCRIPT.format(
        title=program.title,
        inputs=", ".join(_array(value) for value in program.inputs.values()),
        grad_ys=", ".join(cotangents),
        names=", ".join(program.inputs),
        jax="\n    ".join(lines["jax"]),
        tf="\n    ".join(lines["tf"]),
        last=last,
        xs=list(program.xs),
        ys=["return" if y == last else y for y in program.ys],
        stops=list(program.stops),
        tf_xs=f"[{', '.join(program.xs)}]",
        tf_ys=f"[{', '.join(program.ys)}]",
        tf_stops=f"[{', '.join(program.stops)}]",
    )
