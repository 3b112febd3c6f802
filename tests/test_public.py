"""What users see: the names, their types, and one version."""

import importlib.metadata
import re
import subprocess
import sys
import textwrap

import pytest

import stopgrad_jax as sg

NAMES = """
    Address AddressError Flow Nonfinite Stats Where __version__ assert_gradient
    assert_no_gradient capture check_gradients clip_gradient clip_gradient_norm combine
    edit find_nonfinite flow freeze gradient_stats gradients mask mask_gradient
    migrate_state name op partition per_example perturb point prevent_gradient quantize
    recurrent replace_nonfinite_gradient replace_value reversal_schedule
    reverse_gradient sample scale_gradient score stop_gradient straight_through
    surrogate train transform_gradient value_and_gradients var with_backward
"""
INSIDE = {
    "quantize": """
        VectorQuantized bsq ceil clip fake_quant fake_quant_affine floor fsq lfq lsq
        lsq_init round trunc vector_quantize
    """,
    "recurrent": "truncated_scan",
    "sample": """
        bernoulli bernoulli_given categorical categorical_given gumbel_rao
        gumbel_rao_given gumbel_softmax gumbel_softmax_given reinmax reinmax_given
        top_k_mask
    """,
    "score": "dice leave_one_out magic_box score_loss",
    "surrogate": """
        approx_sign atan boxcar exponential fast_sigmoid gaussian hard_tanh identity
        leaky multi_gaussian sigmoid sign spike swish_sign triangle
    """,
    "train": "State Step fit make_step",
}


def test_a_prompt_completes_what_is_public_and_nothing_else():
    assert dir(sg) == NAMES.split()
    for name, inside in INSIDE.items():
        assert dir(getattr(sg, name)) == inside.split()


def test_there_is_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", sg.__version__)
    assert importlib.metadata.version("stopgrad_jax") == sg.__version__


# A user's file: each line that ends in a comment is a mistake, and no other is.
USERS = """
import jax
import jax.numpy as jnp
import optax
import stopgrad_jax as sg


def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(sg.straight_through(jnp.round)(w) * x)


w, x = jnp.ones(2), jnp.ones(2)
sg.gradients(loss, "w", unconnected_gradients="zero")(w, x)
sg.gradients(loss, "w", unconnected_gradients="zeros")(w, x)  # word
sg.gradients(loss, "w")(w)  # argument
sg.gradients("loss", "w")  # function
value, grads = sg.value_and_gradients(loss, "w")(w, x)
value.shapes  # attribute
y, values = sg.capture(loss, "h")(w, x)
y.sum() + values["h"]
sg.edit(loss, {"h": jnp.round})(w, y=x)  # keyword
flow = sg.flow(loss)(w, x)
flow.inputs
flow.input  # attribute
flow.to_svg(theme="dark")
flow.to_svg(theme="black")  # word
flow.to_svg(direction="down")  # word
report = sg.find_nonfinite(loss)(w, x)
report.hint  # None
if report is not None:
    report.hint.upper()
    report.hints  # attribute
sg.check_gradients(loss, modes=("fwd", "rev"))(w, x)
sg.check_gradients(loss, modes=("forward",))  # word
sg.check_gradients(loss, order=3)  # number
stats: dict[str, sg.Stats] = sg.gradient_stats(loss, "w")(w, x)
stats["w"].norm + stats["w"].zero_fraction
stats["w"].norms  # attribute
sg.quantize.fsq(w, (3, 3), variant="paper")
sg.quantize.fsq(w, (3, 3), variant="papers")  # word
sg.quantize.vector_quantize(w, x, gradient="rotated")  # word
sg.quantize.vector_quantize(w, x).indexes  # attribute
sg.sample.bernoulli(jax.random.key(0), w, "sigmoids")  # word
step = sg.train.make_step(loss, optax.sgd(0.1), nonfinite="skip", untrained="freeze")
sg.train.make_step(loss, optax.sgd(0.1), nonfinite="drop")  # word
sg.train.make_step(loss, optax.sgd(0.1), untrained="frozen")  # word
state = step.init(w)
state.params, state.opt_state, state.step
state, history = sg.train.fit(step, state, x, steps=1)
state.parameters  # attribute
sg.train.fit(step, state, x, steps=1.5)  # number
frozen = sg.stop_gradient(w, 0.5)
frozen.mean()
frozen.mead()  # attribute
where: sg.Where = "w"
address: sg.Address = sg.op("sin", within="f", nth=0)
address = 0.5  # address
"""


def test_a_type_checker_knows_what_comes_and_what_goes(tmp_path):
    pytest.importorskip("pyright")
    path = tmp_path / "users.py"
    path.write_text(textwrap.dedent(USERS))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    said = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, timeout=300
    ).stdout
    found = {int(line) for line in re.findall(r"users\.py:(\d+):\d+ - error", said)}
    lines = enumerate(path.read_text().splitlines(), 1)
    planted = {number for number, line in lines if re.search(r"  # \w+$", line)}
    assert found == planted, said
