"""Every sentence that the debugger can print, and the condition under which it is true.

One section for each thing that speaks. A sentence is here once, whatever prints it; its
comment is what must have been seen before it may be said.
"""

from __future__ import annotations

# What `flow` and the contracts say of an input ---------------------------------------


# Why a gradient ends ------------------------------------------------------------------


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


def put_in(kind: str) -> str:
    """Say that a literal reaches the results, and that no operation makes nan of it."""
    return f"the {kind} that is written in the function reaches its result"


# The results are finite, step by step.
ONLY_COMPILED = (
    "every operation by itself has a finite result: it is nonfinite only as it is "
    "compiled, in another order"
)
ONLY_COMPILED_HINT = "the numbers are at the edge of their range: look at it in float64"

# Under an expression: what happens in it. ------------------------------------------

HERE = "{kind} here"
IN_DERIVATIVE = "{kind} here, in its derivative"  # it is no part of the value
TURNS = "inf turns to nan here"  # its nonfinite operands are inf, its result nan
TAKEN = "{kind} is taken on here"  # the first operation that reads it
WRITTEN = "{kind} is written here"  # the same, of a literal


def others(entries: int, type_of: str) -> str:
    """Count the other nonfinite entries of an argument."""
    if not entries:
        return f"the only nonfinite entry of {type_of}"
    return f"and {entries} other entries of {type_of} are nonfinite"


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
# were so before have not changed, and they do not depend on the number that is put in.


def double_where(where: str, old: str, new: str, side: str) -> str:
    """Say that the operand has to be masked as well as the result."""
    hides = "masks the value and not the derivative"
    if side == "forward":
        hides = "hides it from the value, and the gradient multiplies by it"
    return f"{where} {hides}. Mask the operand, too: write {new} for {old}"


def large_number(old: str, new: str) -> str:
    """Say that a large number does what an infinity was meant to, and more."""
    return (
        "a row or slice that is masked as a whole has no largest number to subtract. "
        f"Write {new} for {old}"
    )


# The value itself was nan, so it is another one with the remedy.
UNIFORM = (
    "; such a row then counts all its entries alike: if that is not meant, mask it"
)


def guard(old: str, new: str) -> str:
    """Say how to give a function a value where it has none; not tried: it is open."""
    return f"say what it is to be there: {new} for {old}, with your number for value"


# Causes ------------------------------------------------------------------------------


def factor_hint(kind: str) -> str:
    """Say why a hidden value matters; it is not seen in the value."""
    return (
        f"the gradient multiplies by it, and zero times {kind} is nan: it has to be "
        "finite before it is used, not only after"
    )


# An argument is nonfinite, and the value shows it.
BEFORE = "it came from outside: look at what made it"

# A slope has no finite value for finite operands.
SLOPE = (
    "the slope is not finite at this point, though the value is: keep the operand away "
    "from it"
)
# Of what comes back and a slope one is zero and the other one infinite.
ZERO_COMES_BACK = (
    "zero comes back, and zero times an infinite slope is nan: keep the operand away "
    "from this point before the call; to mask the result is too late"
)
# What comes back is nonfinite for finite operands, none of which is zero.
BACK_OVERFLOWS = "the product leaves the range of {dtype} on the way back"

# By operation: what its operands must have been.
EXP = (
    "{name} leaves the range of {dtype} above {limit:.4g}; jax.nn.softmax and "
    "jax.nn.logsumexp subtract the largest operand first"
)
LOG_OF_ZERO = "the logarithm of zero is -inf"
LOG_OF_NEGATIVE = "the logarithm of a negative number is nan"
ZERO_BY_ZERO = "zero divided by zero is nan"
BY_ZERO = "a number divided by zero is inf"
ROOT_OF_NEGATIVE = "the root of a negative number is nan"
ROOT_OF_ZERO = "one by the root of zero is inf"
UNLIKE = "infinities of opposite signs are added"
ALIKE = "infinities of the same sign are subtracted"
ZERO_TIMES_INFINITY = "zero times an infinity is nan"
SINGULAR = "the matrix is singular, or too close to it"
OVERFLOWS = "the result leaves the range of {dtype}"
OTHER = "{name} has no finite result for these operands"

# An error was raised while the function ran, and so it is, step by step.
RUNS = "the function must run to its end: it raised by itself"
CALL_IT = "the call without find_nonfinite, which raises the same, and mend that first"


# What `check_gradients` says ----------------------------------------------------------


# What a training step says ------------------------------------------------------------
