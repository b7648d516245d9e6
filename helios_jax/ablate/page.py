"""Writes a page as Markdown with pictures beside it, and as one HTML file that has all inside.

The HTML file fetches nothing and runs nothing. Whatever stands in a block is text, never markup.
"""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
from etils import epath

from helios_jax.train import report


class Grid(NamedTuple):
    """A table."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A PNG, and the sentences below it."""

    file: str  # its name, beside the Markdown
    png: bytes
    caption: str

    @property
    def inlined(self) -> str:
        return f'data:image/png;base64,{base64.b64encode(self.png).decode()}'


class Verbatim(NamedTuple):
    """Text that keeps its lines, such as a command."""

    text: str


class Section(NamedTuple):
    """A heading, and what stands below it; a plain string is a paragraph."""

    title: str
    blocks: Sequence[str | Grid | Picture | Verbatim]


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { color: #444; font-size: 0.85rem; }
pre { background: #f4f4f4; padding: 0.6rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{% if block is string %}
<p>{{ block }}</p>
{% elif block.png %}
<figure><img src="{{ block.inlined }}" alt="{{ section.title }}">
<figcaption>{{ block.caption }}</figcaption></figure>
{% elif block.head %}
<div><table>
<tr>{% for cell in block.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in block.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% else %}
<pre>{{ block.text }}</pre>
{% endif %}
{% endfor %}
{% endfor %}
</body>
</html>
"""


def write(directory: epath.PathLike, title: str, sections: Sequence[Section]) -> epath.Path:
    """Writes report.md, its pictures and report.html into a directory; returns the first's path."""
    directory = epath.Path(directory)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                (directory / block.file).write_bytes(block.png)
    (directory / 'report.html').write_text(to_html(title, sections))
    path = directory / 'report.md'
    path.write_text(to_markdown(title, sections))
    return path


def to_html(title: str, sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(title=title, sections=sections) + '\n'


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    pieces = [f'# {_escaped(title)}']
    for section in sections:
        pieces.append(f'## {_escaped(section.title)}')
        pieces += [_markdown(section, block) for block in section.blocks]
    return '\n\n'.join(pieces) + '\n'


def _markdown(section: Section, block: str | Grid | Picture | Verbatim) -> str:
    match block:
        case Grid(head, rows):
            lines = [head, ['---'] * len(head), *rows]
            return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)
        case Picture(file, _, caption):
            return f'![{_escaped(section.title)}]({file})\n\n{_escaped(caption)}'
        case Verbatim(text):
            return report.fenced(text)
        case _:
            return _escaped(block)


def _cell(text: str) -> str:
    return report.cell(_escaped(text))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
