"""`fit`: run a training step many times, and lose nothing on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

import stopgrad_jax._jax as _jax
from stopgrad_jax._address import leaf_paths
from stopgrad_jax._checks import whole
from stopgrad_jax._edge import public
from stopgrad_jax._errors import type_of, wrong

from ._chunks import Runner, given
from ._progress import Progress, interruptible

CALLED = "fit(step, state, batches)"
S = TypeVar("S")


@public
def fit(
    step: Callable[..., Any],
    state: S,
    batches: Any,
    *,
    steps: int,
    key: Any = None,
    log_every: int = 100,
    progress: bool = True,
    callback: Callable[[Any, Any], Any] | None = None,
) -> tuple[S, Any]:
    """Run a training step many times.

    Where batches are arrays or a function, whole chunks of steps run as one `lax.scan`
    in one compiled program. Ctrl-C ends the loop after the running chunk, and returns
    what there is. It is left as it is in a thread, and where Python was started with it
    ignored, as a background job of a shell script is: there, `callback` may end a run.

    Forward: `state, metrics = step(state, batch)`, as often as `steps` says.
    Backward: that of the step; `fit` itself is not differentiated.

    Args:
      step: a function of (state, batch), or (state, batch, key) where there is a key,
        that returns (state, metrics): of `make_step`, or one that calls such a step and
        does more (the average of a teacher). Traced once for each kind of batch.
      state: what the step takes: any pytree. Its arrays are copied where the step
        changes them; those that it hands on unchanged exist once.
      batches: what the steps train on, from the first on.

        - arrays (one, or a dict, tuple or dataclass of them) with a leading axis of
          batches, at least `steps`;
        - a function of the step number (an int32 array, traced: `state.step`, so that
          a run that is resumed goes on where it ended; from 0 if the state has none);
        - any other iterable of batches, a list or a generator: one jitted call a step.
      steps: how many to run, at least 1.
      key: a PRNG key: each step gets `jax.random.fold_in(key, step number)`.
      log_every: how many steps a chunk has; the metrics are fetched after each.
      progress: show a bar with the last loss (tqdm if installed, else lines) on stderr.
      callback: called with (state, metrics) after each chunk, metrics as in `history`.
        The state's arrays are used up by the next chunk: save or copy what you keep.
        If it returns True, the loop ends.

    Returns:
      (state, history): history has the structure of the metrics, NumPy arrays with a
      leading axis of steps.

    Raises:
      ValueError: batches that end before `steps`, or an option out of range.
      TypeError: a step that changes the structure or types of its state.
      Exception: whatever the step, the callback or the iterable raise. Every exception
        has the attributes `state` and `history`: those after the last good step.

    Example:
        >>> import jax.numpy as jnp, optax, stopgrad_jax as sg
        >>> def loss(w, x):
        ...     return jnp.mean((w - x) ** 2)
        >>> step = sg.train.make_step(loss, optax.sgd(0.1))
        >>> data = jnp.full((50, 8), 3.0)
        >>> state, history = sg.train.fit(
        ...     step, step.init(0.0), data, steps=50, progress=False)
        >>> print(f"{state.params:.3f}", history["loss"].shape, history["loss"][0])
        3.000 (50,) 9.0
    """
    _check(step, steps, log_every)
    draw, source = _source(batches, steps)
    runner, log = Runner(step, draw, state, key), _Log()
    bar = Progress(steps, progress)
    try:
        with interruptible() as asked, contextlib.closing(bar):
            while runner.done < steps and not _any_process(asked()):
                size = min(log_every, steps - runner.done)
                if source is None:
                    data, first = None, 0
                    if draw is given:
                        data, first = _window(batches, runner.done, size)
                    log.add(runner.many(data, first, size), stacked=True)
                else:
                    for _ in range(size):
                        log.add(runner.one(_next(source, runner, steps)))
                        if asked() and jax.process_count() == 1:
                            break
                metrics = log.flush()
                bar.update(runner.done, metrics)
                if callback is not None and callback(runner.state, metrics) is True:
                    break
            if runner.done < steps:
                bar.note(f"ended after {runner.done} of {steps} steps")
    except BaseException as error:
        _attach(error, state, runner, log)
        raise
    return runner.given_up(), log.history()


class _Log:
    """Metrics of the steps so far."""

    def __init__(self) -> None:
        self._pending: list[Any] = []
        self._parts: list[Any] = []

    def add(self, metrics: Any, stacked: bool = False) -> None:
        self._pending.append((metrics, stacked))

    def flush(self) -> Any:
        """Fetch what is pending, and return it."""
        if not self._pending:
            return {}
        part = _concatenated([_stacked(*each) for each in self._pending])
        self._parts.append(part)
        self._pending = []
        return part

    def history(self) -> Any:
        return _concatenated(self._parts)


def _stacked(metrics: Any, is_stacked: bool) -> Any:
    fetched = jax.tree.map(_fetched, metrics)
    return fetched if is_stacked else jax.tree.map(lambda x: x[None], fetched)


def _concatenated(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else {}


def _fetched(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _any_process(asked: bool) -> bool:
    """Agree among processes: one that stops alone would leave the others waiting."""
    if jax.process_count() == 1:
        return asked
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(asked))))


def _source(batches: Any, steps: int) -> tuple[Any, Iterator[Any] | None]:
    """Say how a batch is drawn, and what is iterated over, if anything."""
    if not isinstance(batches, list) and _are_arrays(batches):
        _check_arrays(batches, steps)
        return given, None
    if callable(batches):
        return batches, None
    if isinstance(batches, dict):  # whose keys are no batches
        _refuse_leaf(batches)
    try:
        return given, iter(batches)
    except TypeError:
        raise wrong(
            TypeError,
            CALLED,
            "batches are arrays, a function of the step number, or an iterable",
            f"{batches!r:.60}",
            "fit(step, state, lambda number: batch, steps=...)",
        ) from None


def _are_arrays(batches: Any) -> bool:
    array = jax.Array | np.ndarray
    if isinstance(batches, array):
        return True
    if jax.tree_util.default_registry.flatten_one_level(batches) is None:
        return False  # no node of a pytree: jax.tree.leaves warns of iterators
    leaves = jax.tree.leaves(batches, is_leaf=lambda x: hasattr(x, "__next__"))
    return bool(leaves) and all(isinstance(x, array) for x in leaves)


def _refuse_leaf(batches: Any) -> None:
    """Name a leaf that keeps a tree from being arrays of batches."""
    for path, leaf in zip(leaf_paths(batches), jax.tree.leaves(batches), strict=True):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise wrong(
                TypeError,
                CALLED,
                "a tree of batches holds arrays with a leading axis of batches",
                f'{leaf!r:.40} ({type(leaf).__name__}) at "{path}"',
                "arrays alone: what does not change is bound before, as by "
                "make_step(functools.partial(loss, ...), ...)",
            )


def _check_arrays(batches: Any, steps: int) -> None:
    """Refuse arrays that are no row of batches, or too few of them."""
    flat = list(zip(leaf_paths(batches), jax.tree.leaves(batches), strict=True))
    scalars = [path for path, x in flat if not x.ndim]
    sizes = {path: x.shape[0] for path, x in flat if x.ndim}
    expected = f"arrays have a leading axis of batches, at least steps={steps} of them"
    if scalars:
        came = f'a scalar at "{scalars[0]}"' if scalars[0] else "a scalar"
        instead = "lambda number: batch, for the same batch at every step"
        raise wrong(ValueError, CALLED, expected, came, instead)
    if len(set(sizes.values())) > 1:
        instead = "a list for batches one after the other: [batch, batch, ...]"
        raise wrong(ValueError, CALLED, expected, f"leading sizes {sizes}", instead)
    (size,) = set(sizes.values())
    if size < steps:
        came = f"{size} batches, {type_of(flat[0][1])}"
        instead = f"steps={size}, or lambda number: jax.tree.map("
        instead += f"lambda x: x[number % {size}], batches)"
        if not size:
            instead = "at least one batch"
        raise wrong(ValueError, CALLED, expected, came, instead)


def _window(batches: Any, first: int, size: int) -> tuple[Any, int]:
    """Return what goes to the device for a chunk, and the index of its first batch."""
    if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(batches)):
        return jax.tree.map(lambda x: x[first : first + size], batches), 0
    return batches, first


def _next(source: Iterator[Any], runner: Runner, steps: int) -> Any:
    try:
        return next(source)
    except StopIteration:
        raise wrong(
            ValueError,
            CALLED,
            f"batches for steps={steps}",
            f"{runner.done} batches, then the iterable ended",
            "itertools.cycle(batches) for a list, or fewer steps; the state so far "
            "is the attribute state of this exception",
        ) from None


def _check(step: Any, steps: int, log_every: int) -> None:
    """Refuse what is no step, no count, or a call that is traced."""
    if not callable(step):
        raise wrong(
            TypeError,
            CALLED,
            "step is a function of (state, batch)",
            f"{step!r:.60}",
            "step = make_step(loss, optimizer)",
        )
    for name, value in {"steps": steps, "log_every": log_every}.items():
        whole(value, name, CALLED, instead=f"{name}=100")
    if _jax.is_tracing():
        raise wrong(
            TypeError,
            CALLED,
            "a call outside of jax.jit: it shows progress and returns NumPy arrays",
            "a call that is being traced",
            "jax.lax.scan(step, state, batches) inside a program",
        )


def _attach(error: BaseException, start: Any, runner: Runner, log: _Log) -> None:
    """Hand over what there is on an exception: the last good state and the history."""
    state, done = runner.state, runner.done
    try:
        log.flush()
        if not isinstance(error, KeyboardInterrupt):  # that one must not wait
            jax.block_until_ready(jax.tree.leaves(state))
        if any(x.is_deleted() for x in jax.tree.leaves(state) if _is_array(x)):
            raise RuntimeError("donated to a program that failed")
    except Exception:  # a program failed while it ran: its state is gone
        state, done = start, 0
    which = f"that after {done} good steps" if done else "the one that fit was given"
    error.add_note(
        f"In fit: the attribute `state` of this exception is {which}; `history` has "
        "the metrics until then."
    )
    with contextlib.suppress(AttributeError):  # an exception with slots
        error.state, error.history = state, log.history()  # type: ignore


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)
