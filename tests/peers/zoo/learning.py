"""Losses: rlax, mctx, distrax, numpyro, blackjax."""

import warnings

import jax
import jax.numpy as jnp
from peers.zoo.program import Program, untapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import blackjax
    import distrax
    import mctx
    import numpyro
    import numpyro.distributions as dist
    import rlax

import stopgrad_jax as sg


def small(rng, *shape):
    return rng.normal(size=shape).astype("float32") / 2


# rlax


def transitions(rng):
    return {
        "obs": small(rng, 4, 3),
        "action": rng.integers(0, 2, 4),
        "reward": small(rng, 4),
        "discount": 0.9 * rng.integers(0, 2, 4).astype("float32"),
        "next_obs": small(rng, 4, 3),
    }


def linear(rng, out):
    return {"w": small(rng, 3, out), "b": small(rng, out)}


def td_loss(params, target, batch, tap=untapped):
    value = lambda p, obs: (obs @ p["w"] + p["b"])[:, 0]
    v_tm1 = value(params, batch["obs"])
    v_t = value(target, batch["next_obs"])
    td = jax.vmap(rlax.td_learning)(v_tm1, batch["reward"], batch["discount"], v_t)
    return jnp.mean(rlax.l2_loss(tap(td, "inner")))


def double_q_loss(params, target, batch, tap=untapped):
    q = lambda p, obs: obs @ p["w"] + p["b"]
    q_tm1 = q(params, batch["obs"])
    q_t_value = q(target, batch["next_obs"])
    q_t_selector = q(params, batch["next_obs"])
    td_error = jax.vmap(rlax.double_q_learning)(
        tap(q_tm1, "inner"),
        batch["action"],
        batch["reward"],
        batch["discount"],
        q_t_value,
        q_t_selector,
    )
    return jnp.mean(rlax.huber_loss(td_error))


# What the errors are made of is no gradient of the targets that they are made with.
BATCH = ("batch/reward", "batch/discount", "batch/next_obs")


def q_batch(rng):
    return linear(rng, 2), linear(rng, 2), transitions(rng)


def impala_loss(actor, critic, batch, tap=untapped):
    """V-trace on one trajectory of behavior that is not the actor's own."""
    logits = batch["obs"] @ actor["w"] + actor["b"]
    policy = tap(logits, "inner")[:-1]
    values = (batch["obs"] @ critic["w"] + critic["b"])[:, 0]
    rho = rlax.categorical_importance_sampling_ratios(
        policy, batch["behavior"][:-1], batch["action"][:-1]
    )
    vtrace = rlax.vtrace_td_error_and_advantage(
        values[:-1],
        values[1:],
        batch["reward"][:-1],
        batch["discount"][:-1],
        rho,
    )
    ones = jnp.ones(len(rho))
    policy_loss = rlax.policy_gradient_loss(
        policy, batch["action"][:-1], vtrace.pg_advantage, ones
    )
    value_loss = 0.5 * jnp.mean(vtrace.errors**2)
    entropy_loss = 0.01 * rlax.entropy_loss(policy, ones)
    policy_loss = tap(policy_loss, "policy_loss")
    value_loss, entropy_loss = (
        tap(value_loss, "value_loss"),
        tap(entropy_loss, "entropy_loss"),
    )
    return policy_loss + value_loss + entropy_loss


def trajectory(rng):
    batch = transitions(rng) | {"behavior": small(rng, 4, 2)}
    del batch["next_obs"]
    return linear(rng, 2), linear(rng, 1), batch


def mpo_loss(actor, target, critic, duals, batch, tap=untapped):
    """Maximum a posteriori policy optimization, with sampled actions."""
    mean = batch["obs"] @ actor["w"] + actor["b"]
    online = distrax.MultivariateNormalDiag(mean, jnp.ones_like(mean))
    old_mean = batch["obs"] @ target["w"] + target["b"]
    old = distrax.MultivariateNormalDiag(old_mean, jnp.ones_like(old_mean))
    actions = old.sample(seed=jax.random.key(0), sample_shape=3)
    q_values = (jnp.sin(actions) @ critic["w"] + critic["b"])[..., 0]
    temperature = rlax.LagrangePenalty(duals["temperature"], jnp.asarray(0.1))
    alpha = rlax.LagrangePenalty(duals["alpha"], jnp.asarray(0.01))
    kl = old.kl_divergence(online)
    losses, _ = rlax.mpo_loss(
        online.log_prob(jax.lax.stop_gradient(actions)),
        q_values,
        temperature_constraint=temperature,
        kl_constraints=[(kl, alpha)],
    )
    per_state = 1.0 * losses
    return jnp.mean(tap(per_state, "inner"))


