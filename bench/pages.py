"""A result file as two pages beside it: Markdown with plots in files, and one HTML page with everything inside."""

from __future__ import annotations

import base64
import html
import io
from importlib.util import find_spec
from pathlib import Path

from . import plots, scaling
from .tables import TABLES, Content

TITLES = {
    "time": "Time against length",
    "memory": "Memory against length",
    "roofline": "Roofline",
    "ratios": "Ratios to peers",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: 2px 7px; text-align: left; white-space: nowrap; }
th { background: #f2f2f2; } img { max-width: 100%; }
"""


def write(result: Path, content: Content) -> list[Path]:
    """Writes the pages beside ``result`` under its name, and the plots; the paths of the two pages."""
    pictures = drawn(content)
    stem, folder = result.stem, result.with_suffix("")
    names = {name: f"{stem}/{name}.png" for name in pictures}
    if pictures:
        folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture)
    inlined = {name: "data:image/png;base64," + base64.b64encode(p).decode() for name, p in pictures.items()}
    pages = result.with_suffix(".md"), result.with_suffix(".html")
    pages[0].write_text(markdown(content, names))
    pages[1].write_text(as_html(markdown(content, inlined)))
    return list(pages)


def drawn(content: Content) -> dict[str, bytes]:
    """Every plot as PNG; none where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return {}
    found = {}
    for name, figure in plots.figures(content).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        found[name] = picture.getvalue()
    return found


def markdown(content: Content, pictures: dict[str, str]) -> str:
    """The page: plots, then tables; ``pictures`` says where each plot is."""
    about = content["machine"]
    parts = [f"# Benchmarks: {about['device']}, {content['started'][:10]}, commit {about['commit']}"]
    if not pictures:
        parts.append("There are no plots: matplotlib is not installed (pip install 'omnimamba[bench]').")
    parts += [f"## {TITLES[name]}\n\n![{TITLES[name]}]({where})" for name, where in pictures.items()]
    parts += [f"## {name.capitalize()}\n\n{text}" for name, make in TABLES.items() if (text := make(content))]
    model = scaling.summary(content)
    return "\n\n".join([*parts, *([f"## Scaling model\n\n{model}"] if model else [])]) + "\n"


def as_html(page: str) -> str:
    """What ``markdown`` writes, headings, tables, pictures and paragraphs, as one HTML document."""
    title = page.splitlines()[0].lstrip("# ")
    body = "\n".join(_block(block) for block in page.split("\n\n"))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>\n{body}\n</body></html>\n"


def _block(block: str) -> str:
    text = html.escape(block.strip())
    if block.startswith("#"):
        level = len(block) - len(block.lstrip("#"))
        return f"<h{level}>{text.lstrip('# ')}</h{level}>"
    if block.startswith("!["):
        name, where = text[2:-1].split("](", 1)
        return f'<img alt="{name}" src="{where}">'
    if block.startswith("|"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        cells = ["".join(f"<{kind}>{c}</{kind}>" for c in row) for kind, row in _kinds(rows)]
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"
    return f"<p>{text}</p>"


def _kinds(rows: list[list[str]]) -> list[tuple[str, list[str]]]:
    """The header's cells and the others', without the line of dashes between."""
    return [("th", rows[0]), *(("td", row) for row in rows[2:])]
