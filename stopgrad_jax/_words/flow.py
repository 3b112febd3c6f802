"""What `flow`, the contracts and a cut say."""

from __future__ import annotations

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
