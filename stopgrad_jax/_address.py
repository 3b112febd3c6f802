"""Addresses: one selector language for arguments, outputs and named points.

An address is an int, a string or one of the small values made here. This file
parses them, matches them against printed paths and finds the nearest ones that
exist. What a path *means* in a traced function is `_program/lookup.py`; what it means
in a bare pytree is `_where.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from ._errors import AddressError, wrong

RETURN = "return"


class _Ordered:
    """Keys of a dict have to be ordered for JAX: these come after strings."""

    def __lt__(self, other: Any) -> bool:
        return repr(self) < repr(other)

    def __gt__(self, other: Any) -> bool:
        return repr(self) > repr(other)


@dataclasses.dataclass(frozen=True)
class Point(_Ordered):
    """The named values `name`, even where an argument has the same name."""

    name: str

    def __repr__(self) -> str:
        return f'sg.point("{self.name}")'


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice that can be a key of a dict, as those of Python are from 3.12."""

    start: int | None
    stop: int | None
    step: int | None

    def __repr__(self) -> str:
        parts = [self.start, self.stop, self.step]
        return f"slice({', '.join(map(repr, parts if self.step else parts[:2]))})"


@dataclasses.dataclass(frozen=True)
class Op(_Ordered):
    """Each outermost call of a function, or equation of a primitive."""

    name: str | tuple[str, ...]
    within: str | None = None
    nth: int | Slice | None = None

    def __repr__(self) -> str:
        within = f', within="{self.within}"' if self.within else ""
        nth = f", nth={self.nth!r}" if self.nth is not None else ""
        name = ", ".join(f'"{name}"' for name in self.names)
        if not isinstance(self.name, str):
            name = f"({name},)" if len(self.name) == 1 else f"({name})"
        return f"sg.op({name}{within}{nth})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that match."""
        return (self.name,) if isinstance(self.name, str) else self.name

    def chosen(self, count: int) -> Sequence[int]:
        """Return which of so many matches are meant; IndexError if there is none."""
        if isinstance(self.nth, Slice):
            return range(count)[slice(self.nth.start, self.nth.stop, self.nth.step)]
        return range(count) if self.nth is None else [range(count)[self.nth]]


@dataclasses.dataclass(frozen=True)
class Var(_Ordered):
    """What a statement of the source assigns to a variable."""

    label: str
    line: int | None = None
    nth: int | None = None

    def __repr__(self) -> str:
        line = f", line={self.line}" if self.line is not None else ""
        nth = f", nth={self.nth}" if self.nth is not None else ""
        return f'sg.var("{self.label}"{line}{nth})'


Address = int | str | Point | Op | Var


def is_address(x: Any) -> bool:
    """Tell an address from a container of addresses."""
    return isinstance(x, Address) and not isinstance(x, bool)


def point(name: str) -> Point:
    """Address the named point `name`, where an argument has the same name.

    A name with wildcards yields a dict {name: value}, as in other addresses.

    Example:
        >>> import stopgrad_jax as sg
        >>> sg.gradients(lambda h: 3.0 * sg.name(h**2, "h"), sg.point("h"))(2.0)
        Array(3., dtype=float32, weak_type=True)
    """
    return Point(name)


def op(
    name: str | tuple[str, ...],
    within: str | None = None,
    *,
    nth: int | slice | None = None,
) -> Op:
    """Address every outermost call of the function or primitive called `name`.

    A primitive (`"sin"`), a jitted function (`"silu"`), one with a custom rule
    (`"relu"`) and every other Python function that makes operations (`"softmax"`,
    `"Dense"` for the calls of a module) count; what lies inside a match is not matched
    again. It is handed to an edit as one function of the arrays that it reads, in the
    order in which it reads them.

    Args:
      name: what `jax.make_jaxpr` prints or what the source calls it, one or several: a
        name of `jax.numpy`, `jax.nn` or `jax.lax` is also what that function becomes
        (`"sigmoid"` is each `logistic`). A primitive's own name means it alone.
      within: only in the function or `jax.named_scope` of this name; a path of scopes,
        with wildcards as in other addresses: `"Block_*"`, `"Net/**/Dense_0"`.
      nth: of the matches, in the order of JAX's program, one by its index or several by
        a slice. A match in a loop of JAX is one; `lax.cond` has the false branch first.

    Returns:
      An address. It raises `AddressError` where nothing matches, or `nth` none of it.

    Raises:
      TypeError: `name` or `within` is no string, or `nth` neither an index nor a slice.

    Example:
        >>> import jax, stopgrad_jax as sg
        >>> f = lambda x: jax.nn.relu(x) + jax.nn.relu(-x)
        >>> sg.edit(f, {sg.op("relu"): lambda relu, x: relu(2.0 * x)})(3.0)
        Array(6., dtype=float32, weak_type=True)
        >>> sg.edit(f, {sg.op("relu", nth=0): lambda relu, x: x})(-3.0)
        Array(0., dtype=float32, weak_type=True)
    """
    names = name if isinstance(name, tuple) else (name,)
    if not names or not all(isinstance(n, str) and n for n in names):
        raise _wrong("op", "a name or a tuple of names", name, 'sg.op("relu")')
    if within is not None and not (isinstance(within, str) and within):
        write = 'sg.op("relu", within="encoder")'
        raise _wrong("op", "within is the name of a scope or function", within, write)
    if isinstance(nth, slice):
        parts = (nth.start, nth.stop, nth.step)
        is_index = all(p is None or _is_index(p) for p in parts) and nth.step != 0
        return Op(name, within, Slice(*parts) if is_index else _refused(nth))
    return Op(name, within, nth if nth is None or _is_index(nth) else _refused(nth))


