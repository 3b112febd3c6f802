"""Losses in which gradients are stopped: the ones that flow's views are tested on."""

import jax
import jax.numpy as jnp

import stopgrad_jax as sg


def encoder(p, x):
    return jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


def decoder(p, z):
    return encoder(p, z)


def quantise(codebook, z_e):
    d = (
        jnp.sum(z_e**2, -1, keepdims=True)
        - 2 * z_e @ codebook.T
        + jnp.sum(codebook**2, -1)
    )
    idx = jnp.argmin(d, axis=-1)
    return codebook[idx]


def squares(x):
    return jnp.sum(x**2)


def vqvae_loss(params, x, beta=0.25):
    z_e = encoder(params["enc"], x)
    z_q = quantise(params["codebook"], z_e)
    z_st = z_e + jax.lax.stop_gradient(z_q - z_e)
    x_hat = decoder(params["dec"], z_st)
    recon = jnp.mean((x_hat - x) ** 2)
    codebook_loss = jnp.mean((jax.lax.stop_gradient(z_e) - z_q) ** 2)
    commit = jnp.mean((z_e - jax.lax.stop_gradient(z_q)) ** 2)
    return recon + codebook_loss + beta * commit


def buggy_vqvae_loss(params, x, beta=0.25):
    """The codebook loss comes after the straight-through step: nothing trains it."""
    z_e = encoder(params["enc"], x)
    z_q = quantise(params["codebook"], z_e)
    z_q = z_e + jax.lax.stop_gradient(z_q - z_e)
    x_hat = decoder(params["dec"], z_q)
    recon = jnp.mean((x_hat - x) ** 2)
    codebook_loss = jnp.mean((jax.lax.stop_gradient(z_e) - z_q) ** 2)
    commit = jnp.mean((z_e - jax.lax.stop_gradient(z_q)) ** 2)
    return recon + codebook_loss + beta * commit


def values(p, obs):
    return jnp.tanh(obs @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


def chosen(q, action):
    return jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]


def dann_features(p, x):
    return jnp.tanh(x @ p["w"])


def dann_loss(params, x, label, domain):
    features = dann_features(params["features"], x)
    logits = features @ params["label"]["w"]
    reversed_features = sg.reverse_gradient(features, 0.5)
    guess = reversed_features @ params["domain"]["w"]
    label_loss = jnp.mean(jax.nn.logsumexp(logits, -1) - chosen(logits, label))
    domain_loss = jnp.mean(jnp.logaddexp(0.0, guess[:, 0]) - domain * guess[:, 0])
    return label_loss + domain_loss


def ddqn_loss(online, target, batch):
    q_sa = chosen(values(online, batch["obs"]), batch["action"])
    best = jnp.argmax(values(online, batch["next_obs"]), axis=-1)
    q_next = chosen(values(target, batch["next_obs"]), best)
    y = batch["reward"] + 0.99 * q_next
    td = q_sa - jax.lax.stop_gradient(y)
    return jnp.mean(td**2)


def _f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _two_layers(n, m, k):
    return {"w0": _f32(n, m), "b0": _f32(m), "w1": _f32(m, k), "b1": _f32(k)}


_VQVAE = {
    "enc": _two_layers(64, 32, 8),
    "codebook": _f32(16, 8),
    "dec": _two_layers(8, 32, 64),
}
_BATCH = {
    "obs": _f32(5, 4),
    "action": _i32(5),
    "next_obs": _f32(5, 4),
    "reward": _f32(5),
}
_DANN = {
    "features": {"w": _f32(64, 16)},
    "label": {"w": _f32(16, 10)},
    "domain": {"w": _f32(16, 1)},
}
ARGS = {
    "vqvae_loss": (_VQVAE, _f32(4, 64)),
    "buggy_vqvae_loss": (_VQVAE, _f32(4, 64)),
    "ddqn_loss": (_two_layers(4, 16, 3), _two_layers(4, 16, 3), _BATCH),
    "dann_loss": (_DANN, _f32(4, 64), _i32(4), _f32(4)),
}
XS = {
    "vqvae_loss": ["params"],
    "buggy_vqvae_loss": ["params"],
    "ddqn_loss": ["online", "target"],
    "dann_loss": ["params"],
}
