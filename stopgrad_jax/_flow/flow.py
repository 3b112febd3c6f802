"""`flow`: see which input trains which part of a loss, and where gradients end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

from stopgrad_jax._address import Address, Var, is_address
from stopgrad_jax._checks import require_function
from stopgrad_jax._edge import public
from stopgrad_jax._errors import AddressError, function_name, quoted, wrong
from stopgrad_jax._page import Page, page
from stopgrad_jax._places import printed_file
from stopgrad_jax._program.lookup import addresses_in
from stopgrad_jax._program.trace import Traced, trace
from stopgrad_jax._source.labels import Labels, code_of

from .analysis import Look, require_outputs
from .drawing import Drawing
from .explain import explain
from .margin import source
from .model import Box, Edge, Picture, Site, Step
from .part import reached
from .steps import site_of
from .table import table

P = ParamSpec("P")
_TEXT, _SOURCE = ("text",), ("source",)  # pages that no address has


@dataclasses.dataclass(frozen=True)
class Input:
    """A row of the table.

    `status` and the values of `terms` are "flows", "cut", "unused" or "unknown"; the
    status of what nobody differentiates by is "data".
    """

    path: str
    type: str
    values: int
    status: str
    terms: dict[str, str]


@dataclasses.dataclass(frozen=True)
class CutSite:
    """A place at which gradients end: why, in words, where, and those of which inputs.

    `reason` is "stop_gradient", "zero_derivative", "integer", "comparison", "sampled",
    "zero_rule", "overwritten" or "held". `site` is the user's own expression; where
    that calls another library, `inside` is the library's own at which they end.
    """

    reason: str
    words: str
    site: Site | None
    inputs: tuple[str, ...]
    inside: Site | None = None


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An expression that has no effect, since its result is not used."""

    words: str
    site: Site


@dataclasses.dataclass(frozen=True, repr=False)
class View(Drawing):
    """A part of a flow; printed, it explains what is drawn."""

    picture: Picture
    text: Page

    @property
    def alt(self) -> str:
        """The picture in a sentence, for who cannot see it."""
        return f"{self.picture.title}: {self.text.plain.splitlines()[0]}"


