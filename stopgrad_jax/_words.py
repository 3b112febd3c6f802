"""Every sentence that the debugger can print, and the condition under which it is true.

One section for each thing that speaks. A sentence is here once, whatever prints it; its
comment is what must have been seen before it may be said.
"""

from __future__ import annotations

# What `flow` and the contracts say of an input ---------------------------------------


# Why a gradient ends ------------------------------------------------------------------


# What `find_nonfinite` says -----------------------------------------------------------


# What `check_gradients` says ----------------------------------------------------------

# The differences of a rule's own function over several distances agree with one another,
# by more than they are unsure of, on something else than the rule says.
WRONG_RULE = "the rule of {rule} is not the derivative of its function"
# The same of all that the function declares, and of what JAX's derivative is.
WRONG_LEAF = "wrong derivative {place}"
# The differences agree with one another only up to `error`, or rounding may be as much.
UNSETTLED = (
    "the derivative {place} cannot be settled in {dtype}: {numbers}; but the differences "
    "are only known to {error}"
)
BY_DIFFERENCES = "{true} by differences, {told} by {whom}"
# A rule adds to a derivative, and so may others: its numbers are what comes through it.
SHARE = ", as its share of the derivative {place}"
# One of these stands where a number is not the derivative of one entry by one entry.
ALONG = ", along the direction `.direction` of this error"
WEIGHED = ", of the result weighed by `.weights` of this error"
# The slopes on the two sides of the point differ by more than curvature explains.
AT_KINK = "the point is at a kink: slope {left} on one side, {right} on the other"
ALLOW = 'allow=["{name}"], if it differs on purpose'
SETTLE = "float64 throughout, or a point where the function is less curved"
# A draw by rejection: its rule is that of the mean (implicit reparameterization).
DRAWN = (
    "{called}: {rule} draws at random until it accepts, and its derivative is that of a "
    "distribution and not of one draw. It is taken at its word, and what is around it is "
    'checked. allow=["{name}"] says so without this warning.'
)
# The derivative raised, and JAX takes it by every argument of floats here.
BY_EVERY_LEAF = (
    "{called} differentiates by every argument of floats, here {leaves}: close over those "
    "that are data, as check_gradients(lambda x: fun(x, data))(x)"
)
# A function of a rule holds a value that was traced with the arguments.
CLOSED_RULE = (
    "rules that take what they need as arguments: they are asked after {name} was traced",
    "the rule of {rule}, which closes over a value of {name}",
    "sg.with_backward(fun, backward), with that value as an argument; or close over the "
    "data outside: check_gradients(lambda x: {name}(x, data))(x)",
)


# What a training step says ------------------------------------------------------------
