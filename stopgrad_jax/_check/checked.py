"""The order in which a function is checked, and what is said of what is found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.check as _words
from stopgrad_jax._edge import warn
from stopgrad_jax._errors import quoted, type_of, wrong
from stopgrad_jax._program.trace import Traced

from .compare import Compared, Direction, distances_of, eps_of, slope_of, tolerance
from .directions import (
    FEW,
    apart,
    directions_of,
    finite_where,
    of_finite,
    one_weight,
    random_weights,
    turned_inside,
)
from .judge import BORDER, RIGHT, WRONG, Verdict
from .measured import ByLeaf, Weighed
from .moved_copies import Opened
from .readings import groups_of_stops, known_sites, met_sites
from .sites import best_name, sites_in
from .sought import Reading, Sought
from .told import Teller
from .values import at_own_values, is_repeated, whose_value


class Checked(Teller):
    """One traced function at one point."""

    def __init__(
        self,
        traced: Traced,
        places: dict[int, str],
        allow: tuple[str, ...],
        called: str,
        tol: float | None,
    ) -> None:
        """Find its rules; nothing is run yet."""
        self.called, self.name, self.places = called, traced.name, places
        outs = [v.aval for v in traced.jaxpr.outvars]
        kept = [k for k, a in enumerate(outs) if _jax.is_differentiable(a)]
        self._require_real(outs, kept)
        # Seeded: a check that fails has to fail again.
        rng = np.random.RandomState(0)
        # One number is checked as it is, so that a message can name its derivative; of
        # many it is a random sum, in which errors do not cancel.
        scalar = len(kept) == 1 and outs[kept[0]].size == 1
        unit = one_weight if scalar else functools.partial(random_weights, rng)
        self.program = Weighed(
            traced.jaxpr,
            traced.consts,
            [jnp.asarray(x) for x in traced.leaves],
            list(places),
            kept,
            [unit(outs[k]) for k in kept],
            sites_in(traced.jaxpr),
        )
        self.along = {
            (k, n): v
            for k in places
            for n, v in enumerate(directions_of(rng, self.program.leaves[k]))
        }
        self.tol, self.eps = tolerance(self.program, tol), eps_of(self.program)
        self._slopes = dict[str, dict[Direction, float]]()
        self.freed = frozenset[int]()  # stops that a rule takes care of
        self._require_met(allow)
        self.compared: dict[bool, Compared] = {}
        names = frozenset(allow)
        self.allowed = {
            key for key, s in self.program.sites.items() if s.answers(names)
        }

    def _require_real(self, outs: Sequence[Any], kept: Sequence[int]) -> None:
        """Refuse results that a real derivative is not all of, or that have none."""
        strange = [a for a in outs if jnp.issubdtype(a.dtype, jnp.complexfloating)]
        if strange:
            raise wrong(
                TypeError,
                self.called,
                f"{self.name} returns real numbers",
                ", ".join(map(type_of, strange)),
                "a function that returns z.real and z.imag",
            )
        if not kept:
            raise wrong(
                TypeError,
                self.called,
                f"{self.name} returns at least one array of floats",
                ", ".join(map(type_of, outs)) or "no array",
                "a function whose result carries a gradient",
            )

    def _require_met(self, allow: tuple[str, ...]) -> None:
        """Refuse a name in `allow` that nothing answers to: it would allow nothing."""
        sites = self.program.sites
        known = {name for s in sites.values() for name in (s.shown, *s.names)}
        unknown = sorted(set(allow) - known)
        if unknown:
            usual = {best_name(site, sites) for site in sites.values()}
            usual |= {"with_backward"} & known
            raise wrong(
                ValueError,
                self.called,
                "allow names functions with a custom rule that fun calls",
                quoted(unknown),
                f"one of {quoted(sorted(usual))}"
                if known
                else "allow=(): it calls none",
            )

    def closing(self) -> list[str]:
        """Return the rules that close over a value of the trace that is over."""
        sites = self.program.sites.values()
        return [s.shown for s in sites if _jax.closes_over_tracers(s.eqn)]

    def leave_out_nonfinite(self) -> None:
        """Give no weight to entries of the result that are not finite at the point."""
        program, run = self.program, jax.jit(self.function)
        values = program.values()
        pairs = list(zip(program.weights, run(values), strict=True))
        weights = [of_finite(w, out) for w, out in pairs]
        # An empty result has no entry that is finite, and is no reason to refuse.
        if any(np.size(w) for w in weights) and not any(map(np.any, weights)):
            expected, came, instead = _words.NOTHING_FINITE
            write = instead.format(name=self.name)
            raise wrong(AssertionError, self.called, expected, came, write)
        self.program = dataclasses.replace(program, weights=weights)

        def is_finite(k: int, step: jax.Array) -> bool:
            outs = run(values | {k: values[k] + step})
            return finite_where(weights, outs)

        # The nearest distance: farther ones leave a domain all the sooner.
        near = distances_of(program)[-1]

        def on_both_sides(k: int, line: jax.Array) -> bool:
            h = jnp.asarray(near, line.dtype)
            return is_finite(k, h * line) and is_finite(k, -h * line)

        self._split(on_both_sides)
        self.along = {
            (k, n): turned_inside(line, functools.partial(is_finite, k), near)
            for (k, n), line in self.along.items()
        }

    def _split(self, is_finite: Callable[[int, jax.Array], bool]) -> None:
        """Take entries apart at which something is not finite, where they are many."""
        lines = dict[int, list[jax.Array]]()
        for (k, n), line in self.along.items():
            fine = functools.partial(is_finite, k)
            alone = n or line.size <= FEW or fine(line)
            parts = [line] if alone else apart(line, self.program.leaves[k], fine)
            lines.setdefault(k, []).extend(parts)
        self.along = {(k, n): v for k, vs in lines.items() for n, v in enumerate(vs)}

    def take_steep_apart(self, mode: str) -> None:
        """Take entries apart by which the derivative is not finite."""
        values, weights = self.program.values(), self.program.weights
        slopes = jax.jit(functools.partial(slope_of, mode, self.function))

        def is_finite(k: int, line: jax.Array) -> bool:
            return bool(np.isfinite(slopes(values, [{k: line}], weights)[0]))

        try:
            told = self._told(mode)
        except Exception:  # it is raised again where it is explained
            return
        if not np.isfinite(list(told.values())).all():
            self._split(is_finite)
            self._slopes = {}

    def _told(self, mode: str) -> dict[Direction, float]:
        """Return what JAX says in each direction."""
        if mode not in self._slopes:
            along = functools.partial(slope_of, mode, self.function)
            self._slopes[mode] = self.each(along)(self.program.weights)
        return self._slopes[mode]

    # Custom rules ------------------------------------------------------------------

    def compare_rules(self, forward: bool) -> None:
        """Compare each custom rule with its own function."""
        asked, drawn = known_sites(self.program)
        followed = frozenset(self.allowed | drawn)
        sought = Sought(self.program.sites, Reading(followed=followed))
        # There is a stop in them where nobody gets at it, or a rule that is followed.
        asked -= sought.out_of_reach(self.program.jaxpr)
        for key in sorted(drawn - self.allowed):
            self._say_drawn(key)
        reading = Reading(
            asked=frozenset(asked - followed), followed=followed, forward=forward
        )
        compared = Compared(self.program, reading, self.tol)
        for key in sorted(reading.asked):
            for direction, along in self.along.items():
                verdict = compared.judge_rule(key, direction, along, carefully=False)
                if verdict.kind == WRONG:
                    compared = self._look_again(compared, key, direction, along)
        self.compared[forward] = compared

    def _look_again(
        self, compared: Compared, key: int, direction: Direction, along: Any
    ) -> Compared:
        """Look closer at a rule that seems wrong; raise if it is."""
        reading = compared.reading
        if key in reading.followed or key in reading.opened:
            return compared
        verdict = compared.judge_rule(key, direction, along, carefully=True)
        if verdict.kind != WRONG:
            return compared
        # From here on, each step is one more excuse; what none of them excuses is
        # wrong. First: another rule's value is not its function's, so that this rule
        # and its differences were asked at different points.
        alone, compared = frozenset({key}), at_own_values(compared)

        def is_right(valued: frozenset[int]) -> bool:
            other = compared.reread(valued=valued)
            return other.judge_rule(key, direction, along, True).kind != WRONG

        verdict = compared.judge_rule(key, direction, along, carefully=True)
        if verdict.kind != WRONG:
            self._require_values(compared, is_right, 0.0)
            return compared
        # Its function may hold stops of its own, which its differences have to keep.
        sought = Sought(self.program.sites, reading)
        site = self.program.sites[key]
        if _jax.kind_of(site.eqn) in _jax.CUSTOM and sought.holds_special(site.eqn):
            opened = reading.opened | alone
            other = compared.reread(asked=alone, opened=opened)
            if self._is_right(other, key, {direction: along}):
                return compared.reread(opened=opened)
        # Or it stands for what its library stops beside it, as that of a solver does.
        for group in self._taken_care_of(compared, key):
            other = compared.reread(asked=alone, freed=reading.freed | group)
            if self._is_right(other, key, self.along):
                self.freed |= group
                rest = reading.asked - alone
                return compared.reread(asked=rest, followed=reading.followed | alone)
        if site.draws:
            self._say_drawn(key)
            rest = reading.asked - alone
            return compared.reread(asked=rest, followed=reading.followed | alone)
        raise self.wrong_rule(verdict, key, direction)

    def _taken_care_of(self, compared: Compared, key: int) -> list[frozenset[int]]:
        """Return groups of stops that a rule may give the derivative of.

        It has to be right by all that its own function uses, while these are stops: it
        is for what it is given beside and does not use that it may stand for them.
        """
        groups, alone = groups_of_stops(self.program.jaxpr), frozenset({key})
        other = compared.reread(asked=alone, held=alone) if groups else compared
        return groups if groups and self._is_right(other, key, self.along) else []

    def _is_right(
        self, compared: Compared, key: int, lines: Mapping[Direction, Any]
    ) -> bool:
        try:
            return all(
                any(
                    compared.judge_rule(key, direction, line, carefully).kind != WRONG
                    for carefully in (False, True)
                )
                for direction, line in lines.items()
            )
        except jax.errors.JaxRuntimeError:  # so read, the function itself raises
            return False

    def _say_drawn(self, key: int) -> None:
        site = self.program.sites[key]
        name = best_name(site, self.program.sites)
        text = _words.DRAWN.format(called=self.called, rule=site.shown, name=name)
        warn(text)

    def followed(self) -> frozenset[int]:
        """Return the rules that are taken at their word, at second order too."""
        compared = next(iter(self.compared.values()))
        return compared.reading.followed if not self.freed else frozenset(self.allowed)

    # Leaves ------------------------------------------------------------------------

    def compare(self, mode: str) -> None:
        """Compare first derivatives, leaf by leaf."""
        # Rules are compared in one mode only; what is found of them holds in both.
        forward = mode == "fwd"
        compared = self.compared.get(forward)
        if compared is None:
            compared = self.compared[not forward]

        told = self._told(mode)
        for direction, slope in told.items():
            line = self.along[direction]
            verdict = compared.judge(slope, direction, line)
            # Differences that are exactly zero where longer ones are not may have lost
            # all to rounding: that a zero agrees with them is no evidence.
            flat = verdict.kind == RIGHT and compared.is_flat(direction, line)
            if verdict.kind == RIGHT and not flat:
                continue
            verdict = compared.judge(slope, direction, line, carefully=True)
            if verdict.kind == RIGHT or self._is_cut(compared, verdict, direction):
                continue
            compared = at_own_values(compared)
            verdict = self._at_own_values(compared, mode, direction)
            if verdict.kind == RIGHT:
                continue
            self._blame(compared, direction, verdict.kind != BORDER)
            raise self.wrong_leaf(verdict, direction, mode)

    def _at_own_values(
        self, compared: Compared, mode: str, direction: Direction
    ) -> Verdict:
        """Compare a derivative once more; raise if a rule's value is what is wrong."""
        line, told = self.along[direction], self._told(mode)[direction]
        verdict = compared.judge(told, direction, line, carefully=True)

        def is_right(valued: frozenset[int]) -> bool:
            run = functools.partial(self.function, valued=valued)
            lines, weights = [{direction[0]: line}], self.program.weights
            along = jax.jit(functools.partial(slope_of, mode, run))
            (slope,) = along(self.program.values(), lines, weights)
            kind = compared.judge(float(slope), direction, line, carefully=True).kind
            return kind == RIGHT

        if compared.reading.valued:
            least = self.tol if verdict.kind == RIGHT else 0.0
            self._require_values(compared, is_right, least)
        return verdict

    def _require_values(
        self, compared: Compared, is_right: Callable[..., bool], least: float
    ) -> None:
        """Raise if the value that a rule returns is what is wrong."""
        if (found := whose_value(compared, is_right, least)) is not None:
            key, both = found
            raise self.wrong_value(key, None if is_repeated(compared, key) else both)

    def _is_cut(
        self, compared: Compared, verdict: Verdict, direction: Direction
    ) -> bool:
        """Tell whether only jumps were seen, where the derivative is zero."""
        found = verdict.found
        if verdict.kind != BORDER and found is not None and found.is_at_kink:
            return False
        other = compared.reread(quantized=True, asked=frozenset())
        found = other.judge(verdict.told, direction, self.along[direction])
        return found.kind == RIGHT

    def _blame(self, compared: Compared, direction: Direction, all_: bool) -> None:
        """Raise if one of the rules is what differs, JAX's own included if `all_`."""
        reading, line = compared.reading, self.along[direction]
        for key in sorted(reading.asked):
            compared = self._look_again(compared, key, direction, line)
        rest = frozenset(met_sites(self.program)) - reading.asked - reading.followed
        rest = rest if all_ else frozenset[int]()
        other = compared.reread(asked=rest) if rest else compared
        for key in sorted(rest):
            verdict = other.judge_rule(key, direction, line, carefully=True)
            if verdict.kind == WRONG:
                raise self.wrong_rule(verdict, key, direction)

    # What JAX says -----------------------------------------------------------------

    def function(
        self, values: ByLeaf, valued: frozenset[int] = frozenset()
    ) -> list[Any]:
        """Run the program, its gates that are not linear left out."""
        program, reading = self.program, Reading(valued=valued)
        opened = Opened(program.sites, reading)
        copies = [program.filled(values)]
        (out,) = opened.run(program.jaxpr, program.consts, copies, {})
        return program.kept(out)

    def each(
        self, along: Callable[..., list[Any]]
    ) -> Callable[[Sequence[Any]], dict[Direction, float]]:
        """Compile a derivative in each direction, of the result with some weights."""
        directions = [{k: v} for (k, _), v in self.along.items()]
        compiled = jax.jit(along)

        def told(weights: Sequence[Any]) -> dict[Direction, float]:
            slopes = compiled(self.program.values(), directions, weights)
            return dict(zip(self.along, map(float, slopes), strict=True))

        return told
