"""Solvers: optimistix, lineax, jaxopt."""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from peers.zoo.program import Program, untapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxopt
    import lineax as lx
    import optimistix as optx

import stopgrad_jax as sg


def small(rng, *shape):
    return rng.normal(size=shape).astype("float32") / 2


# optimistix


def pull(y, theta):
    return jnp.tanh(theta["w"] @ y) + 2 * y - theta["b"]


def step(y, theta):
    return jnp.tanh(0.5 * theta["w"] @ y + theta["b"])


def energy(y, theta):
    return jnp.sum(y**2) + jnp.sum(jnp.cosh(theta["w"] @ y - theta["b"]))


def misfit(y, theta):
    return jnp.concatenate([theta["w"] @ jnp.sin(y) - theta["b"], 0.3 * y])


def solved(solve, function, kind, least):
    def loss(theta, guess, tap=untapped):
        tol = 1e-6 if guess.dtype == "float32" else least
        solution = solve(function, kind(rtol=tol, atol=tol), guess, args=theta)
        root = checkpoint_name(solution.value, "root")
        return jnp.sum(tap(root, "inner") ** 2)

    return loss


def problem(rng):
    return {"w": small(rng, 2, 2), "b": small(rng, 2)}, 0.1 * small(rng, 2)


def found(what, solve, function, solver, least=1e-13, allow=()):
    loss = solved(solve, function, solver, least)
    what = f"{what}, {solver.__name__}"
    # The implicit function theorem does not know of the first guess.
    return Program(
        *("optimistix", what, loss, problem, "root"),
        cut=("guess",),
        allow=allow,
        wide=True,
    )


# These two end short of the solution, and where they end depends on the first guess.
SHORT = {"least": 1e-6, "allow": ("_implicit_impl_jvp",)}


OPTIMISTIX = {
    "root_find": found("root_find", optx.root_find, pull, optx.Newton),
    "fixed_point": found(
        "fixed_point", optx.fixed_point, step, optx.FixedPointIteration
    ),
    "minimise": found("minimise", optx.minimise, energy, optx.BFGS, **SHORT),
    "least_squares": found(
        "least_squares", optx.least_squares, misfit, optx.LevenbergMarquardt, **SHORT
    ),
}


# lineax


def matrix(rng):
    return 2 * jnp.eye(3) + small(rng, 3, 3), small(rng, 3)


def symmetric(rng):
    half = small(rng, 3, 3)
    return half @ half.T + jnp.eye(3), small(rng, 3)


def tall(rng):
    return small(rng, 4, 2) + jnp.eye(4, 2), small(rng, 4)


def bands(rng):
    return (2 + 0.1 * small(rng, 3), small(rng, 2), small(rng, 2)), small(rng, 3)


def as_matrix(a):
    return lx.MatrixLinearOperator(a)


def as_positive(a):
    return lx.MatrixLinearOperator((a + a.T) / 2, lx.positive_semidefinite_tag)


def as_function(a):
    like = jax.ShapeDtypeStruct((a.shape[1],), a.dtype)
    return lx.FunctionLinearOperator(lambda x: a @ x, like)


def as_bands(a):
    return lx.TridiagonalLinearOperator(*a)


def linear(operator, solver, args):
    def loss(a, b, tap=untapped):
        solution = lx.linear_solve(operator(a), b, solver)
        x = 1.0 * solution.value
        return jnp.sum(jnp.sin(tap(x, "inner")))

    what = f"linear_solve, {type(solver).__name__}"
    return Program("lineax", what, loss, args, sg.var("x"), wide=True)


LINEAX = {
    "LU": linear(as_matrix, lx.LU(), matrix),
    "QR": linear(as_matrix, lx.QR(), tall),
    "Cholesky": linear(as_positive, lx.Cholesky(), symmetric),
    "CG": linear(as_positive, lx.CG(1e-6, 1e-6), symmetric),
    "GMRES": linear(as_function, lx.GMRES(1e-6, 1e-6), matrix),
    "Tridiagonal": linear(as_bands, lx.Tridiagonal(), bands),
}


# jaxopt

# The tolerances of a solver are errors of its derivative, which `check_gradients` sees:
# in float64 they are small, in float32 the iterations end first.
exactly = functools.partial(jaxopt.linear_solve.solve_normal_cg, tol=1e-12)


def ridge(w, theta):
    return jnp.sum((theta["w"] @ w - theta["b"]) ** 2) + jnp.sum(w**2)


def run(solver, *more):
    """A program whose parameters are an inner problem's, and what is given beside."""

    def loss(theta, guess, tap=untapped):
        params = solver.run(guess, *more, theta).params
        fitted = checkpoint_name(params, "fitted")
        return jnp.sum(jnp.sin(tap(fitted, "inner")))

    what = f"{type(solver).__name__}.run"
    return Program("jaxopt", what, loss, problem, "fitted", cut=("guess",), wide=True)


def lasso(rng):
    theta, guess = problem(rng)
    return theta, 0.01 + 0.01 * abs(small(rng)), guess


def lasso_loss(theta, penalty, guess, tap=untapped):
    solver = jaxopt.ProximalGradient(
        ridge,
        jaxopt.prox.prox_lasso,
        stepsize=0.1,
        maxiter=300,
        tol=0.0,
        implicit_diff_solve=exactly,
    )
    params = solver.run(guess, penalty, theta).params
    fitted = checkpoint_name(params, "fitted")
    return jnp.sum(jnp.sin(tap(fitted, "inner")))


def crossing(x, theta):
    return x**3 + x - theta


def bisection_loss(theta, tap=untapped):
    solver = jaxopt.Bisection(crossing, -3.0, 3.0, tol=1e-6, check_bracket=False)
    root = checkpoint_name(solver.run(None, theta).params, "root")
    return tap(root, "inner") ** 2


def simplex(rng):
    return problem(rng)[0], jnp.full(2, 0.5, jnp.float32)


JAXOPT = {
    "GradientDescent": run(
        jaxopt.GradientDescent(
            ridge, stepsize=0.1, maxiter=500, tol=0.0, implicit_diff_solve=exactly
        )
    ),
    "LBFGS": run(jaxopt.LBFGS(ridge, maxiter=50, tol=1e-6)),
    "FixedPointIteration": run(
        jaxopt.FixedPointIteration(
            step, maxiter=100, tol=1e-12, implicit_diff_solve=exactly
        )
    ),
    "AndersonAcceleration": run(
        jaxopt.AndersonAcceleration(
            step, history_size=2, maxiter=50, tol=1e-12, implicit_diff_solve=exactly
        )
    ),
    "ProximalGradient": Program(
        "jaxopt",
        "ProximalGradient.run",
        lasso_loss,
        lasso,
        "fitted",
        cut=("guess",),
        wide=True,
    ),
    "Bisection": Program(
        "jaxopt",
        "Bisection.run",
        bisection_loss,
        lambda rng: (small(rng),),
        "root",
        # What it returns is one of the midpoints of a fixed interval: a step function.
        allow=("solver_fun_flat",),
        wide=True,
    ),
}
