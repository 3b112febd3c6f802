"""By which other ways a function may reach the array that a parameter is.

In the program, `attn(q=h, k=h)` reads one variable. Which of the reads are those of `q`
is told by the text: an expression may also read another argument, the object, or what
the function closes over. Each of these is followed back to what it was given.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from .assignment import Unclear
from .bindings import DISPLAYS, Function, Position, chains_of, place_of, root_of
from .executions import Item
from .handed import Handed, positional_of
from .texts import is_name, is_root, is_stored, node_at, operands


class Routes:
    """The ways by which one call of a function may reach a variable of the jaxpr.

    `run` are the equations of the call, `depth` is the function's place in their spots.
    """

    def __init__(
        self,
        handed: Handed,
        run: Sequence[Item],
        depth: int,
        function: Function,
        var: Any,
    ) -> None:
        self._handed, self._run, self._depth = handed, run, depth
        self._function, self._var = function, var
        self._seen: set[tuple[int, str]] = set()

    def refuse(self, name: str) -> None:
        """Raise where it is not told that a parameter is what is read."""
        reading = [i for i in self._run if self._reads(i)]
        at: dict[Position, list[Item]] = {}
        for item in reading:
            if item.spots[self._depth].is_current:
                at.setdefault(item.spots[self._depth].position, []).append(item)
        for position, items in at.items():
            node = node_at(self._function.node, position)
            if node is None or self._is_one(node, items, name):
                continue
            for chain in _chains(node):
                self._seen = set()
                if self._is_held(self._depth, chain, name):
                    raise Unclear(
                        f"the same array reaches {self._function.path[-1]} by "
                        f"{ast.unparse(chain)} too"
                    )

    def _reads(self, item: Item) -> int:
        return sum(atom is self._var for atom in item.eqn.invars)

    def _is_one(self, node: Any, items: Sequence[Item], name: str) -> bool:
        """Tell whether all that an operation reads of the array is the parameter.

        It is one of its operands: with one read, no other operand is that array.
        """
        direct = all(len(i.spots) == self._depth + 1 for i in items)
        if not direct or not any(is_name(x, name) for x in operands(node)):
            return False
        if isinstance(node, ast.Call):
            return sum(map(self._reads, items)) == 1
        return all(self._reads(i) == 1 for i in items)

    # What a variable may hold ---------------------------------------------------

    def _is_held(self, depth: int, chain: ast.expr, name: str = "") -> bool:
        """Tell whether a variable may be or hold the array when the call begins.

        Of the function itself, the parameter `name` is no other way.
        """
        root = root_of(chain)
        if root is None:
            return False
        if depth < self._depth:
            try:
                return self._evaluated(depth, chain) is self._var
            except Unclear:
                pass
        # `a = b` and `b = a` would lead to each other for ever.
        if (depth, root.id) in self._seen:
            return False
        self._seen.add((depth, root.id))
        function = self._function_at(depth)
        given = [*_given(function.node, root.id), *_put(function.node, root.id)]
        if any(self._carries(depth, node, name) for node in given):
            return True
        if root.id in function.parameters:
            return root.id != name and self._is_argument(depth, function, chain)
        return not function.binding(root.id) and self._is_outside(depth, root)

    def _evaluated(self, depth: int, chain: ast.expr) -> Any:
        first = self._run[0]
        if isinstance(chain, ast.Name):
            at = first.spots[depth].position
            return self._handed.held(first, depth, chain.id, at)
        return self._handed.evaluated(first, depth, chain)

    def _function_at(self, depth: int) -> Function:
        spot = self._run[0].spots[depth]
        return spot.source.function(spot.position)

    def _is_argument(self, depth: int, function: Function, chain: ast.expr) -> bool:
        """Tell it of another parameter, by what was handed over for it."""
        root, first = root_of(chain), self._run[0]
        assert root is not None
        if depth == 0 and self._handed.is_origin(first.spots[0]):
            inputs, spelled = self._handed.inputs, ast.unparse(chain)
            below = (f"{spelled}[", f"{spelled}.")
            found = [
                k for p, k in inputs.items() if p == spelled or p.startswith(below)
            ]
            return any(self._handed.is_input(k, self._var) for k in found)
        if depth == self._depth:
            try:
                value = self._handed.value(first, depth, function, root.id)
                return value is self._var
            except Unclear:
                pass
        outer = self._handed.caller_of(first, depth)
        if outer < 0 or not first.spots[outer].is_current:
            return False
        call = first.spots[outer].source.call_at(first.spots[outer].position)
        nodes = _arguments(call, function, root.id) if call else []
        return any(self._carries(outer, node) for node in nodes)

    def _is_outside(self, depth: int, root: ast.Name) -> bool:
        """Tell it of a variable of a function around it, or of the module."""
        spots = self._run[0].spots
        within = spots[depth].function
        for outer in reversed(range(depth)):
            spot = spots[outer]
            if not spot.is_current:
                continue
            # The qualified name of a function begins with that of the one around it.
            if within.startswith(f"{spot.function}.<locals>."):
                function = self._function_at(outer)
                if root.id in function.parameters or function.binding(root.id):
                    return self._is_held(outer, root)
        # `cache["h"] = h`, in any of the callers, may put it where this one finds it.
        for outer in range(depth):
            if spots[outer].is_current:
                put = _put(self._function_at(outer).node, root.id)
                if any(self._carries(outer, node) for node in put):
                    return True
        return self._is_kept(depth, root.id)

    def _is_kept(self, depth: int, name: str) -> bool:
        """Tell whether a function that was made elsewhere may close over the array."""
        first = self._run[0]
        code = first.spots[depth].frame.code
        outer = self._handed.caller_of(first, depth)
        if outer < 0 or not code or name not in code.co_freevars:
            return False
        spot = first.spots[outer]
        call = spot.source.call_at(spot.position) if spot.is_current else None
        return call is not None and self._carries(outer, call.func)

    def _carries(self, depth: int, node: Any, name: str = "") -> bool:
        """Tell whether the value of an expression may be or hold the array."""
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.Compare | ast.UnaryOp):
            return False
        if isinstance(node, ast.BinOp):  # of arrays a new one, of lists another list
            sides = [x for x in (node.left, node.right) if isinstance(x, DISPLAYS)]
            return any(self._carries(depth, x, name) for x in sides)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            # A function holds what it reads and does not bind itself.
            body = node.body if isinstance(node.body, list) else [node.body]
            own = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
            names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
            own |= {n.id for n in names if is_stored(n)}
            chains = [c for x in body for c in _chains(x)]
            free = [c for c in chains if (r := root_of(c)) and r.id not in own]
            return any(self._is_held(depth, c, name) for c in free)
        if isinstance(node, ast.expr) and root_of(node) is not None:
            return not _is_shape(node) and self._is_held(depth, node, name)
        if isinstance(node, ast.Call) and (
            _is_plain(node) or self._is_made(depth, node)
        ):
            return False
        parts = ast.iter_child_nodes(node)
        return any(self._carries(depth, x, name) for x in parts)

    def _is_made(self, depth: int, node: ast.Call) -> bool:
        """Tell whether a call made an operation of JAX: what it returns is new."""
        inside = depth == self._depth
        items = self._run if inside else self._handed.before(self._run[0], depth)
        place = place_of(node)
        return any(
            i.spots[depth].position == place and len(i.spots) == depth + 1
            for i in items
        )


def _arguments(call: ast.Call, function: Function, name: str) -> list[Any]:
    """Return the expressions of a call that a parameter may have been given."""
    keywords = {k.arg: k.value for k in call.keywords}
    if name in keywords:
        return [keywords[name]]
    positional, given = positional_of(function), list(call.args)
    if function.bound and len(given) == len(positional) + 1:  # Net.forward(net, x)
        positional = [*function.parameters][: len(given)]
    elif function.bound and name == next(iter(function.parameters)):
        # The object is what the method was read from.
        return [call.func]
    starred = any(isinstance(x, ast.Starred) for x in given)
    if name in positional and not starred:
        at = positional.index(name)
        return given[at : at + 1]
    every = [*call.args, *keywords.values()]
    variadic = function.node.args.vararg, function.node.args.kwarg
    takes_rest = any(a is not None and a.arg == name for a in variadic)
    return every if starred or None in keywords or takes_rest else []


def _given(scope: Any, name: str) -> Iterator[Any]:
    """Yield what a function gives one of its variables, in any of its statements."""
    for node in _own(scope):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            targets, value = [node.target], node.iter
        elif isinstance(node, ast.withitem):
            targets, value = [node.optional_vars], node.context_expr
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            yield node
            continue
        else:
            continue
        stored = (n for t in targets if t is not None for n in ast.walk(t))
        if value is not None and any(is_name(n, name) and is_stored(n) for n in stored):
            yield value


def _put(scope: Any, name: str) -> Iterator[Any]:
    """Yield what is put in a variable: `d["a"] = h`, `o.h = h`, `l.append(h)`."""
    for node in _own(scope):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = (n for t in targets for n in ast.walk(t))
            parts = [n for n in inside if isinstance(n, ast.Attribute | ast.Subscript)]
            if node.value is not None and any(is_root(n, name) for n in parts):
                yield node.value
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr in _PUTS:
                if is_root(function.value, name):
                    yield from (*node.args, *(k.value for k in node.keywords))
            elif is_name(function, "setattr") and node.args[2:]:
                if is_root(node.args[0], name):
                    yield node.args[2]


_PUTS = ("append", "appendleft", "extend", "insert", "add", "update", "setdefault")
_NO_ARRAYS = ("shape", "ndim", "dtype", "size", "aval", "sharding", "itemsize")
_PLAIN = ("len", "isinstance", "type", "int", "float", "bool", "print", "range", "str")


def _own(scope: Any) -> Iterator[Any]:
    """Nodes of a function, without those of functions inside it."""
    body = scope.body if isinstance(scope.body, list) else [scope.body]
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _chains(node: Any) -> Iterator[ast.expr]:
    """Yield what an expression reads, but for shapes and the like."""
    if isinstance(node, ast.AugAssign):
        yield from (c for c in (node.target, node.value) for c in chains_of(c))
        return
    yield from (c for c in chains_of(node) if not _is_shape(c))


def _is_shape(chain: ast.expr) -> bool:
    """Tell `h.shape` and the like, which is no array."""
    return any(
        isinstance(n, ast.Attribute) and n.attr in _NO_ARRAYS for n in ast.walk(chain)
    )


def _is_plain(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _PLAIN
