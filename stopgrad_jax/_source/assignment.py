"""Which result of an execution's equations a variable was given.

Found as Python finds it: the equation of the whole expression, or of what the user's
function that is called there returns. Where that leaves a choice, it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import stopgrad_jax._jax as _jax

from .bindings import Assigned, Binding, Position, is_within
from .executions import Execution, Item, begins_again, is_repeat, level_of
from .labels import Spot
from .repeats import Again


class Unclear(Exception):
    """Which array a variable was given cannot be told; the message says why."""


# What an expression is to the equations that were made while it was evaluated.
_Kind = Literal["rows", "argument", "part", "result", "textless", "call"]


class Assignment:
    """Which result of a run's equations the variable was given."""

    def __init__(self, run: Execution, users: Mapping[Any, Sequence[int]]) -> None:
        self._run, self._users = run, users
        transforms = {t for i in run.items for t in _jax.transforms_of(i.eqn)}
        self._differentiated = "jvp" in transforms

    def place(self) -> tuple[int, int]:
        """Return the positions of the equation and of the result in it."""
        run = self._run
        if run.unclear:
            raise Unclear("it cannot be told where one execution of it ends")
        if run.assigned is None:
            raise Unclear("it takes a value apart in a way that is not followed")
        self._refuse_derivative(run.items[-1])
        item, result = self._given(run.items, run.depth, run.assigned)
        self._refuse_derivative(item)
        if run.assigned.index is None:
            self._refuse_several(item)
        self._refuse_early_use(item, item.eqn.outvars[result])
        return item.index, result

    def _given(
        self, items: Sequence[Item], depth: int, expression: Assigned
    ) -> tuple[Item, int]:
        """Return what an expression is, through as many calls as it takes."""
        while True:
            _refuse_unfollowed(items, depth, expression)
            whole = [i for i in items if i.spots[depth].position == expression.value]
            match _kind(items, whole, depth, expression):
                case "rows":  # `u, v = x`
                    return self._row(items, depth, expression)
                case "argument":  # `h = dropout(g(x))` at test time
                    return self._passed_on(items, depth, expression)
                case "part":  # `u, v = jnp.split(x, 2)`
                    return whole[-1], _part(whole[-1], depth, expression)
                case "result":  # `h = jnp.tanh(x)`
                    return self._result(whole, depth)
                case "textless":  # `h = f(x)`, and f was made by `exec`
                    if expression.index is not None:
                        name = whole[-1].spots[depth + 1].function
                        raise Unclear(f"{name} has no source text")
                    return self._only(whole)
                case "call":  # `h = f(x)`, and in f stands `return x * w`
                    depth += 1
                    inside = _of_one_function(whole, depth)
                    items, expression = self._returned(inside, depth, expression)
                    if items:
                        continue
                    if expression.index is not None:
                        raise Unclear(
                            "which of several results it is does not show in the source"
                        )
                    return self._only(inside)

    def _row(
        self, items: Sequence[Item], depth: int, expression: Assigned
    ) -> tuple[Item, int]:
        """`u, v = x` for an array: the rows, in order."""
        items = [i for i in items if i.spots[depth].position == expression.target]
        inside = {
            v for i in items for v in i.eqn.invars if not isinstance(v, _jax.Literal)
        }
        rows = [(i, r) for i in items for r in _results(i) if r[1] not in inside]
        at = expression.position(len(rows))
        if at is None or expression.below:
            raise Unclear("it takes an array apart in a way that is not followed")
        item, (result, _) = rows[at]
        return item, result

    def _passed_on(
        self, items: Sequence[Item], depth: int, expression: Assigned
    ) -> tuple[Item, int]:
        """`dropout(h(x))` at test time, `scan(...)[0]`, `a if c else b`."""
        inside = [
            i for i in items if is_within(i.spots[depth].position, expression.value)
        ]
        if expression.index is not None or not inside:
            raise Unclear("the whole expression makes no equation of its own")
        source = items[-1].spots[depth].source
        if source.constructs(expression.value):
            raise Unclear("it is an object, not one array")
        if not source.passes_one_on(expression.value):
            raise Unclear("which of its arguments the call there returns is not clear")
        return self._only(inside)

    def _returned(
        self, inside: Sequence[Item], depth: int, expression: Assigned
    ) -> tuple[Sequence[Item], Assigned]:
        """Return the expression that a function hands back, and the equations of it.

        There are none if that is one of several, or makes none.
        """
        callee = inside[-1].spots[depth]
        value = _returned_by(callee, [i.spots[depth] for i in inside])
        if value is None:
            return [], expression
        expression = dataclasses.replace(expression, value=value, target=value)
        parts = callee.source.parts(value)
        while (at := expression.position(len(parts))) is not None:
            expression = expression.inside(parts[at])
            parts = callee.source.parts(expression.value)
        if callee.source.is_tree(expression.value):
            raise Unclear(f"{callee.function} returns a container of arrays")
        name = callee.source.name(expression.value)
        if name:
            return self._variable(inside, depth, name, expression)
        value = expression.value
        there = [i for i in inside if is_within(i.spots[depth].position, value)]
        return there, expression

    def _variable(
        self, items: Sequence[Item], depth: int, name: str, expression: Assigned
    ) -> tuple[Sequence[Item], Assigned]:
        """`return name`: what the last statement that assigned it has assigned."""
        spot = items[-1].spots[depth]
        every = spot.source.function(spot.position).binding(name)
        if not every:
            raise Unclear(f"{spot.function} returns {name}, which it was given")
        run, last = last_assigning(items, depth, name)
        if last is None or last.assigned is None:
            raise Unclear(f"{spot.function} returns {name}, and no operation makes it")
        # `if c: y = z` made no equation, and may have run after the last that did.
        made = {id(b) for item in items for b in assigning(item, depth, name)}
        for other in every:
            quiet = id(other) not in made and other.quietly != "keeps"
            if quiet and other.may_follow(last, expression.value):
                at = f"{spot.file}:{other.place[0]}"
                raise Unclear(f"{spot.function} returns {name}, which {at} may change")
        assigned = last.assigned
        if expression.index is not None:
            if assigned.index is not None:
                raise Unclear(f"{spot.function} returns a part of a container")
            value, target = assigned.value, assigned.target
            assigned = dataclasses.replace(expression, value=value, target=target)
        return _last_execution(run, depth, assigned), assigned

    def _only(self, items: Sequence[Item]) -> tuple[Item, int]:
        """Return the one result that is used elsewhere."""
        live = list(self._live(items))
        if len(live) != 1:
            raise Unclear(f"{len(live)} arrays made in it are used elsewhere")
        return live[0]

    def _result(self, items: Sequence[Item], depth: int) -> tuple[Item, int]:
        """Return the result of an operation or of a library's function."""
        live, last = list(self._live(items)), items[-1]
        # `h = f(x)`, and nobody reads h: what was made last is what f returned.
        if not live and not self._differentiated and len(last.eqn.outvars) == 1:
            return last, 0
        if _returns_several(last, depth):
            raise Unclear(f'"{last.eqn.primitive.name}" returns several arrays')
        mine = [pair for pair in live if pair[0] is last]
        if len(live) == 1:
            return live[0]
        if self._differentiated or len(mine) != 1:
            raise Unclear(f"{len(live)} arrays made in it are used elsewhere")
        return mine[0]

    def _live(self, items: Sequence[Item]) -> Iterator[tuple[Item, int]]:
        own = {item.index for item in items}
        for item in items:
            for result, var in _results(item):
                # A result of the program is read at -1, which is no equation of these.
                if not own.issuperset(self._users.get(var, ())):
                    yield item, result

    def _refuse_derivative(self, item: Item) -> None:
        """What `jax.grad(f)(x)` calls is f, and f's value is not the gradient."""
        stack = _jax.stack_of(item.eqn)
        level = level_of(stack, item, self._run.depth)
        if level is not None and _jax.is_derivative(stack[level + 1 :]):
            raise Unclear("it calls jax.grad, jvp, vjp or linearize")

    def _refuse_several(self, item: Item) -> None:
        """A function called for each leaf of a tree leaves one value each."""
        for other, _ in self._live(self._run.items):
            if other.index != item.index and is_repeat(other, item):
                raise Unclear("a function is called there for several values")

    def _refuse_early_use(self, item: Item, var: Any) -> None:
        """What was computed from the value before it was assigned kept the old one."""
        made_of, own = {var}, {i.index for i in self._run.items}
        for other in self._run.items:
            if other.index > item.index and not made_of.isdisjoint(
                v for v in other.eqn.invars if not isinstance(v, _jax.Literal)
            ):
                made_of.update(other.eqn.outvars)
        if any(not own.issuperset(self._users.get(v, ())) for v in made_of - {var}):
            raise Unclear("the function called there uses it before it is assigned")


