"""Dynamics: diffrax, JAX's own odeint, brax."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from peers.zoo.program import Program, untapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import brax.envs
    import diffrax as dfx

import stopgrad_jax as sg


def small(rng, *shape):
    return rng.normal(size=shape).astype("float32") / 2


def network(rng):
    return {"w": small(rng, 9, 2), "b": small(rng, 9), "out": small(rng, 2, 9)}


def tolerance(x):
    """How exact a solver can be: what it leaves is an error of the derivative."""
    return 1e-4 if x.dtype == "float32" else 1e-9


def field(t, y, net):
    hidden = jnp.tanh(net["w"] @ y + net["b"])
    return net["out"] @ hidden


def fitted(rng):
    return network(rng), small(rng, 2), small(rng, 2)


def neural_ode(adjoint, max_steps=4):
    """The end of a trajectory, fitted to a target."""

    def loss(net, start, target, tap=untapped):
        solution = dfx.diffeqsolve(
            dfx.ODETerm(field),
            dfx.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.3,
            y0=start,
            args=net,
            adjoint=adjoint,
            max_steps=max_steps,
        )
        end = solution.ys[-1]
        return jnp.mean((tap(end, "inner") - target) ** 2)

    what = f"diffeqsolve, {type(adjoint).__name__}"
    return Program("diffrax", what, loss, fitted, sg.var("end"), wide=True)


def saved_loss(net, start, times, targets, tap=untapped):
    solution = dfx.diffeqsolve(
        dfx.ODETerm(field),
        dfx.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=0.4,
        y0=start,
        args=net,
        saveat=dfx.SaveAt(ts=times),
        max_steps=4,
    )
    error = solution.ys - targets
    return jnp.mean(tap(error, "inner") ** 2)


def timed(rng):
    times = np.array([0.0, 0.5], "float32") + 0.1 * abs(small(rng, 2))
    return network(rng), small(rng, 2), times, small(rng, 2, 2)


def settling(t, y, theta):
    return theta["b"] - y - 0.5 * jnp.tanh(theta["w"] @ y)


def steady_loss(theta, start, tap=untapped):
    solution = dfx.diffeqsolve(
        dfx.ODETerm(settling),
        dfx.Tsit5(),
        t0=0.0,
        t1=jnp.inf,
        dt0=0.1,
        y0=start,
        args=theta,
        stepsize_controller=dfx.PIDController(tolerance(start), tolerance(start)),
        event=dfx.Event(dfx.steady_state_event(tolerance(start), tolerance(start))),
        adjoint=dfx.ImplicitAdjoint(),
        max_steps=256,
    )
    rest = solution.ys[-1]
    return jnp.sum(tap(rest, "inner") ** 2)


def steady(rng):
    return {"w": small(rng, 2, 2), "b": small(rng, 2)}, small(rng, 2)


def falling(t, y, gravity):
    _, speed = y
    return speed, -gravity


def ground(t, y, args, **kwargs):
    return y[0]


def bounce_loss(height, speed, gravity, tap=untapped):
    """When a ball comes down, and how fast."""
    import optimistix as optx

    solution = dfx.diffeqsolve(
        dfx.ODETerm(falling),
        dfx.Tsit5(),
        t0=0.0,
        t1=10.0,
        dt0=0.1,
        y0=(height, speed),
        args=gravity,
        event=dfx.Event(ground, optx.Newton(1e-6, 1e-6, optx.rms_norm)),
        max_steps=16,
    )
    landing = solution.ts[-1]
    return tap(landing, "inner") ** 2 + 0.1 * solution.ys[1][-1] ** 2


def thrown(rng):
    return 1 + abs(small(rng)), small(rng), 9 + small(rng)


DIFFRAX = {
    "RecursiveCheckpointAdjoint": neural_ode(dfx.RecursiveCheckpointAdjoint()),
    "DirectAdjoint": neural_ode(dfx.DirectAdjoint()),
    "BacksolveAdjoint": neural_ode(dfx.BacksolveAdjoint()),
    "SaveAt": Program(
        "diffrax",
        "diffeqsolve, SaveAt(ts=...)",
        saved_loss,
        timed,
        sg.var("error"),
        wide=True,
    ),
    "ImplicitAdjoint": Program(
        "diffrax",
        "diffeqsolve, ImplicitAdjoint",
        steady_loss,
        steady,
        sg.var("rest"),
        cut=("start",),
        # It ends short of the rest, and where it ends depends on the start.
        allow=("_implicit_impl_jvp",),
        wide=True,
    ),
    "Event": Program("diffrax", "Event", bounce_loss, thrown, sg.var("landing")),
}

# No reverse mode: JAX itself refuses.
FORWARD_ONLY = neural_ode(dfx.ForwardMode())


def odeint_loss(net, start, times, target, tap=untapped):
    path = odeint(lambda y, t, net: field(t, y, net), start, times, net)
    return jnp.mean((tap(path, "inner") - target) ** 2)


ODEINT = {
    "odeint": Program(
        "jax", "experimental.ode.odeint", odeint_loss, timed, sg.var("path")
    ),
}


@functools.cache
def pendulum():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # brax is no longer developed, it says
        env = brax.envs.get_environment("inverted_pendulum", n_frames=1)
    return env, jax.jit(env.reset)(jax.random.key(0))


def brax_loss(q, qd, action, tap=untapped):
    """How far the cart and the pole are after a step of the environment."""
    env, start = pendulum()
    moving = start.pipeline_state.replace(q=q, qd=qd)
    state = env.step(start.replace(pipeline_state=moving), action)
    place = 1.0 * state.obs
    return jnp.sum(tap(place, "inner") ** 2)


def pushed(rng):
    pendulum()  # outside of any transformation
    return 0.1 * small(rng, 2), 0.1 * small(rng, 2), small(rng, 1)


BRAX = {
    "step": Program(
        "brax", "envs.inverted_pendulum.step", brax_loss, pushed, sg.var("place")
    ),
}
