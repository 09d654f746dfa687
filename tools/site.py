"""Site: what mkdocs cannot do with our documents by itself. A hook of mkdocs.yml.

The documents are written for the repository, and link to files outside docs/. In the site such a link
leads to the repository if mkdocs.yml names one (repo_url); else the path is shown as code, as there is
nowhere to lead to. A picture outside docs/ is left as it is, and fails the strict build. Headings get the
anchors that GitHub gives them.
"""

import posixpath
import re
from typing import Any

DOCS = "docs"
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$|^    [^\n]*$)", re.MULTILINE | re.DOTALL)


def outside(source: str, target: str) -> str | None:
    """The repository's path of a link's target, if that is a file outside docs/. `source`: the document's
    path below docs/."""
    path = target.partition("#")[0]
    if not path or path.startswith("/") or re.match(r"[a-z]+:", path):
        return None
    full = posixpath.normpath(posixpath.join(DOCS, posixpath.dirname(source), path))
    return None if full == DOCS or full.startswith(DOCS + "/") else full


def rewritten(text: str, source: str, repository: str | None) -> str:
    """The document with its links to outside made true in the site. Boxes of code stay as they are."""

    def link(found: re.Match[str]) -> str:
        path = outside(source, found["target"])
        if path is None:
            return found[0]
        if repository:
            anchor = found["target"].partition("#")[1:]
            return f"[{found['text']}]({repository.rstrip('/')}/blob/main/{path}{''.join(anchor)})"
        return found["text"] if path in found["text"] else f"{found['text']} (`{path}`)"

    parts = FENCE.split(text)
    return "".join(part if FENCE.fullmatch(part) else LINK.sub(link, part) for part in parts)


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a heading."""
    kept = (each for each in heading.strip().lower() if each.isalnum() or each in "-_ ")
    return "".join(kept).replace(" ", separator)


# ---- what mkdocs calls. Its types are not known here: it is installed for `make docs` alone


def on_config(config: Any) -> Any:
    """Anchors."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links."""
    return rewritten(markdown, page.file.src_uri, config.repo_url)
