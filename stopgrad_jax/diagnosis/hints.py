"""What to write instead of an operation that nan or inf is born in."""

from __future__ import annotations

import ast

import numpy as np

from stopgrad_jax._engine.blame import Birth
from stopgrad_jax._engine.levels import Op


def hint(birth: Birth, backward: bool) -> str:
    """Return the remedy for a birth, in one or two sentences."""
    if birth.mask is not None and (call := _call(_text(birth.mask))) is not None:
        name = ast.unparse(call.func).rpartition(".")[2]
        if name in ("where", "select") and len(call.args) == 3:
            return _masked(birth.op, birth.mask, call)
    operand = birth.operands[-1] if birth.operands else np.zeros(())
    if backward:
        return (
            "the derivative is infinite there: keep the operand away from that point "
            "(jnp.where before the call, or + epsilon inside it); "
            "sg.replace_nonfinite_gradient stops what comes back from spreading"
        )
    return _FORWARD.get(birth.op.eqn.primitive.name, _OTHER).format(
        dtype=getattr(operand, "dtype", "float32")
    )


_OTHER = "check the operands above: one of them leaves the range of this operation"
_FORWARD = {
    "exp": "exp overflows {dtype}: subtract the largest argument first, as "
    "jax.nn.logsumexp and jax.nn.softmax do",
    "exp2": "exp2 overflows {dtype}: subtract the largest argument first",
    "expm1": "expm1 overflows {dtype}: clip its argument first",
    "log": "log of zero is -inf and of a negative number nan: take log(x + epsilon), "
    "or jnp.where(x > 0, x, 1.0) before the call",
    "log1p": "log1p of -1 is -inf and below it nan: keep the argument above -1",
    "div": "a division by zero: jnp.where(b == 0, 1.0, b) below the bar, and jnp.where "
    "outside for the value you mean",
    "rem": "a remainder by zero: jnp.where(b == 0, 1.0, b) before the call",
    "sqrt": "the root of a negative number: jnp.maximum(x, 0.0) before the call",
    "rsqrt": "the inverse root of zero or less: jnp.maximum(x, epsilon) before",
    "pow": "a power of zero or of a negative number: keep the base above zero",
    "integer_pow": "a power that overflows, or a negative one of zero",
    "mul": "the product overflows {dtype}, or is zero times an infinity: see operands",
    "add": "infinities of both signs are added, or the sum overflows {dtype}",
    "sub": "infinities of one sign are subtracted, as in a softmax over a row that is "
    "masked as a whole: mask with a large finite number, such as -1e9",
    "reduce_sum": "the sum overflows {dtype}: average, or sum in a wider dtype",
    "custom_linear_solve": "the matrix is singular: add epsilon * jnp.eye(n) to it",
    "triangular_solve": "the matrix is singular: add epsilon * jnp.eye(n) to it",
    "dot_general": "a product of matrices overflows {dtype}: scale the operands",
    "convert_element_type": "the number is too large for {dtype}: scale it before",
}


def _masked(op: Op, mask: Op, where: ast.Call) -> str:
    """Say the double-where remedy in the user's own terms, if they can be read."""
    text = _text(op)
    condition, yes, no = map(ast.unparse, where.args)
    argument = _argument(text)
    if argument.isidentifier():
        inner = _with_argument(text, "safe")
    else:
        argument, inner = "x", "f(safe)"
    old = _normal(text)
    bad_first = old in no and old not in yes
    safe = f"1.0, {argument}" if bad_first else f"{argument}, 1.0"
    yes, no = (side.replace(old, inner) if old in side else side for side in (yes, no))
    return (
        f"{_text(mask)} ({mask.path.spots[-1].place}) masks the value and not the "
        "derivative: zero times an infinite slope is nan. Mask the operand too: safe = "
        f"jnp.where({condition}, {safe}), then jnp.where({condition}, {yes}, {no})"
    )


def _text(op: Op) -> str:
    return op.path.spots[-1].expression if op.path.spots else ""


def _call(text: str) -> ast.Call | None:
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    return node if isinstance(node, ast.Call) and node.args else None


def _argument(text: str) -> str:
    call = _call(text)
    return ast.unparse(call.args[0]) if call else ""


def _normal(text: str) -> str:
    """Return an expression as `ast.unparse` writes it."""
    try:
        return ast.unparse(ast.parse(text, mode="eval"))
    except SyntaxError:
        return text


def _with_argument(text: str, argument: str) -> str:
    call = _call(text)
    if call is None:
        return ""
    call.args[0] = ast.Name(argument)
    return ast.unparse(call)
