"""`tf.gradients` for JAX: the gradients of any values by any others.

One call is: trace the function, look the addresses up, decide which pairs are
connected, and differentiate the program with a perturbation at each x and a hold at
each stop. `_program/perturbation.py` tells why a stop is then local to its call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp

import stopgrad_jax._jax as _jax

from ._address import nodes
from ._checks import option, require_function, shown
from ._edge import public
from ._errors import function_name, wrong
from ._program.arguments import cotangents, default_ys
from ._program.lookup import LookedUp, addresses_in, look_up
from ._program.refuse import refuse_factors, refuse_loops, refuse_outputs, refuse_rules
from ._program.trace import Place, Traced, arrays_at, trace
from ._program.wanted import TO_DIFFERENTIATE, TO_DIFFERENTIATE_BY
from ._reach.differentiate import Differentiation

P = ParamSpec("P")
R = TypeVar("R")
Unconnected = Literal["none", "zero", "error"]


@public
def gradients(
    fun: Callable[P, Any],
    xs: Any,
    *,
    ys: Any = None,
    grad_ys: Any = None,
    stop_gradients: Any = (),
    unconnected_gradients: Unconnected = "none",
    has_aux: bool = False,
) -> Callable[P, Any]:
    """Differentiate any values of a function by any others.

    Forward: `fun`'s values; nothing is rounded, nothing but what is asked for is
    computed.
    Backward: the total derivative, along all paths, of the sum of all `ys`. Each value
    in `stop_gradients` is a constant to what follows it, so `stop_gradients=xs` gives
    partial derivatives. A stop is local to this call: differentiate the result again
    and the stopped value is an ordinary function of its inputs.

    Args:
      fun: any function that JAX can trace; traced anew at every call, so `jax.jit` the
        whole to trace once.
      xs: an address or a pytree of them: arguments (`"params/w"`, `0`), values named by
        `sg.name` or `checkpoint_name`, operations (`sg.op`). Integers get None.
      ys: addresses of what is differentiated; `fun`'s output if it is one array. Any
        shape: a y that is not a scalar is summed.
      grad_ys: cotangents, structured like `ys` and of the ys' shapes and dtypes; None
        means ones.
      stop_gradients: addresses held constant. A held value that is in `xs` still gets
        its own gradient.
      unconnected_gradients: what an x gets that no y depends on: "none" (None, decided
        when the function is traced), "zero" (zeros of x's shape and dtype), or "error".
      has_aux: `fun` returns (what to differentiate, anything else).

    Returns:
      A function of `fun`'s arguments. It returns the gradients in the structure of
      `xs`, each in the structure of the value; with `has_aux`, (gradients, aux). The
      gradient of a value in a scan has a leading time axis, that of a value which
      occurs several times is a tuple. Complex gradients follow JAX's convention
      (TensorFlow's and PyTorch's are their conjugates).

    Raises:
      AddressError: an address matches nothing, or more than one kind of thing.
      TypeError: `xs` is empty or not an address; `ys` do not say which output is
        meant, or are not real floating point; `grad_ys` do not fit.
      ValueError: a point lies in a `while_loop` or in the body of a custom rule, or an
        x is not connected and `unconnected_gradients="error"`.

    Example:
        >>> import stopgrad_jax as sg
        >>> def f(x):
        ...     h = sg.name(x * x, "h")
        ...     return h * h * x
        >>> print(sg.gradients(f, ["x", "h"])(2.0))
        [Array(80., dtype=float32, weak_type=True), Array(16., dtype=float32, ...
        >>> print(sg.gradients(f, "x", stop_gradients="h")(2.0))
        16.0

    Reference:
      Abadi et al. (2016), "TensorFlow: A System for Large-Scale Machine Learning":
      `tf.gradients`.
    """
    require_function(fun, "gradients")
    query = _Query(
        f"gradients({function_name(fun)}, {shown(xs)})",
        xs,
        ys,
        grad_ys,
        stop_gradients,
        unconnected_gradients,
        has_aux,
    )

    @public
    @functools.wraps(fun)
    def gradients_of(*args: P.args, **kwargs: P.kwargs) -> Any:
        value, grads = query.answer(trace(fun, args, kwargs), want_value=has_aux)
        return (grads, value[1]) if has_aux else grads

    return gradients_of


@public
def value_and_gradients(
    fun: Callable[P, R],
    xs: Any,
    *,
    ys: Any = None,
    grad_ys: Any = None,
    stop_gradients: Any = (),
    unconnected_gradients: Unconnected = "none",
    has_aux: bool = False,
) -> Callable[P, tuple[R, Any]]:
    """Evaluate a function and differentiate any of its values by any others.

    Forward: `fun`'s own result, bit for bit.
    Backward: see `gradients`, which takes the same arguments.

    Args:
      fun: any function that JAX can trace.
      xs: addresses of what to differentiate by.
      ys: addresses of what is differentiated.
      grad_ys: cotangents of the ys; None means ones.
      stop_gradients: addresses held constant.
      unconnected_gradients: "none", "zero" or "error".
      has_aux: `fun` returns (what to differentiate, anything else).

    Returns:
      A function of `fun`'s arguments that returns (`fun`'s whole result, gradients).

    Raises:
      AddressError: see `gradients`.
      TypeError: see `gradients`.
      ValueError: see `gradients`.

    Example:
        >>> import stopgrad_jax as sg
        >>> value, grads = sg.value_and_gradients(lambda x, y: x * y, "x")(2.0, 3.0)
        >>> print(value, grads)
        6.0 3.0
    """
    require_function(fun, "value_and_gradients")
    query = _Query(
        f"value_and_gradients({function_name(fun)}, {shown(xs)})",
        xs,
        ys,
        grad_ys,
        stop_gradients,
        unconnected_gradients,
        has_aux,
    )

    @public
    @functools.wraps(fun)
    def value_and_gradients_of(*args: P.args, **kwargs: P.kwargs) -> Any:
        return query.answer(trace(fun, args, kwargs), want_value=True)

    return value_and_gradients_of


@dataclasses.dataclass(frozen=True)
class _Query:
    """One request, and how it is answered for a traced function."""

    called: str
    xs: Any
    ys: Any
    grad_ys: Any
    stop_gradients: Any
    unconnected: str
    has_aux: bool

    def __post_init__(self) -> None:
        """Check what can be checked before the function is called."""
        for what in ("xs", "stop_gradients"):
            addresses_in(getattr(self, what), self.called, what)
        if self.ys is not None:
            addresses_in(self.ys, self.called, "ys")
        if not jax.tree.leaves(self.xs):
            raise wrong(
                TypeError,
                self.called,
                "xs must hold at least one address",
                f"{self.xs!r}",
                'xs="name" for the argument or point of that name',
            )
        name, options = "unconnected_gradients", get_args(Unconnected)
        instead = f'{name}="zero" for zeros instead of None'
        option(self.unconnected, name, options, self.called, instead)

    def answer(self, traced: Traced, want_value: bool) -> tuple[Any, Any]:
        """Return (the function's result if wanted, gradients like xs)."""
        called = self.called
        xs, stops = jax.tree.leaves(self.xs), jax.tree.leaves(self.stop_gradients)
        ys = [] if self.ys is None else jax.tree.leaves(self.ys)
        wanted = dict.fromkeys(ys, TO_DIFFERENTIATE)
        wanted |= dict.fromkeys([*xs, *stops], TO_DIFFERENTIATE_BY)
        program = look_up(traced, [*xs, *stops, *ys], called, wanted)
        refuse_outputs(program, [*xs, *stops], called)
        refuse_loops(program, [*xs, *stops, *ys], called)
        refuse_rules(program, [*xs, *stops, *ys], called)
        refuse_factors(program, [*xs, *stops], called)

        if self.ys is None:
            y_tree = default_ys(traced, self.has_aux, called)
        else:
            y_tree = program.tree(self.ys)
        pairs = cotangents(program, y_tree, self.grad_ys, called)
        x_tree = program.tree(self.xs)
        wanted = {v for v in jax.tree.leaves(x_tree) if isinstance(v, Place)}
        ends = [y for y, _ in pairs]
        differentiation = Differentiation(program, wanted, ends, stops, called)
        if self.unconnected == "error":
            self._refuse_unconnected(program, differentiation)
        out, grads = differentiation.gradients(pairs, want_value)
        value = arrays_at(traced.output, {"output": out}) if want_value else None
        return value, self._filled(x_tree, grads, program)

    def _refuse_unconnected(
        self, program: LookedUp, differentiation: Differentiation
    ) -> None:
        """Raise if no y is connected to some x, and say where each gradient ends."""
        connected, why = set(differentiation.connected), []
        for address in jax.tree.leaves(self.xs):
            for path, tree in program.matched[address].places.items():
                below = [(p, v) for p, v in nodes(tree, path) if isinstance(v, Place)]
                carry = [
                    (p, v) for p, v in below if _jax.is_differentiable(program.types[v])
                ]
                if not below:
                    why.append(f"{path}: a Python value, which is not traced")
                for at, x in carry or below:
                    if x not in connected:
                        why.append(f"{at}: {differentiation.why(x)}")
        if why:
            raise wrong(
                ValueError,
                self.called,
                'with unconnected_gradients="error", every x must reach the ys',
                "\n         ".join(dict.fromkeys(why)),
                'unconnected_gradients="none" for None, "zero" for zeros',
            )

    def _filled(self, tree: Any, grads: dict[Place, Any], program: LookedUp) -> Any:
        """Put a gradient, or what stands for none, at each place."""

        def fill(leaf: Any) -> Any:
            if leaf in grads:
                return grads[leaf]
            if self.unconnected != "zero":
                return None
            if isinstance(leaf, Place):
                return _jax.zeros(program.types[leaf])
            numeric = isinstance(leaf.value, bool | int)
            return jnp.zeros_like(jnp.asarray(leaf.value)) if numeric else None

        return jax.tree.map(fill, tree)
