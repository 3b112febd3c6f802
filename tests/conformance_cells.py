"""One cell of the conformance matrix: what JAX computes, and the closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from conformance import PARAMETERS, TREES, Case, Context, ddh, dh, h


@dataclasses.dataclass(frozen=True)
class Program:
    """A case in a context on a tree, with its input and three directions."""

    case: Case
    context: Context
    tree: str
    dtype: str

    @property
    def holomorphic(self):
        return {"holomorphic": True} if self.dtype == "complex64" else {}

    def array(self, *factors, rows=None):
        """Numbers that every dtype has exactly: halves and quarters."""
        n = TREES[self.tree][0]
        first = np.array(factors)[:n]
        rows = (
            (1 if self.context.one_value else self.context.rows)
            if rows is None
            else rows
        )
        values = np.stack([first + 0.25 * b for b in range(rows)])
        return values * (1 + 0.5j) if self.holomorphic else values

    @property
    def X(self):
        return self.array(0.5, -1.5, 2.0)

    @property
    def t(self):
        return self.array(1.0, 0.5, -1.0)

    @property
    def w(self):
        return self.array(2.0, -0.5, 1.0, rows=self.context.rows)

    def apply(self, outer):
        """Return X -> outer(gate(X)) in this context."""
        _, plant, gather = TREES[self.tree]
        call, context = self.case.call, self.context

        def row(x, p):
            return outer(gather(call(plant(x), p, context.axis)))

        ps = jnp.asarray(PARAMETERS[: context.rows], self.real)
        return lambda X: context.run(row, X, ps)

    @property
    def real(self):
        return "float32" if self.dtype == "complex64" else self.dtype

    def jax(self, transform):
        X, t, w = (jnp.asarray(a, self.dtype) for a in (self.X, self.t, self.w))
        F = self.apply(h)
        return TRANSFORMS[transform][0](self, F, lambda X: jnp.sum(F(X)), X, t, w)

    def closed_form(self, transform):
        """Row by row in float64, summed where all rows are one value."""
        rows = self.context.rows
        xs, ts = (np.broadcast_to(a, (rows, a.shape[1])) for a in (self.X, self.t))
        ps = [PARAMETERS[0 if self.context.one_parameter else b] for b in range(rows)]
        out = [
            TRANSFORMS[transform][1](self.case, x, p, t, w)
            for x, p, t, w in zip(xs, ps, ts, self.w, strict=True)
        ]
        one, kind = self.context.one_value, TRANSFORMS[transform][2]
        n = xs.shape[1]
        if kind == "input":
            return np.sum(out, 0)[None] if one else np.stack(out)
        if kind == "output":
            return np.stack(out)
        if kind == "hessian" and one:
            return np.sum(out, 0).reshape(1, n, 1, n)
        full = np.zeros((rows, n, 1 if one else rows, n), np.result_type(*out))
        for b, block in enumerate(out):
            full[b, :, 0 if one else b] = block
        return full


# Errors: a cell without a result is one of these, by type and words ----------------

WHILE = "reverse mode does not exist in a while loop (JAX)"
NO_TRANSPOSE = "JAX has no transpose of stop_gradient or round"
NO_FORWARD = "with_backward has no forward mode"
PREVENTED = "prevent_gradient: that is what it is for"
NOT_LINEAR = "with_backward is not linear"
NO_ORDER = "complex numbers have no order"
NO_REMAT = "the coming jax.checkpoint is not transposed (JAX)"
ERRORS = {
    WHILE: (ValueError, "Reverse-mode differentiation does not work"),
    NO_TRANSPOSE: (NotImplementedError, "Transpose rule .* not implemented"),
    NO_FORWARD: (TypeError, "with_backward.*forward"),
    PREVENTED: (TypeError, "no gradient may arrive"),
    NOT_LINEAR: (NotImplementedError, "with_backward"),
    NO_ORDER: (TypeError, "complex numbers have no order"),
    # Under a coming switch alone: last, and not on the page.
    NO_REMAT: (NotImplementedError, "must implement `transpose`"),
}
FORWARD = ("jvp", "linearize", "jacfwd")
TWICE = ("hessian", "grad of grad", "jvp of grad", "grad of jvp")


def expected_error(case, context, transform, dtype="float32"):
    """Return why a cell is an error, or None where it must give its closed form."""
    if (
        context == "checkpoint"
        and transform == "linear_transpose"
        and getattr(jax.config, "jax_remat3", False)
    ):
        return NO_REMAT
    if case == "clip_gradient" and dtype == "complex64":
        return NO_ORDER
    if (
        case in ("stop_gradient", "straight_through")
        and transform == "linear_transpose"
    ):
        is_while = context == "while"
        return WHILE if is_while else NO_TRANSPOSE
    if case == "stop_gradient":
        return None
    if case == "prevent_gradient" and (context != "while" or transform in FORWARD):
        return PREVENTED
    if case == "with_backward" and transform in (*FORWARD, "grad of jvp"):
        return NO_FORWARD
    if context == "while" and transform not in FORWARD:
        return WHILE
    if case == "with_backward" and transform in ("hessian", "jvp of grad"):
        return NO_FORWARD
    if case == "with_backward" and transform == "linear_transpose":
        return NOT_LINEAR
    return None


def _each(f, n):
    """Stack f(e_i) for each unit vector, on the first axis."""
    return np.stack([f(e) for e in np.eye(n)]) if n else np.zeros((0, 0))


def _hvp(case, x, p, t):
    y = case.value(x, p)
    return case.dpull(dh(y), p, x, ddh(y) * case.push(t, p))


def _grad_of_grad(case, x, p, u):
    y = case.value(x, p)
    inner = case.pull(ddh(y) * case.dpull(dh(y), p, x, u), p, x)
    return inner + case.dx_pull(dh(y), u)


# Transforms: name -> (what JAX computes, closed form of a row, axes of the result) --

TRANSFORMS = {
    "grad": (
        lambda s, F, L, X, t, w: jax.grad(L, **s.holomorphic)(X),
        lambda c, x, p, t, w: c.pull(dh(c.value(x, p)), p, x),
        "input",
    ),
    "vjp": (
        lambda s, F, L, X, t, w: jax.vjp(F, X)[1](w)[0],
        lambda c, x, p, t, w: c.pull(dh(c.value(x, p)) * w, p, x),
        "input",
    ),
    "jvp": (
        lambda s, F, L, X, t, w: jax.jvp(F, (X,), (t,))[1],
        lambda c, x, p, t, w: dh(c.value(x, p)) * c.push(t, p),
        "output",
    ),
    "linearize": (
        lambda s, F, L, X, t, w: jax.linearize(F, X)[1](t),
        lambda c, x, p, t, w: dh(c.value(x, p)) * c.push(t, p),
        "output",
    ),
    "jacfwd": (
        lambda s, F, L, X, t, w: jax.jacfwd(F, **s.holomorphic)(X),
        lambda c, x, p, t, w: (
            _each(lambda e: dh(c.value(x, p)) * c.push(e, p), len(x)).T
        ),
        "jacobian",
    ),
    "jacrev": (
        lambda s, F, L, X, t, w: jax.jacrev(F, **s.holomorphic)(X),
        lambda c, x, p, t, w: _each(
            lambda e: c.pull(dh(c.value(x, p)) * e, p, x), len(x)
        ),
        "jacobian",
    ),
    "hessian": (
        lambda s, F, L, X, t, w: jax.hessian(L, **s.holomorphic)(X),
        lambda c, x, p, t, w: _each(lambda e: _hvp(c, x, p, e), len(x)).T,
        "hessian",
    ),
    "grad of grad": (
        lambda s, F, L, X, t, w: jax.grad(
            lambda X: jnp.sum(t * jax.grad(L, **s.holomorphic)(X)), **s.holomorphic
        )(X),
        lambda c, x, p, t, w: _grad_of_grad(c, x, p, t),
        "input",
    ),
    "jvp of grad": (
        lambda s, F, L, X, t, w: jax.jvp(jax.grad(L, **s.holomorphic), (X,), (t,))[1],
        lambda c, x, p, t, w: _hvp(c, x, p, t),
        "input",
    ),
    "grad of jvp": (
        lambda s, F, L, X, t, w: jax.grad(
            lambda X: jax.jvp(L, (X,), (t,))[1], **s.holomorphic
        )(X),
        lambda c, x, p, t, w: c.pull(ddh(c.value(x, p)) * c.push(t, p), p, x),
        "input",
    ),
    "linear_transpose": (
        lambda s, F, L, X, t, w: jax.linear_transpose(s.apply(lambda y: y), X)(w)[0],
        lambda c, x, p, t, w: c.pull(w, p, x),
        "input",
    ),
}
