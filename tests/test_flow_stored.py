"""A flow that is copied or stored; source that is not in a plain file."""

import copy
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import models
import pytest

import stopgrad_jax as sg

pytestmark = pytest.mark.usefixtures("usual_settings")


@pytest.fixture(scope="module")
def flow():
    return sg.flow(models.vqvae_loss, xs="params")(*models.ARGS["vqvae_loss"])


def test_copies_are_the_same(flow):
    assert copy.copy(flow) is flow
    assert copy.deepcopy({"flow": flow})["flow"] is flow


@pytest.mark.parametrize("times", [1, 2])
def test_what_it_prints_is_stored(flow, times):
    stored = flow
    for _ in range(times):
        stored = pickle.loads(pickle.dumps(stored))
    assert stored == flow
    assert str(stored) == str(flow)
    assert str(stored.source()) == str(flow.source())
    assert str(stored.explain()) == str(flow.explain())
    assert str(stored.explain("params/enc")) == str(flow.explain("params/enc"))
    assert stored.to_dot() == flow.to_dot()
    assert stored.to_dict() == flow.to_dict()


def test_what_needs_the_program_is_refused(flow):
    stored = pickle.loads(pickle.dumps(flow))
    asks = [
        lambda: stored.focus("params/enc"),
        lambda: stored.between("params/enc", "return"),
        lambda: stored.connected("params/enc"),
        lambda: stored.explain("params/enc/w0"),
    ]
    for ask in asks:
        with pytest.raises(TypeError, match=r"has no program\n  write: ") as caught:
            ask()
        assert '"params/enc"' in str(caught.value)


def test_a_view_is_stored(flow):
    view = flow.focus("params/codebook")
    assert str(pickle.loads(pickle.dumps(view))) == str(view)


def test_arguments_that_are_not_traced():
    flow = sg.flow(lambda n, name: jnp.ones(n).sum())(3, "x")
    assert "no input to differentiate by: n is an int, name is a str" in str(flow)
    assert "xs=" not in str(flow)


def test_source_inside_a_zip(tmp_path):
    archive = tmp_path / "packed.zip"
    text = "import jax\n\n\ndef loss(w):\n    q = jax.numpy.round(w)\n    return q\n"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("packed_loss.py", text)
    program = (
        f"import sys; sys.path.insert(0, {str(archive)!r})\n"
        "import packed_loss, stopgrad_jax as sg\n"
        "print(sg.flow(packed_loss.loss)(1.0).explain('w'))\n"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert "5 | q = jax.numpy.round(w)" in done.stdout, done.stderr
    assert "| ^^^^" not in done.stdout
    assert "packed_loss.py:5 in loss()" in done.stdout


def test_a_notebook_shows_carets_under_their_letters(flow):
    html = flow.explain("params/codebook")._repr_html_()
    assert "font-family:" in html
    assert "monospace" in html


# What the pages on points say ---------------------------------------------------------


def test_a_query_of_an_edited_function_sees_the_value_before_the_edit():
    f = lambda x: sg.name(x * 2.0, "h") * 3.0
    edited = sg.edit(f, {"h": lambda h: h * 5.0})
    out, values = sg.capture(edited, "h")(1.0)
    assert (out, values["h"]) == (30.0, 2.0)
    assert sg.gradients(edited, "h")(1.0) == 15.0
    # An edit of a function that captures there changes what is captured, too.
    out, values = sg.edit(sg.capture(f, "h"), {"h": lambda h: h * 5.0})(1.0)
    assert (out, values["h"]) == (30.0, 10.0)


def test_a_loop_that_is_unrolled_has_a_tuple():
    def loop(x):
        step = lambda c, _: (sg.name(c * 2.0, "h"), None)
        return jax.lax.scan(step, x, None, length=3)[0]

    assert sg.capture(loop, "h")(1.0)[1]["h"].tolist() == [2.0, 4.0, 8.0]
    with jax.disable_jit():
        assert sg.capture(loop, "h")(1.0)[1]["h"] == (2.0, 4.0, 8.0)


def test_examples_are_along_the_axis_where_jax_keeps_them():
    f = lambda column: jnp.sum(sg.name(column * 2.0, "h"))
    x = jnp.ones((2, 3))
    assert sg.capture(jax.vmap(f), "h")(x)[1]["h"].shape == (2, 3)
    by_column = sg.capture(jax.vmap(f, in_axes=1), "h")(x)[1]["h"]
    assert by_column.shape == (2, 3)  # three examples, along the second axis