def var(label: str, line: int | None = None, nth: int | None = None) -> Var:
    """Address what a statement of the source assigns to a variable.

    For code that you may not edit: no name is needed in it. The value is found by the
    source text, so there has to be one: a file or a notebook cell, unchanged since its
    import. A statement that is executed several times yields a tuple, as a name does.
    The function is traced once more and watched: the text must tell what was seen.
    Where no statement assigns the variable, it may be a parameter of a function: then
    it is the value handed in.

    Forward: as for `name`, the value is only looked at.
    Backward: as for `name`; of a parameter, that of the uses in its function.

    Args:
      label: the variable, `"feat"` or `"self.feat"`, as an assignment spells it; where
        several functions have one, qualified by function: `"Net.__call__.feat"`.
      line: the line of the statement, where several assign the variable; that of the
        `def` for a parameter that is assigned to later.
      nth: which of the statements of its function that assign the variable, in the
        order of the text: 0 is the first and -1 the last. Each `=`, `+=` and `:=`
        counts once, run or not, however often it is executed.

    Returns:
      An address. It raises `AddressError` where it cannot tell which array the
      variable held: `feat = x` computes nothing, and a dict is not one array.

    Raises:
      TypeError: `label` is no string, or `line` or `nth` no integer.

    Example:
        >>> import jax.numpy as jnp, stopgrad_jax as sg
        >>> def model(x):
        ...     feat = jnp.sin(x) * 2.0
        ...     feat = feat + 1.0
        ...     return jnp.sum(feat**2)
        >>> print(sg.gradients(model, sg.var("feat", nth=0))(jnp.zeros(2)))
        [2. 2.]
        >>> print(sg.capture(model, sg.var("model.feat", nth=-1))(jnp.zeros(2))[1])
        {sg.var("model.feat", nth=-1): Array([1., 1.], dtype=float32)}
    """
    if not isinstance(label, str) or not label:
        raise _wrong("var", "the name of a variable", label, 'sg.var("feat")')
    for what, value in (("line", line), ("nth", nth)):
        if value is not None and not _is_index(value):
            write = f'sg.var("{label}", {what}=1)'
            raise _wrong("var", f"{what} is an integer", value, write)
    return Var(label, line, nth)


