"""What MkDocs does not do by itself; mkdocs.yml names this file.

Pages that lie elsewhere in the repository (PROMISES.md, the notebook ...), links that are right
both there and on the site, and formulas without a script of another host.
"""

import base64
import itertools
import json
import os.path
import posixpath
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

#: Pages that are files outside of docs/, or no Markdown.
PAGES = {
    "pretrained.md": "vae_hyperband/pretrained/README.md",
    "promises.md": "PROMISES.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "code-of-conduct.md": "CODE_OF_CONDUCT.md",
    "records.md": "benchmarks/RECORDS.md",
    "notebook.md": "vae_hyperband/model.ipynb",
    "options.md": "docs/help.txt",
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yml": "yaml"}  # of files that get a page
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")

#: Paths in the repository by the page or file of the site that has them, and the reverse.
sources: dict[str, str] = {}
places: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and every file of the repository that a page links to."""
    sources.clear()
    shown = [uri for uri in files.src_uris if not config.exclude_docs.match_file(uri)]
    sources.update({uri: f"docs/{uri}" for uri in shown})
    for uri, source in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".ipynb"):
            text = _notebook(text, files, config)
        elif source.endswith(".txt"):
            text = _options(text)
        files.append(File.generated(config, uri, content=text))
        sources[uri] = source
    places.clear()
    places.update({source: uri for uri, source in sources.items()})
    places["README.md"] = "index.md"
    for uri in [uri for uri in sources if uri.endswith(".md")]:
        for target, _ in LINK.findall(files.src_uris[uri].content_string):
            path = _in_repository(target, sources[uri])
            if path not in places and (ROOT / path).is_file():
                file = _linked(path, config)
                files.append(file)
                places[path] = file.src_uri
    return files


def _linked(path: str, config: MkDocsConfig) -> File:
    """A file that is no page of its own: code as a page with its lines numbered, data as it is."""
    language = LANGUAGES.get(Path(path).suffix)
    if language is None:
        return File.generated(config, path, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text()
    page = (
        f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n"
        f'# `{path}`\n\n````{language} linenums="1"\n{text}````\n'
    )
    uri = f"source/{path.removeprefix('.')}.md"  # some servers do not show hidden folders
    return File.generated(config, uri, content=page, inclusion=InclusionLevel.NOT_IN_NAV)


def _options(text: str) -> str:
    """The help of each command, as a section of its own."""
    parts = re.split(r"^\$ (.+) --help\n", text, flags=re.MULTILINE)[1:]
    commands = zip(parts[::2], parts[1::2], strict=True)
    return "---\nhide: [navigation]\n---\n# All options\n\n" + "\n".join(
        f"## {name.removeprefix('vae-hyperband ')}\n\n```text\n{said.rstrip()}\n```\n"
        for name, said in commands
    )


def _notebook(text: str, files: Files, config: MkDocsConfig) -> str:
    """The notebook as Markdown, its pictures as files; nothing is executed."""
    parts, pictures = [], itertools.count(1)
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif picture := output.get("data", {}).get("image/png"):
                uri = f"notebook-{next(pictures)}.png"
                picture = base64.b64decode("".join(picture))
                files.append(File.generated(config, uri, content=picture))
                parts.append(f"![What this cell draws]({uri})")
    return "\n\n".join(parts)


def _in_repository(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Include sections of other files, and let links lead to the site's own pages."""
    uri = page.file.src_uri
    if uri not in sources:  # the code that a page links to
        return markdown

    def included(match: re.Match[str]) -> str:
        path, anchor = match.groups()
        source = _in_repository(path, sources[uri])
        return _with_links(_section(source, anchor), source, uri)

    markdown = _with_links(markdown, sources[uri], uri)
    return re.sub(r"<!-- include: (\S+)#(\S+) -->", included, markdown)


def _section(source: str, anchor: str) -> str:
    """A section of second level, with its heading."""
    for section in re.split(r"^(?=## )", (ROOT / source).read_text(), flags=re.MULTILINE)[1:]:
        if section.splitlines()[0].removeprefix("## ").lower().replace(" ", "-") == anchor:
            return section
    raise PluginError(f"{source} has no section {anchor}")


def _with_links(text: str, source: str, uri: str) -> str:
    """A text of the repository's file ``source`` with links from the site's page ``uri``."""

    def linked(match: re.Match[str]) -> str:
        target, anchor = match.groups(default="")
        path = _in_repository(target, source)
        place = places.get(path)
        if place is None:
            return match[0]  # MkDocs reports it
        return f"]({os.path.relpath(place, posixpath.dirname(uri) or '.')}{anchor})"

    return LINK.sub(linked, text)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; and what docstrings name, ``:func:`fit```, as code or a link."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]), display=display)

    html = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>', formula, html, flags=re.DOTALL
    )
    public = set(re.findall(r'id="vae_hyperband\.(\w+)"', html))

    def named(match: re.Match[str]) -> str:
        short = match[1].rpartition(".")[2]
        code = f"<code>{short}</code>"
        return f'<a href="#vae_hyperband.{short}">{code}</a>' if short in public else code

    return re.sub(r":\w+:<code>~?([\w.]+)</code>", named, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The site works without a network: refuse a page that loads something from elsewhere."""
    found = re.search(
        r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="?(?:https?:)?//[^>]*>', output
    )
    if found:
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output
