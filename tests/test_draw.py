"""Pictures: DOT, mermaid, SVG, PNG, and the merging of big ones."""

import base64
import re
import shutil
import xml.etree.ElementTree as ET

import pytest

from stopgrad_jax._flow import render
from stopgrad_jax._flow.dot import to_dot, to_mermaid
from stopgrad_jax._flow.model import Box, Edge, Picture, Site, Step
from stopgrad_jax._flow.theme import LINES, THEMES, clean, node_lines

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = {
    "quotes": "say \"hi\" and 'ho'",
    "backslash": "a\\nb\\N\\",
    "newline": "two\nlines\r\n",
    "script": "<script>alert(1)</script>",
    "ampersand": "a &amp; b &lt; c & d",
    "unicode": "αβγ_漢字_é",
    "control": "bell\x07null\x00lone\ud800",
    "long": "x" * 500,
    "keyword": "subgraph",
    "mermaid end": 'end %%{init: {}}%% ["]`;#35;',
    "mermaid style": "style:x classDef:y#1;",
    "cdata": "<![CDATA[ ]]>",
    "html label": "<b>bold</b>",
    "empty": "",
}


def site(line, file="models.py"):
    return Site(file, line, 4, line, 20, "vqvae_loss", "", "user")


def arrows(text):
    """Edges from `0>1 flow, 1>2 cut`."""
    parts = [re.split("[> ]", part.strip()) for part in text.split(",")]
    return tuple(Edge(int(a), int(b), status) for a, b, status in parts)


def step(number, kind, label, type="", line=None, **more):
    more.setdefault("flows", kind != "cut")
    return Step(number, kind, label, type, site=line and site(line), **more)


def small():
    """One path that flows and one that is cut."""
    steps = (
        step(0, "input", "w", "f32[3]"),
        step(1, "step", "y", "f32[]", 2),
        step(2, "cut", "stop_gradient", line=3, reason="stop_gradient"),
        step(3, "output", "output", "f32[]"),
    )
    edges = arrows("0>1 flow, 1>2 cut, 1>3 flow, 2>3 value")
    return Picture("w can get a gradient.", steps, edges, ())


def vqvae():
    """The VQ-VAE loss."""
    why = "stop_gradient"
    steps = (
        step(0, "input", "params/enc", "4 leaves, 2,344 values"),
        step(1, "input", "params/codebook", "f32[16,8]"),
        step(2, "input", "params/dec", "4 leaves, 2,400 values"),
        step(3, "input", "x", "f32[4,64]", data=True, flows=False),
        step(4, "step", "z_e", "f32[4,8]", 30, callee="encoder()"),
        step(5, "step", "d", "f32[4,16]", 17, box=0, flows=False),
        step(6, "cut", "idx", "i32[4]", 20, detail="argmin returns int32", box=0),
        step(7, "step", "z_q", "f32[4,8]", 21, detail="returned by quantise()", box=0),
        step(8, "cut", why, line=32, reason=why),
        step(9, "step", "z_st", "f32[4,8]", 32),
        step(10, "step", "x_hat", "f32[4,64]", 33, callee="decoder()"),
        step(11, "step", "recon", "f32[]", 34),
        step(12, "cut", why, line=35, reason=why),
        step(13, "step", "codebook_loss", "f32[]", 35),
        step(14, "cut", why, line=36, reason=why),
        step(15, "step", "commit", "f32[]", 36),
        step(16, "step", "return", "f32[]", 37),
        step(17, "output", "output", "f32[]"),
    )
    edges = """0>4 flow, 3>4 value, 1>5 shadow, 4>5 shadow, 5>6 cut, 6>7 value,
        1>7 flow, 7>8 cut, 4>8 cut, 8>9 value, 4>9 flow, 9>10 flow, 2>10 flow,
        10>11 flow, 3>11 value, 4>12 cut, 12>13 value, 7>13 flow, 7>14 cut,
        14>15 value, 4>15 flow, 11>16 flow, 13>16 flow, 15>16 flow, 16>17 flow"""
    title = "vqvae_loss: params/enc, params/codebook and params/dec get a gradient."
    return Picture(title, steps, arrows(edges), (Box(0, "quantise()", site(31)),))