def _kind(
    items: Sequence[Item], whole: Sequence[Item], depth: int, expression: Assigned
) -> _Kind:
    """Tell what an expression is; `whole` are the equations of all of it."""
    if expression.index is not None:
        if any(i.spots[depth].position == expression.target for i in items):
            return "rows"
    if not whole:
        return "argument"
    inner = whole[-1].spots[depth + 1 :]
    if inner:
        return "call" if inner[0].statement else "textless"
    return "result" if expression.index is None else "part"


def _refuse_unfollowed(items: Sequence[Item], depth: int, expression: Assigned) -> None:
    """Raise where the text of an expression does not say what array it is."""
    source = items[-1].spots[depth].source
    for place in source.yields(expression.value):
        inside = any(is_within(i.spots[depth].position, place) for i in items)
        if inside or place == expression.value:
            raise Unclear("it is made of what a generator is sent or handed back")
    if expression.index is None and source.is_tree(expression.value):
        raise Unclear("it is a container of arrays, not one array")


def _of_one_function(items: Sequence[Item], depth: int) -> list[Item]:
    """Return the equations made in the function of the last one."""
    code = items[-1].spots[depth].frame.code
    every = (i for i in items if len(i.spots) > depth)
    return [i for i in every if i.spots[depth].frame.code is code]