def mpo(rng):
    duals = {"temperature": 1 + abs(small(rng)), "alpha": 1 + abs(small(rng))}
    critic = {"w": small(rng, 2, 1), "b": small(rng, 1)}
    return linear(rng, 2), linear(rng, 2), critic, duals, {"obs": small(rng, 4, 3)}


def dpg_loss(actor, critic, obs, tap=untapped):
    action = jnp.tanh(obs @ actor["w"] + actor["b"])
    acted = tap(action, "inner")
    value = lambda action, obs: (
        jnp.sum(jnp.sin(action @ critic["v"])) + obs @ critic["u"]
    )
    dq_da = jax.vmap(jax.grad(value))(acted, obs)
    losses = jax.vmap(rlax.dpg_loss)(acted, dq_da)
    return jnp.mean(losses)


def dpg(rng):
    critic = {"v": small(rng, 2, 2), "u": small(rng, 3)}
    return linear(rng, 2), critic, small(rng, 4, 3)


RLAX = {
    "td_learning": Program(
        "rlax",
        "td_learning",
        td_loss,
        lambda rng: (linear(rng, 1), linear(rng, 1), transitions(rng)),
        sg.var("td"),
        cut=("target/b", "target/w", *BATCH),
    ),
    "double_q_learning": Program(
        "rlax",
        "double_q_learning, huber_loss",
        double_q_loss,
        q_batch,
        sg.var("q_tm1"),
        cut=("target/b", "target/w", *BATCH),
    ),
    "vtrace": Program(
        "rlax",
        "vtrace_td_error_and_advantage",
        impala_loss,
        trajectory,
        sg.var("impala_loss.logits"),
        cut=("batch/reward", "batch/discount", "batch/behavior"),
        terms=("policy_loss", "value_loss", "entropy_loss"),
    ),
    "mpo_loss": Program("rlax", "mpo_loss", mpo_loss, mpo, sg.var("per_state")),
    "dpg_loss": Program(
        "rlax",
        "dpg_loss",
        dpg_loss,
        dpg,
        sg.var("dpg_loss.action"),
        cut=("critic/v",),
        unused=("critic/u",),
    ),
}


# mctx


def muzero_loss(net, obs, tap=untapped):
    """The policy learns the visits of a search in its own model."""
    state = jnp.tanh(obs @ net["encode"])
    prior_logits = state @ net["policy"]
    logits = tap(prior_logits, "inner")
    value = (state @ net["value"])[:, 0]

    def recurrent(net, key, action, state):
        state = jnp.tanh(state @ net["encode"][:2] + 0.1 * action[:, None])
        output = mctx.RecurrentFnOutput(
            reward=state[:, 0],
            discount=jnp.full(len(state), 0.9),
            prior_logits=state @ net["policy"],
            value=(state @ net["value"])[:, 0],
        )
        return output, state

    search = mctx.gumbel_muzero_policy(
        net,
        jax.random.key(0),
        mctx.RootFnOutput(prior_logits=logits, value=value, embedding=state),
        recurrent,
        num_simulations=2,
    )
    weights = jax.lax.stop_gradient(search.action_weights)
    return -jnp.mean(jnp.sum(weights * jax.nn.log_softmax(logits), -1))


def muzero(rng):
    net = {
        "encode": small(rng, 3, 2),
        "policy": small(rng, 2, 2),
        "value": small(rng, 2, 1),
    }
    return net, small(rng, 2, 3)


MCTX = {
    "gumbel_muzero_policy": Program(
        "mctx",
        "gumbel_muzero_policy",
        muzero_loss,
        muzero,
        sg.var("prior_logits"),
        cut=("net/value",),
    ),
}


