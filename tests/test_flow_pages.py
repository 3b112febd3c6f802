"""How a flow is shown: colour, ASCII, HTML, notebooks, files, hostile text."""

import io
import json
import linecache
import sys
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import models
import pytest

import stopgrad_jax as sg
from stopgrad_jax._page import page

pytestmark = pytest.mark.usefixtures("usual_settings")
HOSTILE = '</pre><script>alert("x")</script> & \x1b[31m "quoted" \\ `tick` \u202e'


@pytest.fixture
def flow():
    return sg.flow(models.ddqn_loss, xs=["online", "target"])(*models.ARGS["ddqn_loss"])


class Terminal(io.StringIO):
    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return True


def test_colour_only_on_a_terminal(flow, monkeypatch):
    assert "\x1b" not in str(flow)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b[" in str(flow)
    assert "\x1b[" in repr(flow.source())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(flow)


def test_ascii_where_the_stream_has_no_bars(flow, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal("ascii"))
    text = str(flow.source())
    assert text.isascii()
    assert "| gradient flows" in text
    assert "x cut on this line" in text
    assert ": no gradient arrives" in text


def test_control_characters_of_a_source_do_not_reach_the_terminal():
    made = page([[(HOSTILE, "cut")]])
    assert "\x1b[31m" not in made.ansi
    assert "\u202e" not in made.plain
    assert "\\x1b[31m" in made.plain


def hostile_function():
    """A function whose names and source text try to break out."""
    text = f"def f(p):\n    h = p['{{}}'] * 2  # {HOSTILE.encode('unicode_escape')}\n"
    text += "    return jnp.sum(jnp.round(h))\n"
    file = '<b onload="x">&.py'
    name = "</text><script>"
    text = text.replace("{}", name)
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    space = {"jnp": jnp}
    exec(compile(text, file, "exec"), space)
    return space["f"], {name: jnp.ones(3)}


def test_hostile_names_are_escaped_in_every_format(tmp_path):
    fun, params = hostile_function()
    flow = sg.flow(fun)(params)
    bundle = flow._repr_mimebundle_()
    for text in (bundle["text/html"], flow.to_html()):
        assert "<script>" not in text
        assert 'onload="' not in text
    ET.fromstring(flow.to_svg())
    assert "<script>" not in flow.to_mermaid()
    assert json.loads(json.dumps(flow.to_dict()))["name"] == "f"
    flow.save(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_notebook_shows_one_picture_and_the_table(flow):
    bundle = flow._repr_mimebundle_()
    assert bundle["text/html"].count("<img ") == 1
    assert 'src="data:image/svg+xml;base64,' in bundle["text/html"]
    assert "target cut" in bundle["text/html"].split(" src=")[0]
    assert "<pre style=" in bundle["text/html"]
    assert bundle["text/plain"] == flow.text.plain
    assert bundle == flow._repr_mimebundle_()  # so that notebooks do not churn
    assert "<img " in flow.focus("target")._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("ending", ["svg", "png", "dot", "mmd", "html", "json", "txt"])
def test_files(flow, tmp_path, ending):
    target = flow.save(str(tmp_path / f"flow.{ending}"))
    start = {
        "svg": b"<svg",
        "png": b"\x89PNG",
        "dot": b"digraph",
        "mmd": b"flowchart",
        "html": b"<!doctype html>",
        "json": b"{",
        "txt": b"gradient flow of ddqn_loss",
    }[ending]
    assert start in target.read_bytes()[:200]


def test_too_big_a_picture_says_how_to_narrow_it():
    source = "def f(x):\n"
    for k in range(400):
        source += f"    h{k} = jax.lax.stop_gradient(x) * x\n"
    source += "    return " + " + ".join(f"h{k}" for k in range(400)) + "\n"
    linecache.cache["big.py"] = (len(source), None, source.splitlines(True), "big.py")
    space = {"jax": jax}
    exec(compile(source, "big.py", "exec"), space)
    flow = sg.flow(space["f"])(1.0)
    assert len(flow.cuts) == 400
    with pytest.raises(ValueError, match=r"flow\.focus"):
        flow.to_svg()
    assert "<img" not in flow._repr_mimebundle_()["text/html"]
