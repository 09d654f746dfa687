"""The documentation as a site: what mkdocs.yml names, what its hook rewrites, what is drawn for it."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import baton
from tools.lab import minute
from tools.lab.report import slug
from tools.site import anchor, outside, rewritten

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def named(nav: Any) -> Iterator[str]:
    """The documents of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from named(each)


def test_the_navigation_names_every_document_exactly_once() -> None:
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(named(CONFIG["nav"])) == sorted(there)


def test_a_newcomer_reads_what_it_is_before_how_it_works() -> None:
    order = list(named(CONFIG["nav"]))
    wanted = [
        "index.md",
        "one-minute.md",
        "install.md",
        "tutorial.md",
        "serving.md",
        "architecture.md",
    ]
    assert [each for each in order if each in wanted] == wanted


def test_the_site_is_strict_and_loads_nothing_from_the_network() -> None:
    assert CONFIG["strict"] is True
    assert set(CONFIG["validation"]["links"].values()) == {"warn"}  # which strict makes errors
    assert CONFIG["theme"]["highlightjs"] is False
    assert CONFIG["theme"]["name"] in ("readthedocs", "mkdocs")  # others take fonts from a CDN
    assert not [each for each in CONFIG["extra_css"] if ":" in each]


def test_the_reference_describes_everything_that_the_package_offers() -> None:
    directives = [
        line.removeprefix("::: ")
        for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    ]
    offered = {each: getattr(baton, each) for each in baton.__all__}
    assert {f"{each.__module__}.{each.__qualname__}" for each in offered.values()} <= set(
        directives
    )


def test_the_sites_tools_are_pinned_as_the_rest_is() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        wanted = [Requirement(line) for line in lines if line and line[0] not in "#-"]
        return {each.name.lower(): str(each.specifier) for each in wanted}

    ours, docs = (
        pins("requirements.txt") | pins("requirements-dev.txt"),
        pins("requirements-docs.txt"),
    )
    assert all(version.startswith("==") for version in docs.values())
    assert {n: ours[n] for n in docs.keys() & ours.keys()} == {
        n: docs[n] for n in docs.keys() & ours.keys()
    }


# ---- links to files of the repository


@pytest.mark.parametrize(
    ("source", "target", "path"),
    [
        ("a.md", "../baton/x.py", "baton/x.py"),
        ("a.md", "../README.md#run-it", "README.md"),
        ("decisions/0001.md", "../../router/y.py", "router/y.py"),
        ("a.md", "../deploy", "deploy"),
        ("decisions/0001.md", "../a.md", None),
        ("a.md", "b.md#c", None),
        ("a.md", "#here", None),
        ("a.md", "../docs/b.md", None),
        ("a.md", "https://example.org/../x", None),
        ("a.md", "mailto:a@b", None),
        ("a.md", "/x", None),
    ],
)
def test_only_what_lies_outside_the_documents_is_outside(
    source: str, target: str, path: str | None
) -> None:
    assert outside(source, target) == path


CODE = "```sh\n[a](../b.py)\n```\n\n    [c](../d.py)\n"
HOME = "https://example.org/me/baton/"


@pytest.mark.parametrize(
    ("text", "alone", "with_home"),
    [
        ("see [`baton/x.py`](../baton/x.py).", "see `baton/x.py`.",
         "see [`baton/x.py`](https://example.org/me/baton/blob/main/baton/x.py)."),
        ("[the map](../README.md#run-it)", "the map (`README.md`)",
         "[the map](https://example.org/me/baton/blob/main/README.md#run-it)"),
        ("[a](b.md) and [c](../d.py)", "[a](b.md) and c (`d.py`)",
         "[a](b.md) and [c](https://example.org/me/baton/blob/main/d.py)"),
        (CODE, CODE, CODE),
        ("    code\n\n[a](../b.py)", "    code\n\na (`b.py`)",
         "    code\n\n[a](https://example.org/me/baton/blob/main/b.py)"),
        ("![drawn](../b.png)", "![drawn](../b.png)", "![drawn](../b.png)"),
    ],
)  # fmt: skip
def test_a_link_to_outside_leads_to_the_repository_or_is_shown_as_code(
    text: str, alone: str, with_home: str
) -> None:
    assert rewritten(text, "a.md", None) == alone
    assert rewritten(text, "a.md", "") == alone
    assert rewritten(text, "a.md", HOME) == with_home


@pytest.mark.parametrize("document", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_no_document_links_to_outside_in_a_way_that_the_hook_misses(document: Path) -> None:
    source = document.relative_to(DOCS).as_posix()
    text = rewritten(document.read_text(encoding="utf-8"), source, None)
    assert rewritten(text, source, HOME) == text  # nothing is left to rewrite


@pytest.mark.parametrize(
    "heading",
    ["KV cache: on & off", "`make docs`, again", "P/D: a – b", "14. Is it right, is it fast"],
)
def test_headings_have_githubs_anchors(heading: str) -> None:
    assert anchor(heading) == slug(heading)
    assert anchor("KV cache: on & off") == "kv-cache-on--off"


# ---- docs/one-minute.svg


def lines() -> list[str]:
    def record(arm: str, tokens: int, arrived: float, at: list[float], turn: int = 0) -> str:
        return json.dumps(
            {"what": "tokens", "arm": arm, "round": turn, "prompt_tokens": tokens,
             "arrived": arrived, "at": at}
        )  # fmt: skip

    return [
        json.dumps({"what": "idle", "arm": "P/D"}),
        record("P/D", 2048, 1.0, [4.0, 4.1]),
        record("P/D", 2048, 0.5, [3.0, 3.1]),
        record("P/D", 16, 0.0, [0.2, 0.3, 0.4, 9.0]),
        record("P/D", 16, 0.0, [0.2, 5.0], turn=1),
        record("colocated", 2048, 0.5, [2.0]),
        record("colocated", 16, 0.0, [0.2, 1.9]),
    ]


def test_the_first_long_prompt_and_the_streams_of_the_first_round_are_drawn() -> None:
    apart, together = minute.arms(lines())
    assert (apart.prompt.arrived, len(apart.streams)) == (0.5, 1)
    assert apart.longest == pytest.approx(0.1)  # what comes after the picture's end is not in it
    assert together.longest == pytest.approx(1.7)
    with pytest.raises(ValueError, match="no tokens of colocated"):
        minute.arms(lines()[:-2])


def test_the_picture_is_that_of_the_recorded_run() -> None:
    text = minute.picture(minute.arms(minute.RUN.read_text(encoding="utf-8").splitlines()))
    assert text == minute.PICTURE.read_text(encoding="utf-8"), "run: python -m tools.lab.minute"


def test_the_picture_is_whole_where_nothing_is_animated_and_loads_nothing() -> None:
    text = minute.picture(minute.arms(lines()))
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    shown = root.find(f".//{space}clipPath/{space}rect")
    assert shown is not None
    assert int(shown.attrib["width"]) == minute.WIDTH - minute.LEFT - minute.RIGHT
    motion = shown.find(f"{space}animate")
    assert motion is not None
    assert motion.attrib["fill"] == "freeze"  # once, then it stays
    assert "repeatCount" not in motion.attrib
    assert "href" not in text
    about = root.findtext(f"{space}desc", "")
    assert "0.100 s (apart, " in about
    assert "1.70 s (together, " in about