def gated():
    """A gate, a replaced rule, a loop, and an input without a gradient."""
    steps = (
        step(0, "input", "params/features", "4 leaves, 2,344 values"),
        step(1, "input", "params/domain", "f32[8,2]"),
        step(2, "input", "target", "f32[8,2]", flows=False),
        step(3, "step", "h", "f32[4,8]", 12, callee="dense()", repeat=12),
        step(4, "gate", "h_rev", "f32[4,8]", 13, detail="scale -0.5"),
        step(5, "replace", "h_q", "f32[4,8]", 14, detail="rule: rules.py:12"),
        step(6, "step", "domain_loss", "f32[]", 15),
        step(7, "step", "label_loss", "f32[]", 16),
        step(8, "cut", "stop_gradient", line=17, reason="stop_gradient"),
        step(9, "output", "output", "f32[]"),
    )
    edges = """0>3 flow, 3>4 gate, 4>6 flow, 1>6 flow, 3>5 replace, 5>7 flow,
        6>9 flow, 7>9 flow, 2>8 cut, 8>7 value"""
    return Picture("dann_loss: target gets no gradient.", steps, arrows(edges), ())


def texts(svg, tag):
    return [element.text for element in ET.fromstring(svg).iter(SVG + tag)]


PICTURES = {"small": small(), "vqvae": vqvae(), "gated": gated()}


@pytest.fixture(params=list(PICTURES))
def picture(request):
    return PICTURES[request.param]


