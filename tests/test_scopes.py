"""What a scope is called changes nothing: names are the user's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")

X = jnp.float32([0.4, -0.7, 1.2])


@pytest.mark.parametrize(
    "name", ["jvp(f)", "transpose(jvp(f))", "vmap(f)", "with_backward", "jit(f)"]
)
def test_scopes_may_be_called_anything(name):
    def loss(x):
        with jax.named_scope(name):
            feat = jnp.sin(x) * 2.0
            named = sg.name(feat, "h")
        return jnp.sum(named**2) + jnp.sum(jax.lax.stop_gradient(named))

    expected = 2 * 2 * jnp.sin(X)
    np.testing.assert_allclose(sg.gradients(loss, "h")(X), expected, rtol=1e-6)
    np.testing.assert_allclose(
        sg.gradients(loss, sg.var("feat"))(X), expected, rtol=1e-6
    )
    edited = sg.edit(loss, {"h": lambda h: 0.0 * h})
    assert edited(X) == 0.0
    sg.check_gradients(loss)(X)
    bad = sg.find_nonfinite(lambda x: jnp.sum(jnp.log(loss_of_log(name, x))))(X)
    assert bad.example is None
    assert bad.direction == "forward"


def loss_of_log(name, x):
    with jax.named_scope(name):
        return jnp.log(x)
