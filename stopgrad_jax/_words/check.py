"""What `check_gradients` says."""

from __future__ import annotations

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
