"""What the functions of a file bind, in the order of the text.

A statement may be executed and leave no equation (`y = z`). What it can then have made
of a variable is told here, by the text alone.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Position = tuple[int, int, int, int]  # line, column, end line, end column (in bytes)

STATEMENT = "="  # an assignment: `=`, `+=` or `:=`


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The expression whose value a variable is given.

    Attributes:
      value: its place; of `x += y` that of the whole statement.
      index: for `a, b = f(x)` the position of the variable in it, else None; behind a
        star, counted from the end.
      count: how many variables share the value; where there is a star, at least.
      target: the place of the target with all of them.
      star: whether one of the targets takes the rest.
      below: for `(a, b), c = f(x)` the (index, count) in the part, and so on.
    """

    value: Position
    index: int | None
    count: int
    target: Position
    star: bool = False
    below: tuple[tuple[int, int], ...] = ()

    def position(self, count: int) -> int | None:
        """Return the index among `count` values; None if so many do not fit."""
        fits = count >= self.count if self.star else count == self.count
        return self.index % count if fits and self.index is not None else None

    def inside(self, value: Position) -> Assigned:
        """Return what is left to take once the part at `value` is reached."""
        if not self.below:
            return Assigned(value, None, 1, value)
        (index, count), *rest = self.below
        return Assigned(value, index, count, value, below=tuple(rest))


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One place of the text that gives a variable a value.

    Attributes:
      name: the variable, as it is spelled.
      how: STATEMENT, "for", "with", "import", "def", "case", "except", or "in" for the
        variable of a comprehension.
      place: the statement or its head; the `:=` with its value.
      assigned: what a statement gives it; None for the rest that a star takes.
      quietly: what an execution without equations makes of the variable: it "keeps"
        its array, is "none", or may be "another" array.
      arms: for each branching statement around it, the arm that it is in.
      loops: the loops around it.
    """

    name: str
    how: str
    place: Position
    assigned: Assigned | None = None
    quietly: str = "another"
    arms: Mapping[Position, int] = dataclasses.field(default_factory=dict)
    loops: frozenset[Position] = frozenset()

    @property
    def lines(self) -> set[int]:
        """The lines of the statement."""
        return {*range(self.place[0], self.place[2] + 1)}

    def excludes(self, other: Binding) -> bool:
        """Tell whether only one of the two can be executed in one call."""
        apart = any(other.arms.get(k, arm) != arm for k, arm in self.arms.items())
        # In a loop, one round may take the one arm, and the next the other.
        return apart and not (self.loops | other.loops)

    def may_follow(self, other: Binding, at: Position) -> bool:
        """Tell whether it can be the last of the two to run before a place."""
        if self.excludes(other):
            return False
        starts = self.place[:2], other.place[:2], at[:2]
        # No loop leads from one of the places back to another: the text has the order.
        if not any(p in other.loops or is_within(at, p) for p in self.loops):
            return starts[1] < starts[0] < starts[2]
        # In a round of the loop it is the last, unless the other one always follows.
        always = other.loops <= self.loops and other.arms.items() <= self.arms.items()
        return not (always and starts[0] < starts[1] < starts[2])


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function or lambda of the text, or the whole file.

    Attributes:
      node: its syntax tree.
      body: the place of what runs when it is called.
      path: the names of the functions and classes around it, and its own.
      bound: whether its first parameter is the object or the class it belongs to.
      bindings: what it binds, without functions inside it, in the text's order.
    """

    node: Any
    body: Position
    path: tuple[str, ...]
    bound: bool
    bindings: Sequence[Binding]

    @property
    def line(self) -> int:
        """The line of its `def` or `lambda`."""
        return getattr(self.node, "lineno", 1)

    @property
    def first_line(self) -> int:
        """The line of its first decorator, as code objects have it."""
        decorators = getattr(self.node, "decorator_list", ())
        return min([self.line, *(d.lineno for d in decorators)])

    @property
    def parameters(self) -> dict[str, Position]:
        """Every parameter and its place, in order."""
        a = getattr(self.node, "args", None)
        if a is None:
            return {}
        every = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        return {arg.arg: place_of(arg) for arg in every if arg is not None}

    def statements(self, name: str) -> list[Binding]:
        """Return the statements that assign a variable, in the text's order."""
        return [b for b in self.binding(name) if b.how == STATEMENT]

    def binding(self, name: str) -> list[Binding]:
        """Return all that binds a variable of the function but its parameters."""
        return [b for b in self.bindings if b.name == name and b.how != "in"]


def functions_of(tree: ast.AST) -> list[Function]:
    """Return a file as a function, and all functions in it."""
    return list(_functions(tree, (), False))