@pytest.fixture
def no_program(monkeypatch):
    """No `dot` on the PATH: the wheel has to do it."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_dot_of_a_small_picture():
    skin = 'style="rounded,filled", penwidth=1.5, color="#0072B2"'
    text = 'fontcolor="#1A1A1A"]'
    size = "height=0.7778, fixedsize=true"
    assert to_dot(small()).splitlines()[4:12] == [
        r'  s0 [class=input, label="w\nf32[3]\ncan get a gradient", width=2.0556,'
        f' {size}, {skin}, fillcolor="#E1F0FA", {text}',
        rf'  s1 [class=step, label="y\nf32[]\nmodels.py:2", width=1.3056, {size},'
        f' {skin}, fillcolor="#FFFFFF", {text}',
        r'  s2 [class=cut, label="stop_gradient\ncut: on purpose\nmodels.py:3",'
        f' width=1.7778, {size}, style="rounded,filled,dashed", penwidth=1.5,'
        f' color="#D55E00", fillcolor="#FDEBDF", {text}',
        r'  s3 [class=output, label="output\nf32[]", width=1.0000, height=0.5833,'
        ' fixedsize=true, style="filled", penwidth=1.5, color="#1A1A1A",'
        ' fillcolor="#1A1A1A", fontcolor="#FFFFFF"]',
        "  s0 -> s1 [style=solid, penwidth=2.2, arrowhead=normal,"
        ' color="#0072B2", weight=4]',
        "  s1 -> s2 [style=dashed, penwidth=1.8, arrowhead=tee,"
        ' color="#D55E00", weight=1]',
        "  s1 -> s3 [style=solid, penwidth=2.2, arrowhead=normal,"
        ' color="#0072B2", weight=4]',
        "  s2 -> s3 [style=dotted, penwidth=1.1, arrowhead=vee,"
        ' color="#8A8A8A", weight=1]',
    ]


@pytest.mark.parametrize("theme", list(THEMES))
@pytest.mark.parametrize("direction", ["TB", "LR"])
def test_svg_holds_every_line_of_every_node(picture, theme, direction, no_program):
    svg = render.to_svg(to_dot(picture, theme=theme, direction=direction), "seen")
    lines = {line for one in picture.steps for line in node_lines(one)}
    assert lines <= set(texts(svg, "text"))
    assert THEMES[theme].card.lower() in svg


def test_svg_is_the_same_each_time_and_names_no_version(picture, no_program):
    dot = to_dot(picture)
    first = render.to_svg(dot, picture.title)
    assert first == render.to_svg(to_dot(picture), picture.title)
    assert "raphviz" not in first
    assert "<!" not in first


def test_svg_speaks(no_program):
    svg = render.to_svg(to_dot(small()), 'w & "v" <b>')
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'w & "v" <b>'
    # no other title: those of nodes and edges would be read out as s0, s1
    assert texts(svg, "title") == ['w & "v" <b>']


@pytest.mark.parametrize("name", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_names_are_shown_as_they_are(name, no_program):
    evil = Site(name or "f.py", 1, 0, 1, 1, name, name, "user")
    steps = tuple(
        Step(i, kind, name, name, name, name, evil, box=0, flows=True)
        for i, kind in enumerate(("input", "step", "cut", "replace", "gate", "output"))
    )
    picture = Picture(name, steps, arrows("0>1 flow, 1>2 cut"), (Box(0, name, evil),))
    svg = render.to_svg(to_dot(picture), name)
    root = ET.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "rect", "g", "text", "path", "polygon", "ellipse", "polyline")
    }
    assert node_lines(steps[1])[0] in texts(svg, "text")
    assert all(len(word) <= 80 for word in texts(svg, "text"))
    image = render.image_html(svg, name)
    assert image.count("<") == image.count(">") == 1
    assert image.count('"') == 6
    assert_mermaid_is_plain(to_mermaid(picture), len(steps))


def assert_mermaid_is_plain(text, steps):
    """No label can end its quotes, start a directive or open a tag."""
    nodes = [line for line in text.splitlines() if re.match(r" +s\d+\W+\"", line)]
    assert len(nodes) == steps
    for line in nodes:
        assert line.count('"') == 2
        label = line.split('"')[1].replace("<br/>", "")
        assert not set("<>`%{}\\") & set(label)
        assert "style" not in label


def test_names_on_one_line():
    assert clean(" a\n\tb ") == "a b"
    assert clean("a\x00\ud800b") == "a\ufffd\ufffdb"


@pytest.mark.parametrize("theme", list(THEMES))
def test_never_colour_alone(theme):
    looks = [(style, width, head) for style, width, head, _ in LINES.values()]
    assert len(set(looks)) == len(looks)
    dot = re.sub("#[0-9A-F]{6}", "#", to_dot(gated(), theme=theme))
    skins = {
        re.search(rf"class={kind}.*?(style=.*)\]", dot).group(1)
        for kind in ("cut", "gate", "replace", "step", "output")
    }
    assert len(skins) == 5


@pytest.mark.parametrize(
    ("kind", "more", "lines"),
    [
        ("cut", {"reason": "integer"}, ["cut: integers carry no gradient"]),
        ("cut", {"detail": "argmin returns int32"}, ["cut: argmin returns int32"]),
        ("cut", {}, ["cut"]),
        ("gate", {"detail": "scale 0.5"}, ["gate: scale 0.5"]),
        ("replace", {"detail": "rule: m.py:1"}, ["replaced · rule: m.py:1"]),
        ("input", {"type": "f32[]"}, ["f32[]", "can get a gradient"]),
        ("input", {"flows": False}, ["no gradient"]),
        ("input", {"flows": False, "data": True}, ["data"]),
        ("step", {"repeat": 12, "line": 3}, ["x12", "models.py:3"]),
        ("step", {"type": "i32[]", "flows": False}, ["no gradient · i32[]"]),
    ],
)
def test_words_of_a_node(kind, more, lines):
    assert node_lines(step(0, kind, "a", **more)) == ["a", *lines]


def test_legend_has_what_occurs_and_no_more():
    dot = to_dot(small())
    occurs = {edge.status for edge in small().edges}
    for status, (*_, words) in LINES.items():
        assert (words in dot) == (status in occurs)
    assert "cluster_key" not in to_dot(Picture("one", small().steps[:1], (), ()))
    assert to_dot(Picture("nothing", (), (), ()))


def test_boxes_are_nested():
    boxes = (Box(0, "outer()", site(1)), Box(1, "inner()", None, parent=0))
    picture = Picture("t", (step(0, "step", "a", box=1),), (), boxes)
    dot = to_dot(picture)
    assert dot.index("cluster_0") < dot.index("cluster_1") < dot.index("s0 [")
    mermaid = to_mermaid(picture)
    assert mermaid.index('b0 ["outer()') < mermaid.index('b1 ["inner()"]')
    assert mermaid.count("end\n") == 2


def test_mermaid_of_a_small_picture():
    assert to_mermaid(small(), direction="LR").splitlines()[:10] == [
        "flowchart LR",
        "  accTitle: w can get a gradient.",
        '  s0(["w<br/>f32[3]<br/>can get a gradient"]):::input',
        '  s1("y<br/>f32[]<br/>models.py:2"):::step',
        '  s2("stop_gradient<br/>cut: on purpose<br/>models.py:3"):::cut',
        '  s3["output<br/>f32[]"]:::output',
        "  s0 ==> s1",
        "  s1 --x s2",
        "  s1 ==> s3",
        "  s2 -.-> s3",
    ]


@pytest.mark.parametrize(
    ("draw", "option", "value"),
    [
        (to_dot, "theme", "pink"),
        (to_dot, "direction", "LR]"),
        (to_mermaid, "direction", "XX"),
    ],
)
def test_unknown_options(draw, option, value):
    with pytest.raises(
        ValueError, match=rf'{option} is "\w+" or (.|\n)*write: {option}="'
    ):
        draw(small(), **{option: value})


def test_image_holds_the_whole_svg(no_program):
    svg = render.to_svg(to_dot(small()), "seen")
    data = re.search('base64,([^"]*)"', render.image_html(svg, "seen")).group(1)
    assert base64.b64decode(data).decode() == svg