def _last_execution(
    items: Sequence[Item], depth: int, assigned: Assigned
) -> Sequence[Item]:
    """Return the last of the executions of a statement that follow one another."""
    run: list[Item] = []
    for k, item in enumerate(items):
        rest = (i.eqn for i in items[k:])
        again = run and begins_again(run, item, depth, assigned.value, rest)
        if again is Again.YES:
            run = []
        run.append(item)
    return run


def _returned_by(callee: Spot, spots: Sequence[Spot]) -> Position | None:
    """Return the place of what a function returns; None if several places could be."""
    if callee.function.endswith("<lambda>"):
        return callee.statement.value if callee.statement else None
    places = callee.source.returned(callee.position)
    if not places:
        raise Unclear(f"{callee.function} returns no array")
    statements = [spot.statement for spot in spots]
    made = [s.value for s in statements if s and s.kind == "return"]
    # Of several `return`, it is one that was seen to make an equation.
    return places[0] if len(places) == 1 else made[-1] if made else None


def assigning(item: Item, depth: int, name: str) -> list[Binding]:
    """Return the assignments of a variable that made an equation."""
    spot = item.spots[depth]
    return [b for b in spot.source.assignments(spot.position) if b.name == name]


def last_assigning(
    items: Sequence[Item], depth: int, name: str
) -> tuple[list[Item], Binding | None]:
    """Return the last assignment that made equations, and these."""
    run, last = list[Item](), None
    for item in reversed(items):
        found = assigning(item, depth, name)
        if last is not None and last not in found:
            break
        if found:
            last = last or found[0]
            run.append(item)
    return run[::-1], last


def _returns_several(item: Item, depth: int) -> bool:
    """Tell whether the value of the call is a container, as far as JAX tells."""
    paths = _jax.result_paths(item.eqn) if _is_direct(item, depth) else None
    if _jax.jit_name(item.eqn) is not None:
        return paths is not None and "" not in paths
    return len(item.eqn.outvars) > 1


def _part(item: Item, depth: int, expression: Assigned) -> int:
    """Which result of an equation the variable at an index is."""
    eqn = item.eqn
    paths, count = _jax.result_paths(eqn), len(eqn.outvars)
    index = expression.index if expression.index is not None else 0
    # What a library wraps may return anything; JAX says of its own functions where in
    # the tree each result is, as `[0]`.
    if not _is_direct(item, depth):
        pass
    elif paths is not None and index >= 0:
        wanted = "".join(f"[{k}]" for k in (index, *(k for k, _ in expression.below)))
        mine = [k for k, path in enumerate(paths) if path == wanted]
        if len(mine) == 1:
            return mine[0]
    elif not _jax.returns_tree(eqn) and not expression.below:
        at = expression.position(count)
        if at is not None:
            return at
    raise Unclear(
        f'"{eqn.primitive.name}" does not return {expression.count} arrays, one each'
    )


def _is_direct(item: Item, depth: int) -> bool:
    """Tell whether JAX itself was called there, by no library that wraps it."""
    frames, _ = _jax.frames_of(item.eqn)
    return bool(frames) and frames[-1].code is item.spots[depth].frame.code


def _results(item: Item) -> Iterator[tuple[int, Any]]:
    return enumerate(item.eqn.outvars)
