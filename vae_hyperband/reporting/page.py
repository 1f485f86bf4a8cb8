"""Parts of HTML pages that load nothing: sections, facts, tables, inline pictures."""

import base64
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from PIL import Image

from vae_hyperband.reporting.tables import Table

WEB = Path(__file__).with_name("web")


def quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def wide(name: str, rows: str) -> str:
    """A table that scrolls sideways where the page is narrower than it."""
    return f'<div class="wide" role="group" aria-label="{escape(name)}"><table>{rows}</table></div>'


def facts(name: str, values: Mapping[str, object]) -> str:
    """Two columns: a name, and its value as text or JSON."""
    rows = "".join(
        f'<tr><th scope="row">{escape(fact.replace("_", " "))}</th>'
        f'<td class="code">{escape(value if isinstance(value, str) else json.dumps(value))}</td>'
        "</tr>"
        for fact, value in values.items()
    )
    return wide(name, f"<tbody>{rows}</tbody>")


def table(content: Table) -> str:
    # the corner above the rows' names heads no column
    head = "<td></td>" + "".join(
        f'<th scope="col" class="number">{escape(name)}</th>' for name in content.head[1:]
    )
    kind = ' class="number"' if content.head else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in content.rows
    )
    above = f"<thead><tr>{head}</tr></thead>" if content.head else ""
    return wide(content.title, f"{above}<tbody>{rows}</tbody>")


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def facts_section(title: str, values: Mapping[str, object]) -> str:
    return section(title, facts(title, values))


def inline_figure(draw: Callable[[Path], Path], about: str) -> str:
    """An inline picture; ``draw`` writes it to the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        return figure(draw(Path(folder) / "picture.png").read_bytes(), "", about)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def figure(picture: bytes, caption: str, about: str) -> str:
    """An inline PNG; ``about`` is its text alternative."""
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(f"{about}, {caption}" if caption else about)
    return f'<figure><img src="{source}" alt="{alt}">{below}</figure>'


def page(title: str, head: str, sections: list[str]) -> str:
    """A whole report, whose Content-Security-Policy allows only its own script and style."""
    css, script = style(WEB / "report.css"), (WEB / "report.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {csp_digest(css)}; script-src {csp_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in head.splitlines())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lines}</header>\n"
        f"<main>\n{chr(10).join(sections)}\n</main>\n"
        f"<footer>Made by vae-hyperband.</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def style(own: Path) -> str:
    """A page's style sheet: what all pages have, then its own."""
    return "".join(path.read_text(encoding="utf-8") for path in (WEB / "base.css", own))


def csp_digest(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
