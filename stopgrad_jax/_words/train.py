"""What a training step says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Beats = tuple[str, str, str]  # what was expected, what came, what to write instead


# Said of a leaf of which no value of the loss is computed.
NOT_USED = "the loss is not computed from it"


# Said of a leaf that trains, where no derivative of the loss by it is other than zero,
# whatever the numbers are. A decay moves it only if the optimizer has one: "may".
def untrained(causes: Mapping[str, Sequence[str]], also: str) -> Beats:
    """Name leaves that the loss cannot train, {cause: paths}; `also` freezes them."""
    init = 'untrained="freeze" with step.init(params, batch)'
    return (
        "every leaf that trains reaches the loss",
        "leaves whose gradient is zero at every step, though a decay or a momentum "
        f"may move them:{_by_cause(causes)}",
        f'{also + ", or " if also else ""}{init}; untrained="ignore" to train on',
    )


# Said where that is so of all leaves that train.
def nothing_trains(causes: Mapping[str, Sequence[str]]) -> Beats:
    """Name all leaves, none of which the loss trains."""
    return (
        "the loss depends on a leaf that trains",
        f"a loss that trains nothing:{_by_cause(causes)}",
        'a loss without these; untrained="ignore" where that is meant',
    )


# Said where `untrained="freeze"` is asked of a new tree, without a batch.
NO_EXAMPLE = (
    'with untrained="freeze", a batch to look at: the loss says what it trains',
    "no batch",
    "step.init(params, batch), or (params, batch, key); shapes will do",
)


# Said of a leaf that was frozen since the loss did not reach it, and does now.
def thawed(paths: Sequence[str]) -> Beats:
    """Name leaves that one batch trains and the batch of `init` did not."""
    return (
        'untrained="freeze" freezes what no batch trains',
        f"a batch that trains {_quoted(paths)}, which that of init did not",
        "step.init(params, batch) with a batch that reaches all that is to train",
    )


# Said where the analysis itself raised: nothing is known of any leaf.
def unknown(error: str) -> Beats:
    """Say that it could not be told what the loss trains."""
    return (
        "a program of which it can be told which leaves it trains",
        error,
        'untrained="ignore", not to ask',
    )


# Said where a quotient is a part of the loss, and its divisor a number that is computed
# from the batch, a sum over it if examples are divided. Equal ones make no difference.
def divides_by_batch(line: str) -> Beats:
    """Say that micro-batches of a loss that normalizes count the same."""
    return (
        "a mean over examples that count the same, of micro-batches as of the batch",
        f"a loss that divides by a number computed from the batch ({line}): each "
        "micro-batch counts the same, whatever that number is",
        "weighted=True with `return jnp.sum(losses * mask), jnp.sum(mask)`, which "
        "divides the totals once; weighted=False where they are to count the same",
    )


# Said of a weighted loss in a shard_map whose parts differ over unlike axes, or over
# axes that parameters differ over too.
def unclear_devices(
    total: Sequence[str], weight: Sequence[str], parameters: Sequence[str]
) -> Beats:
    """Say that it cannot be told whether parts are of a device or of all."""
    axes = sorted({*total, *weight})
    names = _quoted(axes) if len(axes) == 1 else f"({_quoted(axes)})"
    if parameters:
        came = f"parts that differ over {_quoted(parameters)}, as parameters do"
    else:
        each = (
            f"differs over {_quoted(a)}" if a else "is one" for a in (total, weight)
        )
        came = "a sum that {}, and a weight that {}".format(*each)
    return (
        "sum and weight of each device's examples, or both of all of them",
        came,
        f"return jax.lax.psum(sum, {names}), jax.lax.psum(weight, {names})",
    )


# Said of arrays that a library's own type or name tells to be no parameters, and that
# are not frozen.
def state_trains(library: str, paths: Sequence[str], also: str) -> Beats:
    """Refuse running statistics among the leaves that train; `also` freezes them."""
    kind, new = _STATES[library]
    return (
        "parameters alone among what trains",
        f"{kind} at {_quoted(paths)}, which no gradient and no decay should move",
        f"{also}; where the loss makes new ones, has_aux=True with {new} in aux, and "
        f"{_PUT_BACK}",
    )


# Freezes the statistics of any module of nnx, where `frozen` says nothing else.
FROZEN_STATISTICS = "frozen=lambda path, leaf: isinstance(leaf, nnx.BatchStat)"
# Where `frozen` is a function or a tree of booleans, to which no path can be added.
FROZEN_TOO = "a `frozen` that selects these too"


# Said of such arrays where the program reads them and nothing that it returns depends
# on them: what was computed from them is their next value, or is for nothing.
def state_is_lost(library: str, paths: Sequence[str]) -> Beats:
    """Refuse running statistics whose next value goes nowhere."""
    kind, new = _STATES[library]
    return (
        "running statistics that go on to the next step",
        f"{kind} at {_quoted(paths)}, read only for what is thrown away: they never "
        "move",
        f"has_aux=True with {new} in aux, and {_PUT_BACK}",
    )


# Said of a count of random numbers that the loss depends on, where no array of its type
# that the loss returns depends on it.
def same_numbers(paths: Sequence[str], streams: Sequence[str]) -> Beats:
    """Refuse random numbers that are the same at every step."""
    keys = ", ".join(f"{stream}=key" for stream in dict.fromkeys(streams))
    return (
        "random numbers that change from step to step",
        f"counts of random numbers at {_quoted(paths)} that never move: the same "
        "numbers at every step",
        f"nnx.reseed(model, {keys}) first in loss(model, batch, key), and "
        "step(state, batch, key)",
    )


_PUT_BACK = (
    'state.replace(params=...) with them after each step: "Models with state" in '
    "docs/api/train.md"
)
_STATES = {
    "nnx": ("running statistics (nnx.BatchStat)", "nnx.state(model, nnx.BatchStat)"),
    "equinox": ("a state (eqx.nn.State)", "the state that the model returns"),
    "linen": ('the collection "batch_stats"', 'the "batch_stats" that apply returns'),
}


def frozen(paths: Sequence[Any]) -> str:
    """Spell an argument `frozen=` of paths."""
    listed = ", ".join(
        f'"{path}"' if isinstance(path, str) else f"{path}" for path in paths
    )
    return f"frozen={listed}" if len(paths) == 1 else f"frozen=[{listed}]"


def _by_cause(causes: Mapping[str, Sequence[str]]) -> str:
    lines = [f"\n         {_quoted(paths)}: {why}" for why, paths in causes.items()]
    more = f"\n         and {len(lines) - 8} more causes" if len(lines) > 8 else ""
    return "".join(lines[:8]) + more


def _quoted(paths: Sequence[str]) -> str:
    shown = ", ".join(f'"{path}"' for path in paths[:8])
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
