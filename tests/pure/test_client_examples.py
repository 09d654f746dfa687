"""examples/clients stays whole: each client has its pins, a script that says what it shows, and a place
in the document that the runner wrote with these pins."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "clients"
DOCUMENT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
DAY = date(2026, 11, 30)


def module(name: str) -> Any:
    """One of the runner's two files, which are no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


report: Any = module("report")
runner: Any = module("run")
for each in ("report", "run"):
    del sys.modules[each]
CLIENTS = {client.name: client for client in runner.clients()}


def test_every_folder_is_a_client() -> None:
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert set(CLIENTS) == folders
    assert len(CLIENTS) > 20


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_a_client_is_pinned_and_its_outcome_kept(name: str) -> None:
    client = CLIENTS[name]
    assert client.shows.endswith(".")
    assert runner.CHAT not in client.shows
    versions = runner.versions(client)
    if (requirements := client.folder / "requirements.txt").is_file():
        locked = (client.folder / "lock.txt").read_text().lower().replace("_", "-").splitlines()
        for line in requirements.read_text().splitlines():
            pin = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?==([\w.]+)", line)
            assert pin, f"{line} is no pin"
            assert f"{pin[1].lower()}=={pin[3]}" in locked
    if (package := client.folder / "package.json").is_file():
        wanted = json.loads(package.read_text())["dependencies"]
        assert all(re.fullmatch(r"\d[\w.-]*", version) for version in wanted.values())
        lock = client.folder / "package-lock.json"
        if lock.is_file():
            assert json.loads(lock.read_text())["packages"][""]["dependencies"] == wanted
            assert "resolved" not in lock.read_text(), "names the registry of one machine"
    if client.script.suffix == ".py":
        compile(client.script.read_text(), client.script.name, "exec")
    (row,) = re.findall(rf"^\| \[{name}\]\(#{name}\) \| .*$", DOCUMENT, re.MULTILINE)
    assert f"| {versions} | {client.shows} |" in row, "run it again with --docs docs/clients.md"
    assert row.endswith("| works |")
    assert f"\n## {name}\n" in DOCUMENT


def test_the_document_has_no_client_that_is_gone() -> None:
    assert set(re.findall(r"^\| \[([\w-]+)\]\(#", DOCUMENT, re.MULTILINE)) == set(CLIENTS)


def shown(name: str, **changes: Any) -> Any:
    facts = {
        "name": name, "shows": "Something.", "versions": f"{name} 1.0", "model": "demo",
        "worked": True, "seconds": 1.0, "said": "hello",
    }  # fmt: skip
    return report.Report(**facts | changes)


def test_a_run_replaces_the_clients_earlier_one_and_no_other() -> None:
    first = report.with_report("", shown("b"), DAY)
    both = report.with_report(first, shown("a", said="## noheading\n\n<!-- none -->"), DAY)
    again = report.with_report(both, shown("b", versions="b 2.0", worked=False), DAY)
    assert both.startswith("# ")
    assert re.findall(r"^\| \[(\w)\].*\| (\w+) \|$", again, re.MULTILINE) == [
        ("a", "works"),
        ("b", "fails"),
    ]
    assert again.count("\n## a\n") == again.count("\n## b\n") == 1
    assert "b 1.0" not in again
    assert report.with_report(again, shown("b"), DAY) == both


def test_long_wide_and_coloured_output_is_cut() -> None:
    said = "\x1b[31mred\x1b[0m\r\n" + "x" * 1000 + "\n```\n" + "line\n" * 100
    lines = report.shortened(said).splitlines()
    assert lines[0] == "red"
    assert len(lines) == report.MOST_LINES + 1
    assert max(map(len, lines)) <= report.MOST_COLUMNS
    assert "```" not in lines
    assert "... 63 lines ..." in lines


def test_a_client_that_does_not_end_is_ended_with_all_that_it_started(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The child holds the output open."""
    script = "echo begun; tail -f /dev/null & wait"
    words, env = ["sh", "-c", script], {"PATH": os.environ["PATH"]}
    *before, last = (found := runner.output_of(words, cwd="/", env=env, timeout_s=0.3))[0]
    assert last == "ended: it did not finish within 0.3 s (--timeout)"
    assert before in (["begun"], [])  # a busy machine may not have begun
    assert capfd.readouterr().out.split() == before
    assert found[1] != 0
    assert runner.output_of(["echo", "done"], cwd="/", env=env, timeout_s=PATIENCE_S) == (
        ["done"],
        0,
    )


def test_a_client_that_is_not_there_is_named() -> None:
    script = FOLDER / "run.py"
    found = subprocess.run(
        [sys.executable, str(script), "nobody"], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert found.returncode == 2
    assert "no client nobody; there are ai-sdk, " in found.stderr


def test_a_client_sees_nothing_of_this_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "private")
    args = type("Args", (), {"url": "http://x", "api_key": "k", "tokenizer": tmp_path})()
    seen = runner.variables(CLIENTS["openai"], tmp_path, args, "demo")
    assert "private" not in json.dumps(seen)
    assert seen["OPENAI_BASE_URL"] == "http://x/v1"
    assert seen["HOME"].startswith(str(tmp_path))
