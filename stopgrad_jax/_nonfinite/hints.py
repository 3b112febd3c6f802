"""What to write instead of an operation that nan or inf is born in, and why it is."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import stopgrad_jax._words.nonfinite as _words
from stopgrad_jax._source.labels import Labels
from stopgrad_jax._source.roles import COTANGENT
from stopgrad_jax._source.written import (
    is_constant,
    names_in,
    numpy_of,
    operands_of,
    replaced,
    scopes,
    written,
)

from .blame import Birth
from .edited import guards
from .entries import has_nan, wide
from .infinities import find_large_number, subtracts_largest
from .masking import find_double_where
from .search import Finding
from .settled import binds, is_plain
from .zeros import comes_back, depends


def hint(found: Finding, labels: Labels, fun: Callable[..., Any]) -> str:
    """Return the remedy, where one is known to do, or else the cause."""
    birth = found.birth
    if birth is None:
        back = found.program.calls_back
        again = _words.CALLED_BACK_HINT if back else _words.ONLY_COMPILED_HINT
        return _words.BEFORE if found.given else again
    if not birth.frames:
        return _words.BEFORE if found.given else ""
    if found.by_steps:  # compiled, as edits are tried out, it is finite anyway
        return _why(found, birth, labels)
    # An edit that was tried out says more than any cause.
    edited = _edited(found, birth, labels, fun)
    if edited:
        return edited
    came_in = found.given or found.constant
    if found.hidden or (came_in and found.factor is not None):
        if not found.program.gives_nan:
            return _words.FACTOR_IS_INFINITE
        return _words.factor_hint(_kind(found, birth))
    if came_in:
        return _words.BEFORE if found.given else ""
    cause = _why(found, birth, labels)
    if found.side == "backward":
        return cause
    return "; ".join(filter(None, [cause, _guard(found, birth, labels, fun)]))


def _edited(found: Finding, birth: Birth, labels: Labels, fun: Any) -> str:
    """Return an edit of the user's source that was found to do, or ""."""
    if birth.kind == "harm" and not found.given:
        edit = find_large_number(found.program, labels, fun)
        if edit is not None:
            row = subtracts_largest(birth.frames[-1].level, birth.op)
            cause = _words.MASKED_ROW if row else _cause(birth)
            words = _words.large_number(cause, edit.old, edit.new)
            alike = subtracts_largest(birth.frames[-1].level, birth.op, alone=True)
            return words + _words.UNIFORM if alike and not found.hidden else words
    if found.factor is None and found.side != "backward":
        return ""
    operand = found.given.operand if found.given else None
    ops = [birth.op] if found.factor is None else [birth.op, found.factor]
    for path in dict.fromkeys(op.path for op in ops):
        edit = find_double_where(found.program, labels, path, operand, fun)
        if edit is not None:
            where, side = edit.where, found.side
            return _words.double_where(where, edit.old, edit.new, side)
    return ""


def _kind(found: Finding, birth: Birth) -> str:
    x = birth.result
    if found.given:
        x = found.given.value
    elif found.constant:
        x = np.asarray(found.constant.value)[found.constant.index]
    return "nan" if has_nan(x) else "an infinity"


def _entries(birth: Birth) -> list[Any]:
    """Return the entries of the operands that the result is made of, if that is so."""
    found = []
    for x, entry in zip(birth.operands, birth.entries, strict=True):
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "fcVbiu":
            return []
        if entry is None:
            return []
        found.append(wide(x)[entry])
    return found


def _why(found: Finding, birth: Birth, labels: Labels) -> str:
    if found.side != "backward":
        return _cause(birth)
    if birth.op.role != COTANGENT:
        return _words.SLOPE
    name, entries = birth.op.eqn.primitive.name, _entries(birth)
    nan = bool(np.isnan(wide(birth.result)[birth.index]))
    if name == "div" and entries and entries[1] == 0:
        if nan and comes_back(birth, found.program, labels):
            return _words.ZERO_COMES_BACK
        by_slope = not depends(birth.frames[-1].level, birth.op.reads[1])
        return _words.SLOPE if by_slope and not nan else _cause(birth)
    if not nan and name in (*_OVERFLOW, "div"):
        return _words.BACK_OVERFLOWS.format(dtype=birth.result.dtype)
    return _cause(birth)


def _cause(birth: Birth) -> str:
    """Say why an operation gives nan or inf, by what it is and what it was given."""
    name, result = birth.op.eqn.primitive.name, birth.result
    entries = _entries(birth)
    dtype = str(result.dtype)
    nan = bool(np.isnan(wide(result)[birth.index]))
    first = entries[0] if entries else None
    last = entries[-1] if entries else None
    if name in ("exp", "exp2", "expm1") and not nan and first is not None:
        log = {"exp2": 2.0}.get(name, np.e)
        limit = float(np.log(float(jnp.finfo(dtype).max)) / np.log(log))
        return _words.EXP.format(name=name, dtype=dtype, limit=limit)
    if name in _AT_ZERO and last is not None and _is_subnormal(last, dtype):
        tiny = float(jnp.finfo(dtype).tiny)
        return _words.SUBNORMAL.format(name=name, tiny=tiny, dtype=dtype)
    if name == "log" and first is not None:
        return _words.LOG_OF_ZERO if first == 0 else _words.LOG_OF_NEGATIVE
    if name == "rem" and last == 0 and nan:
        return _words.REMAINDER
    if name == "div" and last == 0 and first == 0:
        return _words.ZERO_BY_ZERO
    inverse = name == "integer_pow" and birth.op.eqn.params["y"] < 0
    if last == 0 and (name == "div" or inverse):
        return _words.BY_ZERO.format(value="nan" if nan else "inf")
    if name in ("sqrt", "rsqrt") and first is not None and not np.iscomplexobj(first):
        return _words.ROOT_OF_NEGATIVE if first < 0 else _words.ROOT_OF_ZERO
    if name in ("add", "sub", "mul") and nan and birth.kind == "harm":
        return {
            "add": _words.UNLIKE,
            "sub": _words.ALIKE,
            "mul": _words.ZERO_TIMES_INFINITY,
        }[name]
    if name in ("custom_linear_solve", "triangular_solve"):
        return _words.SINGULAR.format(dtype=dtype)
    if not nan and (name in _OVERFLOW or (name == "div" and last)):
        return _words.OVERFLOWS.format(dtype=dtype)
    return _other(birth)