@dataclasses.dataclass(frozen=True, repr=False)
class Flow(Drawing):
    """Where the gradient of a function flows. Printed, it is a table.

    Attributes:
      name: the function's; `place` is `file:line`.
      ops: how many operations were looked at.
      inputs: the rows of the table; `terms` names its columns.
      outputs: names of what is differentiated.
      steps: the user's statements; `edges` and `boxes` hold them together.
      cuts: where gradients end although values go on.
      dropped: stops, gates and names whose result is not used: they do nothing.
    """

    name: str
    place: str
    ops: int
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    terms: tuple[str, ...]
    steps: tuple[Step, ...]
    edges: tuple[Edge, ...]
    boxes: tuple[Box, ...]
    cuts: tuple[CutSite, ...]
    dropped: tuple[Dropped, ...]
    _look: Look | None = dataclasses.field(repr=False, compare=False)
    # What was printed before it was stored: then there is no program to look at.
    _stored: dict[Any, Page] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __copy__(self) -> Flow:
        """Nothing of it changes."""
        return self

    def __deepcopy__(self, memo: Any) -> Flow:
        """Nothing of it changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Store what it prints in place of the program, which only this process has."""
        stored, look = dict(self._stored), self._look
        if look is not None:
            stored = {None: self.explain(), _TEXT: self.text, _SOURCE: self.source()}
            for row in look.rows:
                if not row.data and (address := look.address_of(row)) is not None:
                    stored[address] = self.explain(address)
                    if self._as_row(look, row.path) == address:
                        stored[row.path] = stored[address]
        return {**self.__dict__, "_look": None, "_stored": stored}

    @property
    def picture(self) -> Picture:  # type: ignore[override]
        """What is drawn."""
        title = f"gradient flow of {self.name}"
        return Picture(title, self.steps, self.edges, self.boxes)

    @property
    def alt(self) -> str:
        """The picture in a sentence, for who cannot see it."""
        words = [f"{i.path} {i.status}" for i in self.inputs if i.status != "data"]
        return f"{self.picture.title}: {', '.join(words)}; {len(self.cuts)} cuts"

    @property
    def text(self) -> Page:  # type: ignore[override]
        """The table."""
        if self._look is None:
            return self._stored[_TEXT]
        count = len({_statement(g) for g in self._look.grouping.groups})
        return page(table(self._look, self.place, count, self.ops))

    def source(self) -> Page:
        """Return the user's own source with the gradient drawn in its margin."""
        if self._look is None:
            return self._stored[_SOURCE]
        return page(source(self._look))

    def explain(self, address: Address | None = None) -> Page:
        """Say where the gradient of an input goes, and where and why it ends.

        Args:
          address: an argument, a named point, a variable, or None for every input.

        Raises:
          AddressError: it matches nothing.
        """
        stored = self._stored if self._look is None else {}
        if (address is None or is_address(address)) and address in stored:
            return stored[address]
        called = f"flow.explain({address!r})"
        look = self._look if address is None else self._at([address], None, called)
        return page(explain(cast(Look, look)))

    def focus(self, address: Address) -> View:
        """Return the part of the graph that one input or value reaches."""
        look = self._at([address], None, f"flow.focus({address!r})")
        title = f"gradient of {self.name} with respect to {_spelled(address)}"
        return View(reached(look, title), page(explain(look)))

    def between(self, a: Address, b: Address) -> View:
        """Return the part of the graph between two values."""
        look = self._at([a], [b], f"flow.between({a!r}, {b!r})")
        title = f"gradient of {_spelled(b)} with respect to {_spelled(a)}"
        return View(reached(look, title), page(explain(look)))

    def connected(self, x: Address, y: Address | None = None) -> bool:
        """Tell whether any gradient of `y` (all outputs, if None) comes to `x`."""
        called = f"flow.connected({x!r}, {y!r})"
        look = self._at([x], None if y is None else [y], called)
        return any(look.verdict(r.bits) in ("flows", "unknown") for r in look.asked)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; `version` is that of the format."""
        fields = dataclasses.fields(self)
        plain = {f.name: getattr(self, f.name) for f in fields if f.name[0] != "_"}
        return {"version": 1, **{key: _plain(value) for key, value in plain.items()}}

    def _at(
        self, xs: Sequence[Address], ys: Sequence[Address] | None, called: str
    ) -> Look:
        """Look again, at some inputs and outputs of the same program."""
        old = self._look
        if old is None:
            known = quoted(path for path in self._stored if isinstance(path, str))
            raise wrong(
                TypeError,
                called,
                "a flow of this process, or a page that it was stored with",
                "a flow that was stored: it has no program",
                f"explain of one of {known}, or sg.flow(fun)(*args) anew",
            )
        ys = old.ys if ys is None else ys
        rest = ys, called, old.internals, old
        try:
            return looked_at(old.traced, old.labels, xs, *rest)
        except AddressError:
            # It may be the name of a row of the table, which is not always an address.
            rows = [self._as_row(old, x) for x in xs]
            if rows == xs:
                raise
        return looked_at(old.traced, old.labels, rows, *rest)

    @staticmethod
    def _as_row(look: Look, address: Address) -> Address:
        """Return what addresses the row of this name alone, if anything does."""
        rows = [row for row in look.rows if row.path == address]
        found = look.address_of(rows[0]) if len(rows) == 1 else None
        if found is None:
            return address
        same = [row for row in look.rows if found in [*row.addresses]]
        return address if len(same) > 1 else found

    def _pages(self) -> list[Page]:
        return [self.text, self.source(), self.explain()]


@public
def flow(
    fun: Callable[P, Any],
    xs: Any = None,
    ys: Any = None,
    *,
    internals: bool = False,
) -> Callable[P, Flow]:
    """See where the gradient of a function flows, where it ends, and why.

    `jax.grad` returns zeros for what does not train; this tells a zero that no input
    can change from one that happens to be, and names the line. Nothing is run.

    Forward: not evaluated.
    Backward: not evaluated; JAX's own derivative rules are asked what depends on what.

    Args:
      fun: any function that JAX can trace.
      xs: an address or several: what is differentiated by. All arguments, if not given;
        otherwise the others count as data.
      ys: addresses of the outputs that are differentiated; all, if not given.
      internals: show the statements of the functions it calls too.

    Returns:
      A function of `fun`'s arguments (arrays or `jax.ShapeDtypeStruct`) that returns a
      `Flow`: print it; see its `source()`, `explain(address)`, `focus(address)`.

    Raises:
      AddressError: an address matches nothing.
      TypeError: `fun` returns nothing that can be differentiated.

    Example:
        >>> import jax, jax.numpy as jnp, stopgrad_jax as sg
        >>> def loss(w, b):
        ...     return jnp.sum(jnp.round(w) + b)
        >>> w = jax.ShapeDtypeStruct((3,), jnp.float32)
        >>> flow = sg.flow(loss)(w, w)
        >>> [(i.path, i.status) for i in flow.inputs]
        [('w', 'cut'), ('b', 'flows')]
        >>> flow.cuts[0].words
        'the derivative of round is zero almost everywhere'
    """
    require_function(fun, "flow")
    called = f"flow({function_name(fun)})"
    wanted = None if xs is None else addresses_in(xs, called, "xs")
    asked = None if ys is None else addresses_in(ys, called, "ys")

    @public
    @functools.wraps(fun)
    def flow_of(*args: P.args, **kwargs: P.kwargs) -> Flow:
        traced = trace(fun, args, kwargs)
        look = looked_at(traced, Labels(fun), wanted, asked, called, internals)
        require_outputs(look)
        return _made(look, fun)

    return flow_of


def looked_at(
    traced: Traced,
    labels: Labels,
    xs: Sequence[Address] | None,
    ys: Sequence[Address] | None,
    called: str,
    internals: bool = False,
    base: Look | None = None,
) -> Look:
    """Look at a function; a string that is nothing else may be a variable's name."""

    def look(variables: bool) -> Look:
        def read(addresses: Any) -> Any:
            if addresses is None or not variables:
                return addresses
            return [_as_variable(a, traced) for a in addresses]

        return Look(traced, labels, read(xs), read(ys), called, internals, base)

    try:
        return look(False)
    except AddressError:
        strings = [a for a in (*(xs or ()), *(ys or ())) if isinstance(a, str)]
        if not strings:
            raise
        try:
            return look(True)
        except AddressError:
            pass
        raise


