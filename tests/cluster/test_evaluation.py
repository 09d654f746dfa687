"""`python main.py eval` as it is typed: in process and through a server, to the same numbers."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import Terminal, short_folder, terminals, until

TEXT = "In an ancient castle, there is a hidden clock. Nobody has ever heard it strike. " * 20
PAIRS = [
    {"prompt": "In the future, artificial intelligence will", "reference": "learn to cook"},
    {"prompt": "On a distant planet, aliens are", "references": ["asleep", "awake at last"]},
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with short_folder() as folder, terminals() as type_in:
        served: Terminal = type_in("main.py", "serve", "--port", 0, TMPDIR=str(folder))
        found = until(lambda: re.search(r"listening on (\S+);", served.said), "the port")
        until(lambda: "ready " in served.said or not served.runs(), "the server")
        yield found[1]
        served.signal(signal.SIGTERM)
        served.ends(0, 20)


def evaluated(folder: Path, *arguments: object) -> dict[str, Any]:
    """What it writes."""
    with terminals() as type_in:
        file = folder / "found.json"
        type_in("main.py", "eval", *arguments, "--json", file).ends(0)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def test_a_server_and_the_engine_give_the_same_numbers(url: str, tmp_path: Path) -> None:
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text(TEXT)
    pairs.write_text("".join(json.dumps(each) + "\n" for each in PAIRS))
    for arguments in (
        ("perplexity", "--text", text, "--window", 128, "--stride", 50),
        ("generation", "--data", pairs, "--max-new-tokens", 20),
        ("core", "--max-per-task", 8),
    ):
        here = evaluated(tmp_path, *arguments)
        there = evaluated(tmp_path, *arguments, "--url", url)
        assert here["subject"]["asked"] == "in process"
        assert there["subject"]["asked"] == url
        match arguments[0]:
            case "perplexity":
                one, other = here["perplexity"], there["perplexity"]
                assert one["bits"] == pytest.approx(other["bits"], rel=1e-5)
                assert (one["tokens"], one["spans"]) == (other["tokens"], other["spans"])
            case "generation":
                assert here["generation"]["texts"] == there["generation"]["texts"]
                assert here["generation"]["bleu"] == there["generation"]["bleu"]
            case "core":
                assert verdicts(here) == pytest.approx(verdicts(there), abs=1e-4)


def verdicts(found: dict[str, Any]) -> list[float]:
    """Every loss and every verdict."""
    return [
        float(each)
        for task in found["core"]["tasks"]
        for verdict in task["verdicts"]
        for each in (verdict["right"], *verdict["losses"])
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "http://127.0.0.1:1"), ("no server answers", "main.py serve")),
        (("perplexity", "--device", "cpu", "--url", "http://x"), ("--device is of use not with",)),
        (("core", "--served-model", "x"), ("--served-model is of use only with --url",)),
        (("core", "--bundle", "/nowhere"), ("core.yaml cannot be read",)),
        (("--json", "/nowhere/x.json"), ("there is no folder",)),
        (("perplexity", "--model", "demoo"), ("did you mean demo",)),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with terminals() as type_in:
        terminal = type_in("main.py", "eval", *arguments)
        assert terminal.process.wait(60) in (2, 3)
        assert terminal.said.startswith("error: "), terminal.said
        assert terminal.said.count("\n") == 1, terminal.said
        for each in words:
            assert each in terminal.said