# distrax


def vae_loss(encoder, decoder, x, key, tap=untapped):
    hidden = x @ encoder["w"] + encoder["b"]
    mean, log_scale = hidden[:, :2], hidden[:, 2:]
    posterior = distrax.MultivariateNormalDiag(mean, jnp.exp(log_scale))
    prior = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
    z = posterior.sample(seed=key)
    logits = tap(z, "inner") @ decoder["w"] + decoder["b"]
    likelihood = distrax.Independent(distrax.Bernoulli(logits), 1)
    recon = -jnp.mean(likelihood.log_prob(jnp.where(x > 0, 1.0, 0.0)))
    kl = jnp.mean(posterior.kl_divergence(prior))
    return tap(recon, "recon") + tap(kl, "kl")


def vae(rng):
    decoder = {"w": small(rng, 2, 3), "b": small(rng, 3)}
    return linear(rng, 4), decoder, small(rng, 4, 3), jax.random.key(0)


def coupling_loss(net, x, tap=untapped):
    """A normalizing flow of two coupling layers."""

    def shift(h):
        return jnp.stack([h @ net["scale"], h @ net["shift"]], -1)

    affine = lambda p: distrax.ScalarAffine(p[..., 1], log_scale=jnp.tanh(p[..., 0]))
    mask = jnp.array([True, False])
    flow = distrax.Chain(
        [
            distrax.MaskedCoupling(mask, shift, affine),
            distrax.MaskedCoupling(~mask, shift, affine),
        ]
    )
    base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
    log_prob = distrax.Transformed(base, flow).log_prob(x)
    return -jnp.mean(tap(log_prob, "inner"))


def coupling(rng):
    return {"scale": small(rng, 2, 2), "shift": small(rng, 2, 2)}, small(rng, 4, 2)


DISTRAX = {
    "vae": Program(
        "distrax",
        "MultivariateNormalDiag, Bernoulli",
        vae_loss,
        vae,
        sg.var("z"),
        terms=("recon", "kl"),
    ),
    "flow": Program(
        "distrax",
        "Transformed, Chain, MaskedCoupling",
        coupling_loss,
        coupling,
        sg.var("coupling_loss.log_prob"),
    ),
}


# numpyro


def regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def guide(x, y):
    mean = numpyro.param("mean", jnp.zeros(3))
    scale = numpyro.param("scale", jnp.ones(3))
    center = numpyro.param("center", jnp.zeros(()))
    numpyro.sample("w", dist.Normal(mean, scale).to_event(1))
    numpyro.sample("noise", dist.LogNormal(center, 0.1))


elbo = numpyro.infer.Trace_ELBO(num_particles=2)


def elbo_loss(params, key, x, y, tap=untapped):
    loss = 1.0 * elbo.loss(key, params, regression, guide, x, y)
    return tap(loss, "inner") / 4


def posterior(rng):
    params = {
        "mean": small(rng, 3),
        "scale": 1 + abs(small(rng, 3)),
        "center": small(rng),
    }
    return params, jax.random.key(0), small(rng, 4, 3), small(rng, 4)


NUMPYRO = {
    "Trace_ELBO": Program(
        "numpyro",
        "infer.Trace_ELBO.loss",
        elbo_loss,
        posterior,
        sg.var("elbo_loss.loss"),
    ),
}


# blackjax


def hmc_loss(position, step_size, precision, key, tap=untapped):
    density = lambda x: -0.5 * x @ precision @ x - jnp.sum(jnp.cosh(x))
    kernel = blackjax.hmc(density, step_size, jnp.ones(2), num_integration_steps=3)
    state, info = kernel.step(key, kernel.init(position))
    moved = 1.0 * state.position
    return jnp.sum(tap(moved, "inner") ** 2) + info.acceptance_rate


def chain(rng):
    return (
        small(rng, 2),
        0.3 + 0.1 * small(rng),
        jnp.eye(2) + 0.1 * small(rng, 2, 2),
        jax.random.key(0),
    )


BLACKJAX = {
    "hmc": Program("blackjax", "hmc.step", hmc_loss, chain, sg.var("moved")),
}
