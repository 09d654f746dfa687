"""Page: the report's Markdown as one HTML page. Pure; only the Markdown that report.py writes.

Everything is escaped before any mark-up is made, because a report quotes text that a model wrote.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from tools.lab.report import slug

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { border-top: 1px solid var(--line); padding-top: 1.5rem; }
table { border-collapse: collapse; font-size: .875rem; } .wide { overflow-x: auto; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
.right { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: #fff; border-radius: 4px; } figure { margin: 1.5rem 0 .25rem; }
pre, blockquote { background: var(--soft); border-radius: 4px; margin: 1rem 0; padding: .6rem 1rem; }
pre { overflow-x: auto; } code { font-size: .9em; }
"""
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
"""


def page(markdown: str) -> str:
    """The whole page. Its title is the first heading."""
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "Report")
    body = "\n".join(_block(each) for each in _blocks(markdown))
    return HEAD.format(title=escape(title), style=STYLE) + body + "\n</body>\n</html>\n"


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Lines between empty lines."""
    for filled, lines in groupby(markdown.splitlines(), key=lambda line: bool(line.strip())):
        if filled:
            yield list(lines)


def _block(lines: Sequence[str]) -> str:
    first = lines[0]
    if heading := re.fullmatch(r"(#{1,6}) (.*)", first):
        level, text = len(heading[1]), heading[2]
        return f'<h{level} id="{escape(slug(text))}">{_inline(text)}</h{level}>'
    if first.startswith("| "):
        return _table(lines)
    if first.startswith(("* ", "- ")):
        return "<ul>\n" + "\n".join(f"<li>{_item(line[2:])}</li>" for line in lines) + "\n</ul>"
    if first.startswith(">"):
        quoted = "<br>\n".join(_text(line.removeprefix(">").strip()) for line in lines)
        return f"<blockquote>{quoted}</blockquote>"
    if first.startswith("    "):
        return f"<pre><code>{_text(chr(10).join(line[4:] for line in lines))}</code></pre>"
    if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", first):
        return f'<figure><img alt="{escape(picture[1])}" src="{escape(picture[2])}"></figure>'
    return f"<p>{_inline(' '.join(lines))}</p>"


def _item(text: str) -> str:
    """A list item, perhaps with a box that is checked or not."""
    for mark, sign in (("[x] ", "☑ "), ("[ ] ", "☐ ")):
        if text.startswith(mark):
            return sign + _inline(text.removeprefix(mark))
    return _inline(text)


def _table(lines: Sequence[str]) -> str:
    header, rule, *rows = (_cells(line) for line in lines)
    right = [each.strip().endswith(":") for each in rule]
    body = "\n".join(f"<tr>{_row('td', row, right)}</tr>" for row in rows)
    head = f"<tr>{_row('th', header, right)}</tr>"
    return f'<div class="wide" tabindex="0"><table>\n{head}\n{body}\n</table></div>'


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
    return [cell.strip().replace("\\|", "|") for cell in cells]


def _row(tag: str, cells: Iterable[str], right: Sequence[bool]) -> str:
    marks = [' class="right"' if each else "" for each in right]
    return "".join(
        f"<{tag}{mark}>{_inline(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=False)
    )


def _inline(text: str) -> str:
    """Code, links, bold, italic."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        f"<code>{_text(part[1:-1])}</code>"
        if part.startswith("`") and len(part) > 2
        else _marks(part)
        for part in parts
    )


def _marks(text: str) -> str:
    found = _text(text)
    found = re.sub(r"\[([^\]]+)\]\(([#\w][^)\s:]*)\)", r'<a href="\2">\1</a>', found)
    found = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", found)
    return re.sub(r"(?<![\w*])\*(\S.*?)\*(?!\*)", r"<em>\1</em>", found)


def _text(text: str) -> str:
    return escape(text)
