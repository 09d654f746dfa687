"""Every file that a document names is there, and every relative link leads somewhere."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)  # fmt: skip
SOURCE = (".py", ".cpp", ".h", ".md", ".toml", ".sh", ".service")
OTHERS = {"core_eval.py", "tools/benchmarks/results/gpu-DATE"}  # not in the tree, or not always
HIDDEN = {"__pycache__", "node_modules", "build", "dist"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree() -> frozenset[str]:
    """Every file and folder below the root, hidden ones and build results left out."""
    found, waiting = set(), [ROOT]
    while waiting:
        for path in waiting.pop().iterdir():
            if path.name.startswith(".") or path.name in HIDDEN:
                continue
            found.add(name_of(path))
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)
    return frozenset(found)


def mentions(text: str) -> Iterator[str]:
    """What stands between backticks and looks like a file or folder of ours."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    tops = {each.split("/")[0] for each in tree() if "/" in each}
    for quoted in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if not re.fullmatch(r"[\w.*/+-]+", quoted) or quoted.startswith(("-", "/", ".", "*")):
            continue
        in_tree = "/" in quoted and quoted.split("/")[0] in tops
        if quoted not in OTHERS and (in_tree or quoted.endswith(SOURCE)):
            yield quoted


def exists(mention: str) -> bool:
    """A path from the root, or the end of one: `worker.py`, `engine/pool.py`, `*/worker.py`."""
    pattern = re.escape(mention.rstrip("/")).replace(r"\*", "[^/]*")
    return any(re.search(rf"(^|/){pattern}$", each) for each in tree())


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


HISTORY = ROOT / "CHANGELOG.md"  # names files as they were then


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each != HISTORY], ids=name_of)
def test_files_that_a_document_names_are_there(document: Path) -> None:
    named = mentions(document.read_text(encoding="utf-8"))
    assert not sorted({each for each in named if not exists(each)})


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = document.parent / path if path else document
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            broken += [] if anchor in anchors(target.read_text(encoding="utf-8")) else [link]
    assert not broken


def test_the_look_for_missing_files_finds_them() -> None:
    text = (
        "`router/router.py` `worker.py` `*/worker.py` `router/gone.py` `gone.py` `test.txt` `a b`"
    )
    named = list(mentions(text))
    assert named == ["router/router.py", "worker.py", "router/gone.py", "gone.py"]
    assert [each for each in named if not exists(each)] == ["router/gone.py", "gone.py"]