def _functions(node: Any, path: tuple[str, ...], method: bool) -> Iterator[Function]:
    """Yield the functions in a node; `method`: a class is what it stands in.

    The body begins behind the signature, whose defaults run in the function around it.
    """
    if isinstance(node, ast.Module):
        every = (0, 0, 1 << 31, 0)
        yield Function(node, every, ("<module>",), False, _ordered(node.body))
    elif isinstance(node, ast.Lambda):
        path = (*path, "<lambda>")
        yield Function(node, place_of(node.body), path, False, _ordered([node.body]))
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        path = (*path, node.name)
        (line, col, *_), (*_, end, end_col) = map(_whole, (node.body[0], node.body[-1]))
        decorators = [getattr(d, "id", "") for d in node.decorator_list]
        bound = method and "staticmethod" not in decorators
        body = (line, col, end, end_col)
        yield Function(node, body, path, bound, _ordered(node.body))
    elif isinstance(node, ast.ClassDef):
        path = (*path, node.name)
    for child in ast.iter_child_nodes(node):
        yield from _functions(child, path, isinstance(node, ast.ClassDef))


def _ordered(body: Iterable[ast.AST]) -> list[Binding]:
    return sorted(_bindings(body, {}, frozenset()), key=lambda b: b.place[:2])


def _bindings(
    nodes: Iterable[Any], arms: Mapping[Position, int], loops: frozenset[Position]
) -> Iterator[Binding]:
    """Yield what nodes bind in their own scope; of a scope inside, its name alone.

    Each is told which arms and loops it is in, as no node knows the nodes around it.
    """
    for node in nodes:
        state = {"arms": arms, "loops": loops}
        if isinstance(node, _SCOPES):
            if not isinstance(node, ast.Lambda):
                yield Binding(node.name, "def", head_of(node), **state)
            continue
        for name, how, assigned, quietly in _bound(node):
            place = head_of(node) if hasattr(node, "lineno") else place_of(node.target)
            yield Binding(name, how, place, assigned, quietly, **state)
        for children, arm, is_loop in _parts(node):
            inner = arms if arm is None else {**arms, place_of(node): arm}
            around = loops | {place_of(node)} if is_loop else loops
            yield from _bindings(children, inner, around)


def _bound(node: Any) -> Iterator[tuple[str, str, Assigned | None, str]]:
    """Yield (name, how, what it is given, quietly) for what one node itself binds."""
    if isinstance(node, ast.AugAssign):
        own = place_of(node.target)
        for name in names_of(node.target):
            yield name, STATEMENT, Assigned(place_of(node), None, 1, own), "keeps"
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value is None:  # an annotation alone
            return
        for target in targets:
            for name in names_of(target):
                value, assigned = _given(target, node.value, name)
                yield name, STATEMENT, assigned, _quietly(name, value)
    elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
        how = "in" if isinstance(node, ast.comprehension) else "for"
        yield from ((name, how, None, "another") for name in names_of(node.target))
    elif isinstance(node, ast.With | ast.AsyncWith):
        for item in node.items:
            for name in names_of(item.optional_vars):
                yield name, "with", None, "another"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield (alias.asname or alias.name).split(".")[0], "import", None, "another"
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name, "except", None, "another"
    elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name, "case", None, "another"


def _parts(node: Any) -> Iterator[tuple[Sequence[Any], int | None, bool]]:
    """Yield a node's children in groups: (nodes, which arm they are, in its loop)."""
    if isinstance(node, ast.If | ast.IfExp):
        both = node.body, node.orelse
        lists = [part if isinstance(part, list) else [part] for part in both]
        yield [node.test], None, False
        yield from ((part, arm, False) for arm, part in enumerate(lists))
    elif isinstance(node, ast.Match):
        yield [node.subject], None, False
        yield from (([case], arm, False) for arm, case in enumerate(node.cases))
    elif isinstance(node, ast.For | ast.AsyncFor):
        yield [node.iter], None, False
        yield node.body, None, True
        yield node.orelse, None, False
    elif isinstance(node, ast.While):
        # The test runs in each round, too: `while (h := f(h)).any():`.
        yield [node.test, *node.body], None, True
        yield node.orelse, None, False
    else:
        yield list(ast.iter_child_nodes(node)), None, isinstance(node, _COMPREHENSIONS)


