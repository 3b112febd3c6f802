"""Random programs that read the same in JAX and in TensorFlow.

A program is data: inputs, statements that each name a value, and one query. `source`
prints it as a script for both libraries, and that script is what the test executes.
What the two libraries define differently (ties of max, abs and sign at 0, bounds of
clip, products with a literal 0, complex numbers, operations of several outputs) is not
in the table. Rounding, casts and comparisons are, but no value comes nearer than
`MARGIN` to where they jump, so no rounding error decides on which side it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

BOUND, MARGIN = 8.0, 1e-3
SHAPES = ((), (2,), (3,), (2, 2), (2, 3), (3, 2), (3, 3))
NUMBERS = ("-1.2", "-0.7", "0.3", "0.8", "1.3")


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation: which operands it takes and how it is spelled with JAX's names.

    A slot is the ranks that a float operand may have ("12"), or "int", or "number", or
    "branch", or the kind of a nested call (`NESTED`).
    """

    kind: str
    slots: tuple[str, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation applied to names, literals and further calls."""

    op: Op
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


# Each line: kind, slots, operations. An operand that is used twice is still one value.
TABLE = """
elementwise   | 012          | jnp.sin({0}); jnp.cos({0}); jnp.tanh({0})
elementwise   | 012          | jnp.exp(-{0} * {0}); jnp.sqrt(1.0 + {0} * {0})
elementwise   | 012          | nn.sigmoid({0}); nn.softplus({0}); 0.1 * {0} ** 3
elementwise   | 012 number   | {1} * {0}; {0} + {1}
elementwise   | 012 012      | {0} + {1}; {0} - {1}; {0} * {1}; {0} / (1.5 + {1} * {1})
matmul        | 2 2          | jnp.matmul({0}, {1}); jnp.einsum('ij,kj->ik', {0}, {1})
matmul        | 2 1          | jnp.matvec({0}, {1})
matmul        | 1 1          | jnp.tensordot({0}, {1}, 1); {0}[:, None] * {1}[None, :]
reduction     | 12           | jnp.sum({0}); jnp.sum({0}, axis=0); jnp.var({0})
reduction     | 12           | jnp.mean({0}, -1); jnp.cumsum({0}, 0); nn.softmax({0})
indexing      | 12           | {0}[0]; {0}[1:]; {0}[..., :2]; {0}[::-1]
indexing      | 12           | jnp.take({0}, np.array([1, 0, 1]), axis=0)
indexing      | 2            | {0}[:, 1]; {0}[1, 0]
shape         | 2            | jnp.transpose({0}); jnp.reshape({0}, [-1])[1:4]
shape         | 01 01        | jnp.stack([{0}, {1}])
shape         | 12 12        | jnp.concat([{0}, {1}], axis=0)[1:4]
stop_gradient | 012          | lax.stop_gradient({0})
stop_gradient | 012 012      | {0} * lax.stop_gradient({1})
stop_gradient | 012 rounding | {0} + lax.stop_gradient({1} - {0})
rounding      | 012          | jnp.round(2.0 * {0} + 0.2); jnp.floor(2.0 * {0} + 0.2)
integer       | 012          | lax.convert_element_type(2.5 * {0} + 0.2, jnp.int32)
cast          | integer      | {0}; lax.convert_element_type({0}, jnp.float32)
cast          | int          | 0.5 * lax.convert_element_type({0}, jnp.float32)
mask          | 012          | {0} > 0.1
where         | mask 012 012 | jnp.where({0}, {1}, {2})
test          | 012          | jnp.sum({0}) > 0.1; jnp.asarray(True); jnp.asarray(False)
cond          | test branch branch | lax.cond({0}, lambda: {1}, lambda: {2})
"""
OPS = [
    Op(kind.strip(), tuple(slots.split()), text.strip())
    for kind, slots, texts in (row.split("|") for row in TABLE.strip().split("\n"))
    for text in texts.split(";")
]
# What TensorFlow calls otherwise; after these, its names are JAX's.
RENAMED = {
    "jnp.matvec": "tf.linalg.matvec",
    "jnp.sum": "tf.reduce_sum",
    "jnp.mean": "tf.reduce_mean",
    "jnp.var": "tf.math.reduce_variance",
    "jnp.take": "tf.gather",
    "lax.convert_element_type": "tf.cast",
    "jnp.asarray": "tf.constant",
    "jnp.": "tf.",
    "lax.": "tf.",
    "nn.": "tf.nn.",
}
NESTED = ("rounding", "integer", "mask", "test")  # these jump
# What passes gradient more often than what cuts it; `cond` because it seldom fits.
DRAWN = ["elementwise"] * 4 + ["cond"] * 3
DRAWN += "matmul reduction indexing shape stop_gradient rounding cast where".split()
BRANCH = ["elementwise"] * 3 + "reduction indexing stop_gradient rounding".split()

# NumPy's float64 reading of the JAX spelling: the oracle for shapes and jumps.
NUMPY: dict[str, Any] = {
    "np": np,
    "jnp": np,
    "lax": SimpleNamespace(
        stop_gradient=lambda x: x,
        convert_element_type=np.asarray,
        # stack refuses branches of two shapes, as JAX would
        cond=lambda taken, f, g: np.stack([g(), f()])[int(taken)],
    ),
    "nn": SimpleNamespace(
        sigmoid=lambda x: 1 / (1 + np.exp(-x)),
        softplus=lambda x: np.log1p(np.exp(x)),
        softmax=lambda x: np.exp(x) / np.sum(np.exp(x), axis=-1, keepdims=True),
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
    text = call.op.text.format(*(render(x, "jax") for x in call.operands))
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
        wanted = [f"{kind}{rank}" for rank in ranks]
        types = {name: f"{v.dtype.kind}{v.ndim}" for name, v in self.values.items()}
        fitting = [name for name, held in types.items() if held in wanted]
        return fitting[int(len(fitting) * self.rng.random() ** 0.6)]

    def call(self, kind: str) -> Call:
        """Draw an operation of a kind, and its operands."""
        op = self.pick([op for op in OPS if op.kind == kind])
        return Call(op, tuple(self.operand(slot) for slot in op.slots))

    def value(self, call: Call, shift: float = 0.0) -> Any:
        """Evaluate a call where every float value is moved by `shift`."""
        moved = {k: v + shift * (v.dtype.kind == "f") for k, v in self.values.items()}
        return np.asarray(eval(render(call, "jax"), NUMPY | moved))

    def jumps(self, call: Call) -> bool:
        """Tell whether a jump is near: these operations all grow with the operand."""
        return any(
            not np.array_equal(self.value(c, -MARGIN), self.value(c, MARGIN))
            for c in calls(call)
            if c.op.kind in NESTED
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
                self.values[target] = value
                return Statement(target, call)


def generate(seed: int, number: int) -> Program:
    """Make program `number` of the run of a seed."""
    rng = np.random.default_rng([seed, number])
    shapes = (("a", ()), ("b", (3,)), ("c", (2, 3)), ("d", (3, 3)))
    inputs = {k: np.float32(rng.uniform(-1.5, 1.5, shape)) for k, shape in shapes}
    made = _Generator(rng, inputs)
    statements = tuple(made.statement() for _ in range(rng.integers(6, 15)))
    names = list(made.values)
    late = [n for n in names[-6:] if made.values[n].dtype.kind == "f"] or ["a"]
    ys = tuple(made.pick(late) for _ in range(rng.integers(1, 4)))
    cts = [np.float32(rng.uniform(-1, 1, made.values[y].shape)) for y in ys]
    grad_ys = tuple(ct if rng.random() < 0.5 else None for ct in cts)
    upstream = set(ys)
    for s in reversed(statements):
        if s.target in upstream:
            upstream.update(o for c in calls(s.call) for o in c.operands)
    # Most of a query is about what reaches its ys; the rest is None.
    pool = names + [n for n in names if n in upstream] * 4
    xs = tuple(made.pick(pool) for _ in range(rng.integers(2, 6)))
    stops = tuple(made.pick(pool) for _ in range(rng.integers(0, 4)))
    title = f"program {number} of STOPGRAD_SEED={seed}"
    return Program(title, inputs, statements, xs, ys, grad_ys, stops)


def _arrays(values: Iterable[np.ndarray | None]) -> str:
    texts = ["None" if v is None else f"np.float32({v.tolist()})" for v in values]
    return f"[{', '.join(texts)}]"


SCRIPT = """\
# {program.title}
import numpy as np
import tensorflow as tf
from jax import lax, nn, numpy as jnp

import stopgrad_jax as sg

inputs = {inputs}
xs, ys, stops = {program.xs}, {ys}, {program.stops}
cts = {cts}


def program({names}):
    {jax}
    return {last}


def jax_gradients():
    return sg.gradients(program, xs, ys=ys, grad_ys=cts, stop_gradients=stops)(*inputs)


def tf_gradients():
    {names} = map(tf.constant, inputs)
    {tf}
    named = {{**locals(), "return": {last}}}
    cotangents = [None if g is None else tf.constant(g) for g in cts]
    tf_ys, tf_xs, tf_stops = ([named[n] for n in names] for names in (ys, xs, stops))
    grads = tf.gradients(tf_ys, tf_xs, cotangents, stop_gradients=tf_stops)
    return [None if g is None else tf.convert_to_tensor(g) for g in grads]


if __name__ == "__main__":
    print(jax_gradients())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        print([None if g is None else session.run(g) for g in tf_gradients()])
"""


def source(program: Program) -> str:
    """Print a program as a script that runs it in both libraries."""
    last = program.statements[-1].target
    jax, tf = [], []
    for s in program.statements:
        jax.append(f'{s.target} = sg.name({render(s.call, "jax")}, "{s.target}")')
        tf.append(f"{s.target} = {render(s.call, 'tf')}")
    return SCRIPT.format(
        program=program,
        inputs=_arrays(program.inputs.values()),
        cts=_arrays(program.grad_ys),
        names=", ".join(program.inputs),
        jax="\n    ".join(jax),
        tf="\n    ".join(tf),
        last=last,
        ys=["return" if y == last else y for y in program.ys],
    )
