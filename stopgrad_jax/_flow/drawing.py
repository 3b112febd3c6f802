"""What can be drawn: as a picture, in a drawing language, in a page."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
from typing import Any

from stopgrad_jax._errors import wrong
from stopgrad_jax._page import Page

from .dot import to_dot, to_mermaid
from .model import Picture
from .render import has_engine, image_html, to_png, to_svg
from .shrink import merged, too_big
from .theme import Direction, ThemeName

_MOST = 300  # steps that are still drawn


class Drawing:
    """What can be drawn from its `picture`, and told by its `text`."""

    picture: Picture
    text: Page

    def __str__(self) -> str:
        return str(self.text)

    __repr__ = __str__

    def __rich__(self) -> Any:
        return self.text.__rich__()

    def to_dot(self, *, theme: ThemeName = "light", direction: Direction = "TB") -> str:
        """Return the picture in Graphviz' language."""
        return to_dot(self._merged(), theme=theme, direction=direction)

    def to_mermaid(self, *, direction: Direction = "TB") -> str:
        """Return the picture in Mermaid's language, for a README."""
        return to_mermaid(self._merged(), direction=direction)

    def to_svg(self, *, theme: ThemeName = "light", direction: Direction = "TB") -> str:
        """Return the picture as SVG, laid out by Graphviz.

        Raises:
          RuntimeError: there is no Graphviz; `pip install stopgrad_jax[viz]` has one.
          ValueError: there are more than 300 steps to draw.
        """
        return to_svg(self.to_dot(theme=theme, direction=direction), self.alt)

    @property
    def alt(self) -> str:
        """The picture in a sentence, for who cannot see it."""
        return self.picture.title

    def to_dict(self) -> dict[str, Any]:
        """Return the picture as plain values."""
        return {"version": 1, **dataclasses.asdict(self.picture)}

    def to_html(self) -> str:
        """Return a page with the picture and the text."""
        title = html.escape(self.picture.title)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}'
            f"</title><body>{self._image()}{''.join(p.html for p in self._pages())}"
            "</body></html>\n"
        )

    def save(
        self, path: str, *, theme: ThemeName = "light", direction: Direction = "TB"
    ) -> pathlib.Path:
        """Write it to a file: .svg, .png, .dot, .mmd, .html, .json or .txt.

        Returns:
          The path.

        Raises:
          ValueError: another ending.
        """
        target = pathlib.Path(path)
        looks: Any = {"theme": theme, "direction": direction}
        match target.suffix:
            case ".svg":
                target.write_text(self.to_svg(**looks), encoding="utf-8")
            case ".png":
                dot = self.to_dot(**looks)
                target.write_bytes(to_png(dot, to_svg(dot, self.alt)))
            case ".dot":
                target.write_text(self.to_dot(**looks), encoding="utf-8")
            case ".mmd":
                text = self.to_mermaid(direction=direction)
                target.write_text(text, encoding="utf-8")
            case ".html":
                target.write_text(self.to_html(), encoding="utf-8")
            case ".json":
                text = json.dumps(self.to_dict(), indent=1)
                target.write_text(text, encoding="utf-8")
            case ".txt":
                target.write_text(self.text.plain + "\n", encoding="utf-8")
            case other:
                raise wrong(
                    ValueError,
                    f"save({str(path)!r})",
                    "a file that ends in .svg, .png, .dot, .mmd, .html, .json or .txt",
                    other or "a name without an ending",
                    'save("flow.svg")',
                )
        return target

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict:
        return {
            "text/plain": self.text.plain,
            "text/html": self._image() + self.text.html,
        }

    def _pages(self) -> list[Page]:
        return [self.text]

    def _image(self) -> str:
        if not has_engine() or too_big(merged(self.picture), _MOST):
            return ""
        return image_html(self.to_svg(), self.alt)

    def _merged(self) -> Picture:
        picture = merged(self.picture)
        if too_big(picture, _MOST):
            raise wrong(
                ValueError,
                "a picture of it",
                f"at most {_MOST} steps to draw",
                f"{len(picture.steps)}",
                'flow.focus("...") for one input, flow.between(a, b) for a part; '
                "print(flow) and flow.source() have no limit",
            )
        return picture
