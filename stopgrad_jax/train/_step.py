"""A jitted training step, and the states that it takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import stopgrad_jax._jax as _jax
import stopgrad_jax._words.train as words
from stopgrad_jax._checks import require_arrays
from stopgrad_jax._edge import public
from stopgrad_jax._errors import function_name, wrong
from stopgrad_jax._where import Where
from stopgrad_jax.freezing import migrate_state

from ._owned import copied, is_used_up, made, owned
from ._spread import is_spread, replicated, settled, shardings
from ._state import Layout, State, kind_of, layout_of
from ._update import Update


class _NoBatch:
    """Stands for a batch that was not given, as None may be one."""

    def __repr__(self) -> str:
        return "no batch"


_NO_BATCH: Any = _NoBatch()


class Step:
    """A training step: call it with (state, batch), or (state, batch, key).

    `make_step` makes it and says what it does.

    Attributes:
      optimizer: the optimizer, with the leaves that `frozen` selects hidden
        (`sg.freeze`).
    """

    def __init__(self, update: Update, optimizer: Any, frozen: Where, donate: bool):
        """Keep what `make_step` has checked."""
        self.optimizer = optimizer
        self._update, self._frozen, self._donate = update, frozen, donate
        self._watch = update.watch
        self._layouts: dict[Any, Layout] = {}
        self._programs: dict[Any, Any] = {}
        self.__name__ = function_name(update.objective.loss.fun)

    def __repr__(self) -> str:
        """Name the loss."""
        return f"<step of {self.__name__}>"

    @public
    def init(self, params: Any, batch: Any = _NO_BATCH, key: Any = None) -> State:
        """Begin: a state of fresh moments at step 0.

        The leaves that train are copied, as the step will donate them: `params` stays
        yours. The frozen ones are not.

        Args:
          params: a pytree. Leaves that carry no gradient (ints, bools, strings,
            functions, keys, None) stay as they are, and reach the loss.
          batch: for `untrained="freeze"`, a batch, or the shapes of one: the loss is
            traced at it, to see which leaves it trains.
          key: a PRNG key with it, where the loss takes one.

        Returns:
          The state.

        Raises:
          AddressError: `frozen` matches nothing.
          ValueError: no leaf trains, a state of a model (running statistics) would be
            trained, or there is no batch to look at.
        """
        layout = self._layout(params, batch, key)
        trained, rest = layout.split(jax.tree.leaves(params))
        owner = object()
        trained = [copied(x, owner) for x in trained]
        leaves, structure = self._fresh(layout, trained, owner)
        params, count = layout.join(trained, rest), jnp.zeros((), jnp.int32)
        _jax.mark(count, owner)
        return State(params, structure.unflatten(leaves), count)

    @public
    def __call__(self, state: State, batch: Any, key: Any = None) -> tuple[State, Any]:
        """Take one step.

        Args:
          state: from `init`, or from the step before. Its trained leaves and optimizer
            state are donated: what you keep of it is gone, but for the frozen leaves.
            Arrays of yours that you put into it are copied first.
          batch: a pytree of arrays, handed to the loss.
          key: a PRNG key, handed to the loss; None: the loss takes none.

        Returns:
          (the new state, metrics), see `make_step`.

        Raises:
          TypeError: `state` is no state, a leaf of the batch is no array (a string), or
            the loss is not as `make_step` wants it.
          ValueError: a state or batch that does not fit, see `make_step`.
          RuntimeError: the state was used up by an earlier step.
        """
        layout, args = self._arguments(state, batch, key)
        if _jax.is_tracing() or any(map(_jax.is_traced, jax.tree.leaves(args))):
            program = self._program(layout, False, None)  # a call in another program
        else:
            args, program = self._placed(layout, args)
        trained, opt_state, count, metrics = program(*args)
        self._watch.tell()
        if not jax.config.jax_disable_jit:  # type: ignore
            used_up = _jax.owner_of(state.step) if self._donate else None
            results = jax.tree.leaves((trained, opt_state, count))
            made(results, jax.tree.leaves(args), used_up)
        return State(layout.join(trained, args[1]), opt_state, count), metrics

    @public
    def lower(self, state: State, batch: Any, key: Any = None) -> jax.stages.Lowered:
        """Return the step's program for these arguments, as `jax.jit(f).lower` does."""
        layout, args = self._arguments(state, batch, key)
        args, program = self._placed(layout, args)
        return program.lower(*args)

    @public
    def migrate(
        self, state: State, old: Step, batch: Any = _NO_BATCH, key: Any = None
    ) -> State:
        """Go on with a state of another step, of the same optimizer: freeze or thaw.

        What trains in both keeps its moments; what is thawed starts with fresh ones.

        Args:
          state: a state of `old`. It is used up, as by a step.
          old: the step so far.
          batch: as for `init`.
          key: as for `init`.

        Returns:
          A state of this step, with the same parameters and step number. None of its
          arrays that train is one of yours.

        Raises:
          ValueError: see `sg.migrate_state`.
        """
        before = old._layout(state.params, batch, key)
        now = self._layout(state.params, batch, key)
        opt_state = migrate_state(
            state.opt_state, old._hiding(before), self._hiding(now), state.params
        )
        trained, rest = now.split(jax.tree.leaves(state.params))
        moments, structure = jax.tree.flatten(opt_state)
        owner = _jax.owner_of(state.step) or object()
        both = owned([*trained, *moments], rest, owner)
        params = now.join(both[: len(trained)], rest)
        opt_state = structure.unflatten(both[len(trained) :])
        (count,) = owned([state.step], (), owner)
        return State(params, opt_state, count)

    def _layout(self, params: Any, batch: Any, key: Any) -> Layout:
        """Say which leaves train: asked once of each tree, as paths take time."""
        leaves, structure = jax.tree.flatten(params)
        seen = (structure, tuple(map(kind_of, leaves)))
        if seen not in self._layouts:
            called = f"make_step({self.__name__}, ..., frozen={self._frozen!r:.60})"
            layout = layout_of(params, self._frozen, called)
            if "trained" not in layout.kinds:
                raise _nothing_trains(called, params)
            self._watch.begin(layout, params)
            if self._watch.freezes:
                if batch is _NO_BATCH:
                    raise wrong(ValueError, "step.init(params)", *words.NO_EXAMPLE)
                _require_arrays(batch, key, "step.init(params, batch, key)")
                trained, rest = layout.split(leaves)
                layout = self._watch.frozen(layout, trained, rest, batch, key)
            self._layouts[seen] = layout
        return self._layouts[seen]

    def _fresh(
        self, layout: Layout, trained: list[Any], owner: object
    ) -> tuple[list[Any], Any]:
        """Return the leaves and the structure of a new optimizer state.

        Each is a copy: it may be one of the parameters, or an array of the optimizer.
        """
        state = self._update.optimizer.init(layout.alone(trained))
        leaves, structure = jax.tree.flatten(state)
        del state
        for k, leaf in enumerate(leaves):  # one at a time: the memory of one more
            leaves[k] = copied(leaf, owner)
        return leaves, structure

    def _hiding(self, layout: Layout) -> optax.GradientTransformation:
        """Return the optimizer as `migrate_state` asks it, of all parameters."""
        inner = self._update.optimizer

        def init(params: Any) -> Any:
            trained, _ = layout.split(jax.tree.leaves(params))
            return inner.init(layout.alone(trained))

        return optax.GradientTransformation(init, inner.update)

    def _arguments(self, state: State, batch: Any, key: Any) -> tuple[Layout, Any]:
        """Take a state apart into what a compiled step is given, or refuse it."""
        if not isinstance(state, State):
            raise wrong(
                TypeError,
                "step(state, batch)",
                "a state",
                f"{type(state).__name__}",
                "state = step.init(params)",
            )
        leaves = jax.tree.leaves(state.params)
        if any(map(is_used_up, [*leaves, *jax.tree.leaves(state.opt_state)])):
            raise wrong(
                RuntimeError,
                "step(state, batch)",
                "a state that is not used up: a step donates its memory",
                "a state whose arrays are deleted",
                "state, metrics = step(state, batch), and go on with that (where "
                "two states share parameters: state.replace(params=other.params)); "
                "or make_step(..., donate=False)",
            )
        _require_arrays(batch, key, "step(state, batch, key)")
        layout = self._layout(state.params, batch, key)
        trained, rest = layout.split(leaves)
        return layout, (trained, rest, state.opt_state, state.step, batch, key)

    def _placed(self, layout: Layout, args: Any) -> tuple[Any, Any]:
        """Return the arguments where they should lie, and the program for them."""
        trained, rest, opt_state, count, batch, key = args
        if self._donate:
            flat, structure = jax.tree.flatten((trained, opt_state, count))
            others = jax.tree.leaves((rest, batch, key))
            flat = owned(flat, others, _jax.owner_of(count))
            trained, opt_state, count = structure.unflatten(flat)
        layouts, leaves = None, jax.tree.leaves(args)
        if any(map(is_spread, leaves)):
            flat, structure = jax.tree.flatten((trained, opt_state, count))
            flat = settled(flat, replicated([*flat, *leaves]))
            trained, opt_state, count = structure.unflatten(flat)
            layouts = (shardings(flat), structure)
        program = self._program(layout, self._donate, layouts)
        return (trained, rest, opt_state, count, batch, key), program

    def _program(self, layout: Layout, donate: bool, layouts: Any) -> Any:
        which = (layout, donate, layouts)
        if which not in self._programs:
            update = self._update
            out: dict[str, Any] = {}

            def train_step(*args: Any) -> Any:
                return update(layout, *args)

            if layouts is not None:
                kept, structure = layouts
                out = {"out_shardings": (*structure.unflatten(kept), None)}
            donated = (0, 2, 3) if donate else ()
            self._programs[which] = jax.jit(train_step, donate_argnums=donated, **out)
        return self._programs[which]


def _require_arrays(batch: Any, key: Any, called: str) -> None:
    if not jax.config.jax_disable_jit:  # type: ignore
        require_arrays(batch, called, "batch of arrays and numbers")
        require_arrays(key, called, "PRNG key", "jax.random.key(0)")


def _nothing_trains(called: str, params: Any) -> Exception:
    leaves = jax.tree.leaves(params)
    floats = sum(map(_jax.carries_gradient, leaves))
    return wrong(
        ValueError,
        called,
        "at least one leaf of params trains",
        f"{len(leaves)} leaves, {floats} of floats, and all of these frozen",
        'frozen="encoder" for a part of the parameters' if floats else "floats",
    )