def _other(birth: Birth) -> str:
    name, dtype = birth.op.eqn.primitive.name, birth.result.dtype
    return _words.OTHER.format(name=name, dtype=dtype)


def _is_subnormal(x: Any, dtype: str) -> bool:
    return bool(0 < abs(x) < float(jnp.finfo(dtype).tiny))


# Sums and products: of finite operands they are infinite by their size alone.
_OVERFLOW = frozenset(
    "mul add add_any sub reduce_sum reduce_prod cumsum cumprod dot_general "
    "conv_general_dilated scatter-add fft square integer_pow "
    "convert_element_type".split()
)
_AT_ZERO = ("log", "div", "rem", "rsqrt")  # singular there

# Where these have a finite value; b is a divisor. Complex numbers have no order, and
# are only kept from zero.
_DOMAINS = {
    "log": ("> 0", "1.0"),
    "log1p": ("> -1", "0.0"),
    "sqrt": (">= 0", "1.0"),
    "rsqrt": ("> 0", "1.0"),
    "div": ("!= 0", "1.0"),
}


_TESTS: dict[str, Callable[[Any], Any]] = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    "> -1": lambda x: x > -1,
    "!= 0": lambda x: x != 0,
}


def _guard(
    found: Finding, birth: Birth, labels: Labels, fun: Callable[..., Any]
) -> str:
    """Say in the user's own words how to give an operation a value everywhere."""
    op = birth.op
    name, spot = op.eqn.primitive.name, op.path.spots[-1] if op.path.spots else None
    if birth.kind != "birth" or name not in _DOMAINS or spot is None:
        return ""
    entries, dtype = _entries(birth), str(birth.result.dtype)
    if not entries or (name == "div" and entries[-1] != 0):
        return ""
    if name == "sqrt" and not np.all(wide(birth.operands[-1])):
        return ""  # its value at zero is healthy, and its slope is not
    if name in _AT_ZERO and _is_subnormal(entries[-1], dtype):
        return ""
    function, module = written(spot), numpy_of(scopes(spot, fun))
    node = function.expression(spot) if function else None
    if function is None or node is None or not module or not _is_only(node, name):
        return ""
    operand = node.right if isinstance(node, ast.BinOp) else operands_of(node)[0]
    domain, number = _DOMAINS[name]
    if np.issubdtype(birth.result.dtype, np.complexfloating):
        if name not in _AT_ZERO:
            return ""
        domain = "!= 0"
    variable, test = op.eqn.invars[-1], _TESTS[domain]
    if not guards(found.program, labels, op.eqn, variable, test, float(number)):
        return ""
    once = _once(node, operand, function.function, scopes(spot, fun))
    if once is None:
        return ""
    first, again = once
    tight = isinstance(operand, ast.Name | ast.Call | ast.Attribute | ast.Subscript)
    tight = tight and first == again
    where = f"{first if tight else f'({first})'} {domain}"
    masked = f"{again if tight or first != again else f'({again})'} {domain}"
    safe = replaced(node, operand, f"{module}.where({masked}, {again}, {number})")
    new = f"{module}.where({where}, {safe}, value)"
    return _words.guard(ast.unparse(node), new)


def _once(
    node: ast.expr, operand: ast.expr, function: ast.AST, names: Any
) -> tuple[str, str] | None:
    """Return how an operand is written first, and how after that; None if not at all.

    What may be another value the second time, or have an effect, is given a name. It is
    computed first then, so nothing else may be computed before it.
    """
    text = ast.unparse(operand)
    if is_plain(operand, names):
        return text, text
    if _waits(operand):
        return None
    if isinstance(node, ast.BinOp) and not is_constant(node.left):
        if not isinstance(node.left, ast.Name) or node.left.id in binds(operand):
            return None
    for part in ast.walk(function):
        if isinstance(part, _COMPREHENSIONS) and node in ast.walk(part):
            return None
    used = names_in(function) | binds(function)
    name = next((name for name in _NAMES if name not in used), None)
    return (f"{name} := {text}", name) if name else None


def _waits(operand: ast.expr) -> bool:
    return any(
        isinstance(n, ast.Await | ast.Yield | ast.YieldFrom) for n in ast.walk(operand)
    )


_NAMES = ("z", "u", "v", "operand")
_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def _is_only(node: ast.expr, name: str) -> bool:
    """Tell an expression that is nothing but this operation, entry by entry."""
    if isinstance(node, ast.BinOp):
        division = name == "div" and isinstance(node.op, ast.Div)
        return division and not is_constant(node.right)
    if not isinstance(node, ast.Call) or len(node.args) != 1:
        return False
    called = ast.unparse(node.func).rpartition(".")[2]
    return called == name and len(operands_of(node)) == 1
