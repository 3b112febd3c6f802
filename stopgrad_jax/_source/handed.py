"""What a function was handed in a call: looked up as the reader of the source does.

The argument in the text of the call is an expression, whose equations are known, or a
variable: what its last assignment gave it, or what the caller was handed itself.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import stopgrad_jax._jax as _jax

from .assignment import Assignment, Unclear, assigning, last_assigning
from .bindings import (
    DISPLAYS,
    STATEMENT,
    Assigned,
    Binding,
    Function,
    Position,
    is_within,
    place_of,
)
from .executions import (
    Execution,
    Item,
    begins_again,
    function_level,
    is_same_call,
    level_of,
)
from .labels import Spot
from .repeats import Again
from .variables import users_of

_OBJECTS = ("__call__", "__init__")


class Spread(NamedTuple):
    """The names of a function's `*args` and `**kwargs`, and how many args it was given.

    A library's function hands them on to the first function of the user.
    """

    args: str
    kwargs: str
    given: int


class Handed:
    """The values that the functions called in one jaxpr are handed.

    `origin` is the function that the jaxpr was traced from; `spread` is None in a
    nested jaxpr.
    """

    def __init__(
        self,
        jaxpr: Any,
        items: Sequence[Item],
        origin: _jax.Origin | None,
        spread: Spread | None = None,
    ) -> None:
        self._jaxpr, self._items = jaxpr, items
        self._origin, self._spread = origin, spread
        self.inputs = origin.inputs if origin else {}
        self.users = users_of(jaxpr)

    def is_origin(self, spot: Spot) -> bool:
        """Tell whether the function there is the one that was traced."""
        code, origin = spot.frame.code, self._origin
        return (
            code is not None
            and origin is not None
            and (code.co_name, code.co_filename, code.co_firstlineno) == origin[:3]
        )

    def value(self, first: Item, depth: int, function: Function, name: str) -> Any:
        """Return the variable of the jaxpr that a parameter was.

        `first` is the first equation made in the call, `depth` the function's place
        among its spots.
        """
        if depth == 0 and self.is_origin(first.spots[0]):
            return self._input(name)
        outer = self.caller_of(first, depth)
        if outer >= 0:
            node, kept = self._argument(first, outer, depth, function, name)
            for other in kept:
                self._refuse_reading(first, outer, depth, name, other)
            return self.evaluated(first, outer, node)
        var = self._spread_out(function, name)
        others = [v for k, v in self._named_inputs() if k != name and v is not var]
        # Without a call to read, a library may have handed its arguments on in another
        # order: then what spells the parameter reads another one.
        later = [i for i in self._items if i.index >= first.index]
        same = [item for item in later if is_same_call(item, first, depth)]
        if any(self.reads(same, depth, name, other) for other in others):
            raise Unclear(f"which argument of {function.path[-1]} it is, is not clear")
        return var

    def _spread_out(self, function: Function, name: str) -> Any:
        """Return what a library's function hands on of its own arguments."""
        called, positional = function.path[-1], positional_of(function)
        if self._spread is not None:
            args, kwargs, given = self._spread
            fits = set(_required(function)) <= {*positional[:given], *self.inputs}
            if args and name in positional and fits and given <= len(positional):
                return self._input(f"{args}[{positional.index(name)}]")
            if kwargs and f"{kwargs}['{name}']" in self.inputs:
                return self._input(f"{kwargs}['{name}']")
            if name in self.inputs and not args:  # haiku keeps the signature
                return self._input(name)
        raise Unclear(f"{called} is not called by code that has a source")

    def _named_inputs(self) -> list[tuple[str, Any]]:
        """Return the arguments of the traced function that are arrays themselves."""
        if self._spread is None or not self._spread.args:
            return []
        invars = self._jaxpr.invars
        return [(k, invars[n]) for k, n in self.inputs.items() if k.isidentifier()]

    def is_input(self, k: int, var: Any) -> bool:
        """Tell whether a variable is the argument at a position."""
        return self._jaxpr.invars[k] is var

    def _input(self, spelled: str) -> Any:
        if spelled in self.inputs:
            return self._jaxpr.invars[self.inputs[spelled]]
        inside = f"{spelled}[", f"{spelled}."
        below = [p for p in self.inputs if p.startswith(inside)]
        raise Unclear("it is a container of arrays" if below else "it is no array")

    # The text of the call -------------------------------------------------------

    @staticmethod
    def caller_of(first: Item, depth: int) -> int:
        """Return the depth of the function that spells the arguments; -1 for none.

        A function of `*args` that calls with them hands on what it was handed.
        """
        for outer in range(depth - 1, -1, -1):
            spot = first.spots[outer]
            call = spot.source.call_at(spot.position) if spot.is_current else None
            if call is None or not _hands_on(call, spot.source.function(spot.position)):
                return outer
        return -1

    def _argument(
        self, first: Item, outer: int, depth: int, function: Function, name: str
    ) -> tuple[ast.expr, Sequence[ast.expr]]:
        """Return the expression that is handed over, and those a library keeps."""
        caller, called = first.spots[outer], function.path[-1]
        call = caller.source.call_at(caller.position)
        if call is None or any(isinstance(x, ast.Starred) for x in call.args):
            raise Unclear(f"how {called} is called does not show in the source")
        keywords = {k.arg: k.value for k in call.keywords}
        given, positional = list(call.args), positional_of(function)
        taken, names = self._taken(first, outer, depth)
        if names is None or None in keywords or name in names:
            raise Unclear(f"how {called} is called does not show in the source")
        kept, given = given[:taken], given[taken:]
        if function.bound and len(given) == len(positional) + 1:  # Net.forward(net, x)
            given = given[1:]
        filled = [*positional[: len(given)], *keywords]
        # By another name it may be a `partial`, with arguments that are not seen here:
        # then the call has to give all of them, those with defaults, too.
        by_name = caller.source.callee(caller.position) == called or outer < depth - 1
        needed = _required(function) if by_name or called in _OBJECTS else positional
        if not set(needed) <= {*filled}:
            raise Unclear(f"which argument it is in the call of {called} is not clear")
        if name in keywords:
            node = keywords[name]
        elif name not in positional or len(given) > len(positional):
            raise Unclear(f"{name} takes the rest of the arguments, or a default")
        elif positional.index(name) >= len(given):
            raise Unclear("it is not handed over there: it is its default")
        else:
            node = given[positional.index(name)]
        # `f(h, h)`: in the program, both parameters are one variable.
        every = [ast.dump(x) for x in (*given, *keywords.values())]
        if every.count(ast.dump(node)) > 1:
            raise Unclear(f"one value is handed over to {called} twice")
        return node, kept

    @staticmethod
    def _taken(first: Item, outer: int, depth: int) -> tuple[int, Sequence[str] | None]:
        """Return how many arguments a library keeps for itself, and their names.

        Between the user's call and the user's function there may be a library's: a
        function of `*args` hands them on, in order. None if it is another one.
        """
        stack = _jax.stack_of(first.eqn)
        start = level_of(stack, first, outer)
        end = function_level(stack, first, depth)
        if start is None or end is None:
            return 0, None
        codes = [code for code, _ in stack[start + 1 : end]]
        # JAX wraps its transformations in this, which hands everything on.
        codes = [c for c in codes if c.co_name != "reraise_with_filtered_traceback"]
        if not codes:
            return 0, ()
        code = codes[0]
        if not code.co_flags & inspect.CO_VARARGS:
            return 0, None
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        own = [n for n in names[: code.co_argcount] if n not in ("self", "cls")]
        return len(own), names

    def _refuse_reading(
        self, first: Item, outer: int, depth: int, name: str, node: ast.expr
    ) -> None:
        """What a library keeps may be what it hands on: `tree.map(f, a, b)`."""
        try:
            var = self.evaluated(first, outer, node)
        except Unclear:
            return
        later = [i for i in self._items if i.index >= first.index]
        if self.reads(
            [i for i in later if is_same_call(i, first, depth)], depth, name, var
        ):
            raise Unclear("which of the arguments there it is, is not clear")

    @staticmethod
    def reads(items: Iterable[Item], depth: int, name: str, var: Any) -> bool:
        """Tell whether an expression that spells a parameter reads a variable."""
        for item in items:
            spot = item.spots[depth]
            if any(atom is var for atom in item.eqn.invars):
                if spot.is_current and spot.source.spells(spot.position, name):
                    return True
        return False

    # The value of an expression -------------------------------------------------

    def evaluated(self, first: Item, depth: int, node: ast.expr) -> Any:
        """Return what an argument was in the call that `first` was made in."""
        spot, place = first.spots[depth], place_of(node)
        if isinstance(node, ast.Name):
            return self.held(first, depth, node.id, place)
        if isinstance(node, ast.Constant | ast.Lambda | DISPLAYS):
            raise Unclear("what is handed over there is not one array")
        spelled = ast.unparse(node)
        if depth == 0 and self.is_origin(spot) and spelled in self.inputs:
            # `params["w"]` is the input of that name, if params is still what it was.
            root = next(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            if not spot.source.function(place).binding(root):
                return self._input(spelled)
        found = list(self._made_in(first, depth, place))
        if not found:
            raise Unclear("what is handed over there is not made by an operation")
        binding = Binding("", STATEMENT, place, Assigned(place, None, 1, place))
        return self._given(binding, spot, depth, found)

    def _made_in(self, first: Item, depth: int, place: Position) -> Iterator[Item]:
        """Yield the equations of an argument, made before those of the call."""
        found, call = list[Item](), first.spots[depth].position
        for item in reversed(self.before(first, depth)):
            position = item.spots[depth].position
            # These are of an earlier round of the call, or of the statement before.
            if position == call or not is_within(position, call):
                break
            if is_within(position, place):
                found.append(item)
        yield from reversed(found)

    def held(self, first: Item, depth: int, name: str, at: Position) -> Any:
        """Return what a variable of the caller held at a place."""
        spot = first.spots[depth]
        function = spot.source.function(at)
        every = function.binding(name)
        before = list(self._completed(first, depth, every, at))
        run, last = last_assigning(before, depth, name)
        made = {id(b) for item in before for b in assigning(item, depth, name)}
        quiet = [b for b in every if id(b) not in made and b.quietly != "keeps"]
        if last is None:
            # What no equation tells may have been given to it, before or a round ago.
            around = [b for b in quiet if b.place[:2] < at[:2] or b.loops]
            if around or name not in function.parameters:
                raise Unclear(f"{name}, which is handed over, is made by no operation")
            start = self._start(first, depth)
            return self.value(start, depth, function, name)
        if last.assigned is None or any(b.may_follow(last, at) for b in quiet):
            raise Unclear(f"which value of {name} is handed over is not clear")
        return self._given(last, spot, depth, run)

    def _given(
        self, binding: Binding, spot: Spot, depth: int, items: Sequence[Item]
    ) -> Any:
        """Return what the last of the executions of a statement assigned."""
        assert binding.assigned is not None
        runs = _executions(items, depth, binding.assigned.value)
        execution = Execution(-1, binding, spot, depth, runs[-1])
        index, result = Assignment(execution, self.users).place()
        return self._jaxpr.eqns[index].outvars[result]

    def before(self, first: Item, depth: int) -> list[Item]:
        """Return the equations made earlier in the same function of the caller."""
        earlier = (item for item in self._items if item.index < first.index)
        return [item for item in earlier if is_same_call(item, first, depth)]

    def _completed(
        self, first: Item, depth: int, every: Sequence[Binding], at: Position
    ) -> Sequence[Item]:
        """Return the equations before a call, without those of its own statement."""
        before = self.before(first, depth)
        own = next((b for b in every if is_within(at, b.place)), None)
        if own is None:
            return before
        # `h = f(g(h))`: what g made is of the statement, and is no h yet.
        start = len(before)
        while start and is_within(before[start - 1].spots[depth].position, own.place):
            start -= 1
        value = own.assigned.value if own.assigned else own.place
        # The call is a part of the last execution; those before it have ended.
        *_, current = _executions([*before[start:], first], depth, value)
        return before[: len(before) + 1 - len(current)]

    def _start(self, first: Item, depth: int) -> Item:
        """Return the first equation of the call that the caller itself is."""
        body = first.spots[depth].source.function(first.spots[depth].position).body
        *_, current = _executions([*self.before(first, depth), first], depth, body)
        return current[0]


def positional_of(function: Function) -> list[str]:
    """Return the parameters that take arguments by position, but for the object."""
    a = function.node.args
    return [arg.arg for arg in (*a.posonlyargs, *a.args)][int(function.bound) :]


def _required(function: Function) -> list[str]:
    """Return the parameters by position that have no default."""
    positional, defaults = positional_of(function), len(function.node.args.defaults)
    return positional[: len(positional) - defaults] if defaults else positional


def _hands_on(call: ast.Call, function: Function) -> bool:
    """Tell whether a call hands on the arguments of its own function as they are."""
    if not any(isinstance(x, ast.Starred) for x in call.args):
        return False
    a = function.node.args
    own = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    own += [f"*{a.vararg.arg}"] if a.vararg else []
    rest = {k.arg or f"**{ast.unparse(k.value)}" for k in call.keywords}
    same = rest <= {f"**{a.kwarg.arg}" if a.kwarg else None}
    return same and [ast.unparse(x) for x in call.args] == own


def _executions(items: Sequence[Item], depth: int, value: Position) -> list[list[Item]]:
    """Cut equations of a statement, or a function, into its executions."""
    runs = [[items[0]]]
    for k, item in enumerate(items[1:], 1):
        rest = (i.eqn for i in items[k:])
        again = begins_again(runs[-1], item, depth, value, rest)
        if again is Again.UNKNOWN:
            raise Unclear("it cannot be told where one execution of it ends")
        if again is Again.YES:
            runs.append([])
        runs[-1].append(item)
    return runs
