"""Every sentence that the debugger can print, and the condition under which it is true.

One section for each thing that speaks. A sentence is here once, whatever prints it; its
comment is what must have been seen before it may be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


# What `flow` and the contracts say of an input ---------------------------------------
# The dtype of every leaf is neither float nor complex.
NO_FLOAT = "carries no gradient, since it is {kinds}."
# No value of the outputs is computed from it.
UNUSED = "gradient is exactly zero. {outputs} is not computed from it."
# An output is computed from it, and on every way some rule hands no tangent on.
CUT = "gradient is exactly zero. Every path to {outputs} is cut."
# `jax.grad` by this input was traced, and raised this.
RAISES = "jax.grad raises{at}: {error}"
# Tracing it has left a value of the function's own trace in the derivative.
CLOSED_OVER = "UnexpectedTracerError: a custom rule closes over what is differentiated"
# The same, as a constant of a jitted function: `jax.jit` of the gradient may drop it.
CLOSED_OVER_INSIDE = "TypeError: a custom rule closes over what is differentiated"
# A gradient that was traced reaches `prevent_gradient`.
PREVENTED = "a gradient arrives at {places}, which raises."
# Rules hand the tangent on along some way. Nothing was run: it may be zero by value.
CAN_GET = "can get a gradient{through}."
# The same, and every way passes a selection by value (relu, max, where, a branch).
MAY_BE_ZERO = "connected{through}; may be zero at some inputs: {operations}."
# A stop, gate, name or `prevent_gradient` was called, and nothing reads its result.
NO_EFFECT = "its result is not used: it {does} nothing"

# It is cut or unused.
ZEROS = (
    "jax.grad returns zeros of the right shape for {path}, not None and not an error."
)
# The term's value is computed from the input, and no gradient comes through it.
DOES_NOT_TRAIN = "So {terms} {do} not train {path}."
# A rounding or a step ends the gradient, and no stop was put in on purpose; pasted in
# the place of the expression, the call has its value, and a gradient passes.
STRAIGHT_THROUGH = (
    "To keep the forward value and pass a gradient, use a straight-through rule: "
    "{call}."
)

# No argument is an array or a float: other Python values are not traced.
NO_INPUTS = "no input to differentiate by: {inputs}"

# A contract: the row is cut or unused; it flows; tracing `jax.grad` by it raised.
EXPECTED_SOME = "expected a gradient, structurally zero"
EXPECTED_NONE = "expected none, can get a gradient"
EXPECTED_SOME_RAISES = "expected a gradient"
EXPECTED_NONE_RAISES = "expected none"
# The contract's row is unused.
NOT_COMPUTED = "the output is not computed from it"
# A check was made and thrown away without a call.
NEVER_CALLED = "{called} was never called, so it checks nothing: write {called}(*args)"

# Why a gradient ends ------------------------------------------------------------------
# An address in `stop_gradients` of the query selects the value.
HELD = "held constant by stop_gradients"
# Later writes with constant indices cover every entry that was computed from it.
OVERWRITTEN = "overwritten: a later write replaces all of it"
# The innermost call of the operation is one of `jax.random`.
SAMPLED = "sampled by {name}, and a sample has no derivative"
# The operation is `lax.stop_gradient`.
STOPPED = "stop_gradient, on purpose"
# It is one that an edit put there.
STOPPED_BY_EDIT = "stop_gradient, put in by the edit of {address}"
# A custom rule was asked, and its tangents or cotangents do not depend on what comes.
RULE_RETURNS_ZERO = "the custom rule of {name} returns zero"
FOR_SOME = " for some of its results"  # the gradient goes on by another one
# `with_backward` got None for it or zeros; `transform_gradient` zeros, whatever comes.
BACKWARD_RETURNS_NONE = "the backward function returns None or zeros for it"
TRANSFORMED_TO_ZERO = "the function given to {name} returns zeros for it"
# The second argument of `replace_value`, the forward function of `straight_through`.
VALUE_ALONE = "{name} takes its value and not its derivative, on purpose"
# JAX's own rule of a float operation hands no tangent on; the name is that operation's,
# or of a function that is nothing else.
ZERO_DERIVATIVE = "the derivative of {name} is zero almost everywhere"
ZERO_BRIEF = "derivative is zero"  # that of the whole call
# The same of any other operation of floats: nothing else is known of it.
HANDS_NONE_ON = "the derivative rule of {name} hands no gradient on"
# Nothing but comparisons ends it in the call of a function that returns floats.
COMPARED_INSIDE = "only compared{inside}: bools come of it, which carry no gradient"
# The same of an operation whose result is, or has beside others, integers or booleans.
GIVES_INSIDE = "{name} gives {types}, which carries no gradient"
# The operation returns booleans, of operands that carry a gradient.
COMPARED = "only compared: the comparison returns bool, and a bool carries no gradient"
RETURNS_BOOL = "{name} returns bool, and a bool carries no gradient"
# The operation returns integers, or another dtype that carries no gradient.
RETURNS_INTEGERS = "{name} returns {types}, integers carry no gradient"
RETURNS_OTHER = "{name} returns {types}, {types} carries no gradient"

# What `find_nonfinite` says -----------------------------------------------------------
# Of each sentence the comment says what must have been seen before.


def born(kind: str, side: str, operation: str) -> str:
    """Say that nan or inf was born; it stays so whatever stands in the operands."""
    return f"{kind} is born {side}, in {operation}"


def came_in(address: str, kind: str) -> str:
    """Say that an argument is nonfinite; without its entries the results are finite."""
    return f"{address} is {kind} when the function is called"


def constant(name: str, kind: str) -> str:
    """Say that a constant is nonfinite; the way back from the results ends at it."""
    return f"{name} is {kind}: a constant of the function"


def unnamed(type_of: str, index: str, kind: str) -> str:
    """Say the same of a constant that no variable was found for."""
    if not index:
        return f"a constant of the function is {kind}"
    return f"a constant of the function, an {type_of}, is {kind} at {index}"


# The compiled program's results are finite, and those of its operations one by one not.
BY_STEPS = "only where its operations run one by one: compiled as a whole it is finite"
# The results are finite, step by step, and nothing in it is called on the host.
ONLY_COMPILED = (
    "every operation by itself has a finite result: it is nonfinite only as it is "
    "compiled, in another order"
)
ONLY_COMPILED_HINT = "the numbers are at the edge of their range: look at it in float64"
# The same, where a callback is in it, which JAX cannot see into.
CALLED_BACK = (
    "every operation by itself has a finite result, when it is run once more: a "
    "callback may return another value for the same arguments"
)
CALLED_BACK_HINT = "look at what the callback returned in the first call"

# Under an expression: what happens in it. ------------------------------------------
HERE = "{kind} here"
IN_DERIVATIVE = "{kind} here, in its derivative"  # it is no part of the value
TURNS = "inf turns to nan here"  # its nonfinite operands are inf, its result nan
TAKEN = "{kind} is taken on here"  # the first operation that reads it


def others(entries: int, type_of: str) -> str:
    """Count the other nonfinite entries of an argument."""
    if not entries:
        return f"the only nonfinite entry of {type_of}"
    which = "1 other entry" if entries == 1 else f"{entries} other entries"
    return f"and {which} of {type_of} {'is' if entries == 1 else 'are'} nonfinite"


def hidden(expressions: str) -> str:
    """Say what hides it: its result is finite with it, and the whole value is."""
    return f"hidden from the value by {expressions}"


def factor(gradient: str, expression: str) -> str:
    """Say what multiplies by it: a backward pass reads it there."""
    return f"a factor of {gradient} in {expression}"


def example(number: int) -> str:
    """Say which example it is; where the mapped axis went, JAX does not tell."""
    return f"example {number} of vmap, if that is its axis 0"


# Remedies --------------------------------------------------------------------------
#
# Each was tried out before it is printed: with it the results are finite, those that
# were so before, here or for drawn numbers, are as they were, whatever is put in.


def double_where(where: str, old: str, new: str, side: str) -> str:
    """Say that the operand has to be masked as well as the result."""
    hides = "masks the value and not the derivative"
    if side == "forward":
        hides = "hides it from the value, and the gradient multiplies by it"
    if not new:
        return f"{where} {hides}. Mask {old} before it is used, too"
    return f"{where} {hides}. Mask the operand, too: write {new} for {old}"


def large_number(cause: str, old: str, new: str) -> str:
    """Say that a large number does what an infinity was meant to, and more."""
    return f"{cause}. Write {new} for {old}"


# The largest operand is subtracted, and it is -inf.
MASKED_ROW = (
    "a row or slice that is masked as a whole has no largest number to subtract"
)


# The value itself was nan, and is another one now; none but its own largest was taken.
UNIFORM = (
    "; such a row then counts all its entries alike: if that is not meant, mask it"
)


def guard(old: str, new: str) -> str:
    """Say how to give a function a value where it has none; not tried: it is open."""
    return f"say what it is to be there: {new} for {old}, with your number for value"


# Causes ------------------------------------------------------------------------------


def factor_hint(kind: str) -> str:
    """Say why a value matters that is hidden from the value; the gradient is nan."""
    what = f"zero times {kind} is nan"
    return f"the gradient multiplies by it, and {what}: {FINITE_BEFORE}"


FINITE_BEFORE = "it has to be finite before it is used, not only after"
# The same, where the gradient is infinite and nowhere nan.
FACTOR_IS_INFINITE = f"the gradient multiplies by it and is infinite: {FINITE_BEFORE}"
# An argument is nonfinite, and the value shows it.
BEFORE = "it came from outside: look at what made it"
# A slope has no finite value for finite operands.
SLOPE = "the slope is not finite at this point: keep the operand away from it"
# What comes back to a call is zero there, its slope is a number divided by zero.
ZERO_COMES_BACK = (
    "zero comes back, and zero times an infinite slope is nan: keep the operand away "
    "from this point before the call; to mask the result is too late"
)
# What comes back is infinite for finite operands, and no divisor is zero.
BACK_OVERFLOWS = "what comes back leaves the range of {dtype}"
# By operation: what its operands must have been. SINGULAR: a solution is nonfinite.
EXP = (
    "{name} leaves the range of {dtype} above {limit:.4g}; jax.nn.softmax and "
    "jax.nn.logsumexp subtract the largest operand first"
)
LOG_OF_ZERO = "the logarithm of zero is -inf"
LOG_OF_NEGATIVE = "the logarithm of a negative number is nan"
ZERO_BY_ZERO = "zero divided by zero is nan"
BY_ZERO = "a number divided by zero is {value}"  # or a power below 0 of zero
REMAINDER = "the remainder of a division by zero is nan"
ROOT_OF_NEGATIVE = "the root of a negative number is nan"
ROOT_OF_ZERO = "one by the root of zero is inf"
UNLIKE = "infinities of opposite signs are added"
ALIKE = "infinities of the same sign are subtracted"
ZERO_TIMES_INFINITY = "zero times an infinity is nan"
SINGULAR = "a matrix near to singular, or a solution that leaves the range of {dtype}"
OVERFLOWS = "the result leaves the range of {dtype}"
OTHER = "{name} has no finite result in {dtype} for these operands"
# The operand is smaller than any normal number of its dtype, and not zero.
SUBNORMAL = "{name} of a subnormal {dtype} (below {tiny:.3g}): XLA may take it for 0"
# An error was raised while the function ran, and so it is, step by step.
RUNS = "{what} must run to its end: it raised by itself"
CALL_IT = "{what} without find_nonfinite, which raises the same, and mend that first"
# What `check_gradients` says ----------------------------------------------------------
# The differences of a rule's own function over several distances agree with one
# another, by more than they are unsure of, on something else than the rule says.
WRONG_RULE = "the rule of {rule} is not the derivative of its function"
# And what seems wrong is not, once the rule returns what its function does.
WRONG_VALUE = "the rule of {rule} returns another value than its function"
VALUES = ": {own} by the function, {told} by the rule"
ELSEWHERE = "so what comes after it is differentiated at another value"
# The same as WRONG_RULE of all that is declared, and of what JAX's derivative is.
WRONG_LEAF = "wrong derivative {place}"
# The differences agree with one another only up to `error`, or rounding may be as much.
UNSETTLED = (
    "the derivative {place} cannot be settled in {dtype}: {numbers}; but the "
    "differences are only known to {error}"
)
BY_DIFFERENCES = "{true} by differences, {told} by {whom}"
# A rule adds to a derivative, and so may others: its numbers are what comes through it.
SHARE = ", as its share of the derivative {place}"
# One of these stands where a number is not the derivative of one entry by one entry.
ALONG = ", along the direction `.direction` of this error"
WEIGHED = ", of the result weighed by `.weights` of this error"
# At second order: of more than one number, the slope along all of them is looked at.
OF_SLOPE = ", of the slope along `.first_directions` of this error, one for each leaf"
# The slopes of both sides differ by more than curvature does, down to the last digits.
AT_KINK = "the point is at a kink: slope {left} on one side, {right} on the other"
# They differ over longer distances, and are not seen to differ over the shortest.
NEAR_KINK = "there is a kink within {distance} of the point"
# The same, and one side's slope is JAX's derivative, which may be that of the point.
UNSETTLED_KINK = (
    "the derivative {place} cannot be settled in {dtype}: {told} by JAX and by the "
    "differences of one side, and not by those of the other"
)
FARTHER = "a point farther from the kink"
ALLOW = 'allow=["{name}"], if it differs on purpose'
SETTLE = "{wider}a point where the function is less curved"
# The function (or its derivative, or that at the point) is not finite on one side, and
# the other (of which `numbers` are, if there is one) does not settle that it is right.
BORDER = (
    "the derivative {place} cannot be settled: the point is at the border of a domain, "
    "as the {of} is not finite {where}: {numbers}"
)
INSIDE = "a point inside the domain, where it is finite on both sides"
# No entry of the result is finite at the point: what was expected, what came, what to
# write instead. The last is said of LEFT_OUT, too.
NOTHING_FINITE = (
    "a result with an entry that is finite at this point",
    "only nan and infinities, which have no derivative to compare",
    "sg.find_nonfinite({name})(...), which says where they come from",
)
# Some entries of the result are not finite, and are given a cotangent of zero; and
# JAX's derivative of the others is not finite.
LEFT_OUT = (
    "the derivative {place} is {told} by JAX, of those entries of the result that are "
    "finite: others are not, and the zero that comes back to these may have met an "
    "infinite slope"
)
# A draw by rejection: its rule is that of the mean (implicit reparameterization).
DRAWN = (
    "{called}: {rule} draws at random until it accepts, and its derivative is that of "
    "a distribution and not of one draw. It is taken at its word, and what is around "
    'it is checked. allow=["{name}"] says so without this warning.'
)
# The derivative raised, and JAX takes it by every argument of floats here.
BY_EVERY_LEAF = (
    "{called} differentiates by every argument of floats, here {leaves}: close over "
    "those that are data, as check_gradients(lambda x: fun(x, data))(x)"
)
# A function of a rule holds a value that was traced with the arguments.
CLOSED_RULE = (
    "rules that take what they need as arguments: they are asked after {name} was "
    "traced",
    "the rule of {rule}, which closes over a value of {name}",
    "sg.with_backward(fun, backward), with that value as an argument; or close over "
    "the data outside: check_gradients(lambda x: {name}(x, data))(x)",
)

# What a training step says ------------------------------------------------------------
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
