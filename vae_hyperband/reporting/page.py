"""HTML pages that load nothing, from Jinja2 templates that escape whatever they are given."""

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

WEB = Path(__file__).with_name("web")

Data = dict[str, Any]  # what a template or a script is given


@dataclass(frozen=True)
class Picture:
    """An inline PNG; ``about`` is its text alternative, ``caption`` stands below it."""

    source: str
    about: str
    caption: str = ""

    @classmethod
    def of(cls, image: Image.Image, about: str, caption: str = "") -> "Picture":
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return cls(_data_url(buffer.getvalue()), about, caption)

    @classmethod
    def drawn(cls, draw: Callable[[Path], Path], about: str) -> "Picture":
        """``draw`` writes the picture to the path it is given."""
        with tempfile.TemporaryDirectory() as folder:
            return cls(_data_url(draw(Path(folder) / "picture.png").read_bytes()), about)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def render(
    template: Path,
    values: Data,
    css: Path,
    scripts: Sequence[str],
    allowed: Mapping[str, str] | None = None,
) -> str:
    """A whole page, which extends page.html.jinja.

    Its style is that of all pages, then ``css``. Its Content-Security-Policy allows its own scripts
    and style, inline pictures, and what ``allowed`` adds, by directive.
    """
    style = "".join(path.read_text(encoding="utf-8") for path in (WEB / "base.css", css))
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(map(_csp_digest, scripts)),
        "style-src": _csp_digest(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for directive, source in (allowed or {}).items():
        policy[directive] += f" {source}"
    environment = Environment(
        loader=FileSystemLoader([template.parent, WEB]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters["json"] = json.dumps
    words = "; ".join(f"{directive} {sources}" for directive, sources in policy.items())
    page = environment.get_template(template.name)
    return page.render(policy=words, css=style, scripts=scripts, **values)


def _csp_digest(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