def _is_index(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _wrong(called: str, expected: str, came: Any, instead: str) -> TypeError:
    kind = type(came).__name__
    return wrong(TypeError, f"sg.{called}", expected, f"{came!r:.60} ({kind})", instead)


def _refused(nth: Any) -> Any:
    expected = "nth is an index or a slice of the matches"
    raise _wrong("op", expected, nth, 'sg.op("relu", nth=0) or nth=slice(0, 2)')


def matches_scope(text: str, scope: str) -> bool:
    """Tell whether a pattern is a part, level by level, of a path of scopes."""
    return bool(re.search("(?:^|/)" + pattern(text).pattern, scope + "/"))


def pattern(text: str) -> re.Pattern[str]:
    """Compile a path with wildcards: `*` inside one level, `**` any depth."""
    out = []
    for segment in text.split("/"):
        if segment == "**":
            # Each level is matched with its "/", and a path has one at its end then: so
            # this may be no level at all.
            out.append("(?:[^/]+/)*")
        else:
            parts = [re.escape(part) for part in segment.split("*")]
            out.append("[^/]*".join(parts) + "/")
    return re.compile("".join(out))


def has_wildcard(text: str) -> bool:
    """Tell a pattern from a plain path."""
    return "*" in text


def matching(text: str, paths: Iterable[str]) -> list[str]:
    """Paths that `text` matches, outermost first: none lies below another one.

    `paths` is in depth-first order and holds the inner nodes too. A path without
    wildcards may match several where keys hold "/": then it means none of them.
    """
    paths = paths if isinstance(paths, dict) else dict.fromkeys(paths)
    if text in paths:
        return [text]
    if not has_wildcard(text):
        return [path for path in paths if plain(path) == text]
    regex, found = pattern(text), list[str]()
    for path in paths:
        # Depth first: what lies below a match follows it at once.
        below = found and path.startswith(found[-1] + "/")
        if not below and regex.fullmatch(plain(path) + "/"):
            found.append(path)
    return found


def require_one_meaning(text: str, matched: list[str], called: str) -> None:
    """Refuse a path that spells two places, as "a/b" does where a key holds "/"."""
    if matched[1:] and not has_wildcard(text):
        raise wrong(
            AddressError,
            called,
            "a path means one place",
            f'"{text}", which means {len(matched)}: a key of the tree holds "/"',
            " or ".join(f'"{path}"' for path in matched),
        )


def prefixes(path: str) -> Iterator[str]:
    """Yield `a`, `a/b`, `a/b/c` for `a/b/c`; a quoted key is one level."""
    # Of the same length, as the slashes are looked for by their places.
    bare = _QUOTED.sub(lambda found: "_" * len(found[0]), path)
    for end in re.finditer(r"/|\Z", bare):
        yield path[: end.start()]


def nearest(
    text: str, known: Iterable[str], most: int = 3, cutoff: float = 0.4
) -> list[str]:
    """Return the known addresses closest in spelling, the best first."""
    candidates = list(dict.fromkeys(p for path in known for p in prefixes(path)))
    return difflib.get_close_matches(text, candidates, n=most, cutoff=cutoff)


def printed(path: Any) -> str:
    """Print a key path the one way addresses spell it; an empty key as `['']`."""
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    if all(text.split("/")):
        return text
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(key or "['']" for key in keys)


def exact(path: Any) -> str:
    """Print a key path so that it means one place: `['a/b']`, and `['a']/['b']`."""
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(f"[{key!r}]" for key in keys)


_QUOTED = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]""")


def plain(path: str) -> str:
    """Print a path as `keystr` does, whatever its keys hold."""
    if "[" not in path:
        return path
    return _QUOTED.sub(lambda found: ast.literal_eval(found[1]), path)


def joined(*parts: str) -> str:
    """Join printed paths, skipping empty ones."""
    return "/".join(part for part in parts if part)


def nodes(tree: Any, root: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (printed path, subtree) for a tree and everything below it.

    None is a node without leaves here, as in JAX. Where two places would be printed
    alike, since a key holds "/", they are told apart as `exact` does.
    """
    every = [(root, root, tree), *_below(tree, root, root)]
    first: dict[str, str] = {}
    twice = {path for path, full, _ in every if first.setdefault(path, full) != full}
    for path, full, node in every:
        yield full if path in twice else path, node


def _below(tree: Any, root: str, full: str) -> Iterator[tuple[str, str, Any]]:
    for path, child in jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )[0]:
        # A leaf is flattened to itself, at the empty path.
        if path:
            names = joined(root, printed(path)), joined(full, exact(path))
            yield (*names, child)
            yield from _below(child, *names)


def leaf_paths(tree: Any) -> list[str]:
    """Return the path of each leaf, no two alike; "" where the tree is one leaf."""
    return [above[-1] if above else "" for above in paths_of(tree)]


def paths_of(tree: Any) -> list[list[str]]:
    """For each leaf: the paths of all that it lies in, its own last; see `nodes`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    known: dict[Any, tuple[str, str]] = {(): ("", "")}
    # Each node is printed once, however many leaves are below it.
    for path, _ in flat:
        for k in range(1, len(path) + 1):
            if path[:k] not in known:
                above, key = known[path[: k - 1]], path[k - 1 : k]
                pair = joined(above[0], printed(key)), joined(above[1], exact(key))
                known[path[:k]] = pair
    first: dict[str, str] = {}
    pairs = known.values()
    twice = {path for path, full in pairs if first.setdefault(path, full) != full}
    named = {
        key: full if path in twice else path for key, (path, full) in known.items()
    }
    return [[named[path[:k]] for k in range(1, len(path) + 1)] for path, _ in flat]
