"""Tell where an execution of a statement made no operation, beside others that did.

`h = v.astype(dtype)` makes none where `v` has that type. Such an execution leaves no
equation, but what is made of `h` afterwards does: `h * h` reads an array that is none
of those that were found. Only operations of JAX on the variable itself are looked at,
and only where this statement, and no other one, can have assigned it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stopgrad_jax._jax as _jax

from .bindings import Binding, Function, Position, is_within
from .executions import Execution, Item, is_same_call
from .texts import is_name, node_at, operands


def reads_another(
    run: Execution,
    items: Sequence[Item],
    given: frozenset[Any],
    users: Mapping[Any, Sequence[int]],
) -> bool:
    """Tell whether an operation on the variable reads another array than was found.

    Args:
      run: one of the executions of the statement that were found.
      items: every equation of the jaxpr.
      given: what was found of the variable in the jaxpr.
      users: the equations that read each variable of the jaxpr.
    """
    binding, code = run.binding, run.spot.frame.code
    function = run.spot.source.function(binding.place)
    if not binding.name.isidentifier() or _is_elsewhere(function, binding.name):
        return False
    if binding.quietly == "none" or any(map(_is_derived, run.items)):
        return False
    at: dict[tuple[Any, Position], list[Item]] = {}
    for item in items:
        spot = item.spots[-1]
        if spot.frame.code is code and _is_direct(item) and spot.is_current:
            at.setdefault((item.spots[:-1], spot.position), []).append(item)
    for (_, place), direct in at.items():
        node = _operation(function, binding, place)
        if node is not None and not any(map(_is_derived, direct)):
            depth = len(direct[0].spots) - 1
            inside = [i for i in items if _is_inside(i, direct[0], depth)]
            if any(_is_apart(node, binding.name, inside, direct, given, users)):
                return True
    return False


def _operation(function: Function, binding: Binding, place: Position) -> Any:
    """Return the operation at a place if it works on what this binding gave."""
    if is_within(place, binding.place) or not _is_given(function, binding, place):
        return None
    node = node_at(function.node, place)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Call):
        return None
    is_operand = any(is_name(x, binding.name) for x in operands(node))
    return node if is_operand else None


def _is_apart(
    node: Any,
    name: str,
    inside: Sequence[Item],
    direct: Sequence[Item],
    given: frozenset[Any],
    users: Mapping[Any, Sequence[int]],
) -> Iterator[bool]:
    """Tell of each result of an operation whether it is made of other arrays only."""
    made = {v: item.eqn for item in inside for v in item.eqn.outvars}
    own = {item.index for item in inside}
    # Of `jnp.dot(h, w)`, jnp is no array.
    func = node.func if isinstance(node, ast.Call) else None
    callee = {n for n in ast.walk(func) if isinstance(n, ast.Name)} if func else set()
    read = {n for n in ast.walk(node) if isinstance(n, ast.Name)} - callee
    alone = {n.id for n in read} <= {name}
    written = any(isinstance(n, ast.Constant) for n in ast.walk(node))
    for item in direct:
        if all(own.issuperset(users.get(v, ())) for v in item.eqn.outvars):
            continue
        roots, eqns = _roots(item.eqn, made, given)
        # A number that the text does not have may be what the variable is now.
        number = any(isinstance(v, _jax.Literal) for eqn in eqns for v in eqn.invars)
        # What is only moved may be another variable of the expression.
        moved = all(eqn.primitive.name in _MOVES for eqn in eqns)
        if alone or not (moved or (number and not written)):
            yield bool(roots) and given.isdisjoint(roots)


def _roots(
    eqn: Any, made: Mapping[Any, Any], given: frozenset[Any]
) -> tuple[set[Any], list[Any]]:
    """Return the arrays from outside that a result is made of, and the equations."""
    roots, eqns, waiting, seen = set[Any](), [eqn], [*eqn.invars], set[Any]()
    while waiting:
        atom = waiting.pop()
        if isinstance(atom, _jax.Literal) or atom in seen:
            continue
        seen.add(atom)
        if atom in made and atom not in given:
            eqns.append(made[atom])
            waiting += made[atom].invars
        else:
            roots.add(atom)
    return roots, eqns


def _is_given(function: Function, binding: Binding, place: Position) -> bool:
    """Tell whether a variable read at a place has what one binding gave, for sure."""
    others = [
        b for b in function.bindings if b.name == binding.name and b is not binding
    ]
    if not others and binding.name not in function.parameters:
        return True
    if binding.arms or not all(is_within(place, loop) for loop in binding.loops):
        return False
    start, end = binding.place[:2], place[:2]
    if not start < end or any(b.how == "in" for b in others):
        return False
    for other in others:
        if start < other.place[:2] < end or is_within(other.place, place):
            return False
        if is_within(binding.place, other.place):  # `h = (h := f(x)) * 2`
            return False
        if any(is_within(place, loop) for loop in other.loops - binding.loops):
            return False
    return True


def _is_elsewhere(function: Function, name: str) -> bool:
    """Tell whether a function inside may assign the variable."""
    nodes = ast.walk(function.node)
    outer = (n for n in nodes if isinstance(n, ast.Nonlocal | ast.Global))
    return any(name in n.names for n in outer)


def _is_inside(item: Item, other: Item, depth: int) -> bool:
    """Tell whether an equation was made in the expression of another one."""
    return is_same_call(item, other, depth) and is_within(
        item.spots[depth].position, other.spots[depth].position
    )


def _is_direct(item: Item) -> bool:
    """Tell whether JAX itself was called there, by no library that wraps it."""
    frames, _ = _jax.frames_of(item.eqn)
    return bool(frames) and frames[-1].code is item.spots[-1].frame.code


def _is_derived(item: Item) -> bool:
    """Tell what was made by a derivative: it reads tangents beside the values."""
    return bool({"jvp", "transpose"} & {*_jax.transforms_of(item.eqn)})


_MOVES = frozenset(
    "broadcast_in_dim convert_element_type copy dynamic_slice gather reshape slice "
    "split squeeze transpose unstack".split()
)