def _as_variable(address: Address, traced: Traced) -> Address:
    if not isinstance(address, str):
        return address
    head = address.split("/")[0]
    known = head in traced.arguments or head == "return" or head.isdigit()
    return address if known else Var(address)


def _made(look: Look, fun: Any) -> Flow:
    """Put what a look found into plain values."""
    layout = look.layout
    inputs = []
    names = [name for name, _ in look.terms]
    for row in look.rows:
        cells = {} if row.data else dict(zip(names, look.cells(row.bits), strict=True))
        status = "data" if row.data else look.verdict(row.bits)
        inputs.append(Input(row.path, row.size, row.count, status, cells))
    cuts = []
    for cut in look.cuts:
        # A cut in another library has two places: the user's call, and the line there.
        inside = site_of(cut.path.inside, "library") if cut.path.inside else None
        site = site_of(cut.spot, "library" if inside else "user") if cut.spot else None
        lost = tuple(row.path for row in look.rows if row.bits & look.told(cut))
        cuts.append(CutSite(cut.reason, cut.words, site, lost, inside))
    return Flow(
        function_name(fun),
        _place(look, fun),
        sum(not op.join and not op.held for op in look.graph.ops),
        tuple(inputs),
        tuple(name for name, _ in look.outputs),
        tuple(names),
        layout.steps,
        layout.edges,
        layout.boxes,
        tuple(cuts),
        tuple(Dropped(words, site_of(spot)) for spot, words in look.dropped),
        look,
    )


def _place(look: Look, fun: Any) -> str:
    """`file:line` of a function's definition, or ""."""
    code = code_of(fun)
    return f"{printed_file(code.co_filename)}:{code.co_firstlineno}" if code else ""


def _statement(group: Any) -> Any:
    """What tells statements apart: several steps may be parts of one."""
    statement = group.statement
    if statement is None or group.spot is None:
        return id(group)
    return group.prefix, group.spot.frame.file, statement


def _spelled(address: Address) -> str:
    return address if isinstance(address, str) else str(address)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    return value
