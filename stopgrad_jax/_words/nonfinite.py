"""What `find_nonfinite` says."""

from __future__ import annotations

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
# Results are nonfinite, and an operation that runs as compiled raised alone.
RUNS_APART = "operations that can be run one by one"
AS_COMPILED = "the function in jax.jit, which is then looked at as one operation"