def _quietly(name: str, value: ast.expr) -> str:
    """Tell what a variable is after an assignment that made no equation."""
    if isinstance(value, ast.IfExp):
        both = {_quietly(name, value.body), _quietly(name, value.orelse)}
        # Either may have been taken: the one that tells less.
        return max(both, key=["none", "keeps", "another"].index)
    if isinstance(value, ast.BinOp | ast.UnaryOp):  # of arrays, it makes an equation
        inner = [n for n in ast.walk(value) if isinstance(n, ast.expr)]
        return "keeps" if any(_spells(n, name) for n in inner) else "none"
    if isinstance(value, ast.Call):  # `h = dropout(h)`, `h = h.astype(dtype)`
        first = value.args[0] if value.args else None
        own = value.func.value if isinstance(value.func, ast.Attribute) else None
        return "keeps" if _spells(first, name) or _spells(own, name) else "another"
    if _spells(value, name):
        return "keeps"
    return "none" if isinstance(value, _NO_ARRAYS) else "another"


def _spells(node: ast.AST | None, name: str) -> bool:
    variable = isinstance(node, ast.Name | ast.Attribute)
    return variable and ast.unparse(node) == name


def names_of(target: ast.expr | None) -> Iterator[str]:
    """Yield the variables in a target of an assignment."""
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from names_of(part)
    elif isinstance(target, ast.Starred):
        yield from names_of(target.value)
    elif isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute):
        yield ast.unparse(target)


def _given(
    target: ast.expr, value: ast.expr, name: str
) -> tuple[ast.expr, Assigned | None]:
    """Return the expression that a variable is given or is a part of, and how."""
    own = place_of(target)
    if not isinstance(target, ast.Tuple | ast.List):
        return value, Assigned(place_of(value), None, 1, own)
    indices = _indices(target, name)
    if not indices:
        return value, None
    (index, count, star), *below = indices
    assigned = Assigned(
        place_of(value), index, count, own, star, tuple(b[:2] for b in below)
    )
    written = value.elts if isinstance(value, ast.Tuple | ast.List) else ()
    at = assigned.position(len(written))
    # `a, b = f(x), g(x)`: each has an expression of its own.
    if at is not None and not any(isinstance(x, ast.Starred) for x in written):
        part = next(t for t in target.elts if name in names_of(t))
        return _given(part, written[at], name)
    return value, None if any(star for _, _, star in below) else assigned


def _indices(target: ast.Tuple | ast.List, name: str) -> list[tuple[int, int, bool]]:
    """Return (index, count, whether there is a star) of a variable, level by level."""
    stars = [k for k, part in enumerate(target.elts) if isinstance(part, ast.Starred)]
    for k, part in enumerate(target.elts):
        if name in names_of(part) and k not in stars:
            behind = bool(stars) and k > stars[0]
            index = k - len(target.elts) if behind else k
            own = (index, len(target.elts) - len(stars), bool(stars))
            if not isinstance(part, ast.Tuple | ast.List):
                return [own]
            below = _indices(part, name)
            return [own, *below] if below else []
    return []


_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
_COMPREHENSIONS = ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp
DISPLAYS = ast.Tuple | ast.List | ast.Dict | ast.Set | _COMPREHENSIONS
_NO_ARRAYS = DISPLAYS | ast.Constant | ast.Lambda | ast.JoinedStr | ast.Compare


def place_of(node: Any) -> Position:
    """Return the place of a node of the syntax tree."""
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _whole(node: Any) -> Position:
    """Place of a statement with its decorators."""
    line, col, end_line, end_col = place_of(node)
    for decorator in getattr(node, "decorator_list", ())[:1]:
        line, col = place_of(decorator)[:2]
    return line, col, end_line, end_col


def head_of(node: Any) -> Position:
    """Return the place of a statement; of a compound one, of its head only."""
    line, col, end_line, end_col = place_of(node)
    body = getattr(node, "body", None)
    if isinstance(body, list) and body:
        end_line, end_col = min(map(_whole, body))[:2]
    return line, col, end_line, end_col


def is_within(inner: Position, outer: Position) -> bool:
    """Tell whether one place lies in the other."""
    return outer[:2] <= inner[:2] and inner[2:] <= outer[2:]


def root_of(chain: ast.expr) -> ast.Name | None:
    """Return the variable that `v`, `v.a`, `v["a"]` or `v[0].a` is read from."""
    while isinstance(chain, ast.Attribute | ast.Subscript):
        # Which part `v[i]` is, the text does not say.
        if isinstance(chain, ast.Subscript) and not isinstance(chain.slice, _WRITTEN):
            return None
        chain = chain.value
    return chain if isinstance(chain, ast.Name) else None


def chains_of(node: ast.AST) -> Iterator[ast.expr]:
    """Yield each variable that is read, with all of `.a` and `["a"]` behind it."""
    if isinstance(node, ast.expr) and root_of(node) is not None:
        yield node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        for child in (node.func.value, *node.args, *node.keywords):
            yield from chains_of(child)  # `v.a.mean()` reads `v.a`
    else:
        for child in ast.iter_child_nodes(node):
            yield from chains_of(child)


_WRITTEN = ast.Constant | ast.UnaryOp  # `-1`
