"""Optimal transport: ott-jax."""

import warnings

import jax.numpy as jnp
from peers.zoo.program import Program, untapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import implicit_differentiation, sinkhorn

import stopgrad_jax as sg


def small(rng, *shape):
    return rng.normal(size=shape).astype("float32") / 2


def transport(solver):
    def loss(x, y, scores, targets, tap=untapped):
        geometry = pointcloud.PointCloud(x, y, epsilon=0.5)
        weights = jnp.exp(scores) / jnp.sum(jnp.exp(scores))
        problem = linear_problem.LinearProblem(geometry, a=weights)
        plan = solver(problem).matrix
        moved = plan @ y
        return jnp.sum((tap(moved, "inner") - targets) ** 2)

    return loss


def clouds(rng):
    return small(rng, 3, 2), small(rng, 4, 2), small(rng, 3), small(rng, 3, 2)


def sinkhorned(what, solver):
    return Program(
        "ott-jax", f"Sinkhorn, {what}", transport(solver), clouds, sg.var("moved")
    )


OTT = {
    "implicit": sinkhorned(
        "ImplicitDiff",
        sinkhorn.Sinkhorn(
            threshold=1e-4,
            max_iterations=100,
            implicit_diff=implicit_differentiation.ImplicitDiff(),
        ),
    ),
    "unrolled": sinkhorned(
        "unrolled",
        sinkhorn.Sinkhorn(max_iterations=20, min_iterations=20, implicit_diff=None),
    ),
}
