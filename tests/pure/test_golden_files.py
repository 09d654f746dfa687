"""The files that a job writes, frozen to the byte for fixed answers: txt, jsonl, the lines of run-batch,
and the journal of an interrupted job, which a later version must be able to resume.

The jobs run through the command line, with a fake router (pretend_router.py). No model computes anything,
so the files are the same on every machine.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# ---- the only imports of ours: the program, and where its job meets a router or a server
import baton.offline.run as job_module
import baton.offline.run_batch as batch_module
from baton.cli import main as program
from baton.client.http import Reply
from baton.offline.interrupts import Interrupted
from tests.pure.golden import check, recorded
from tests.pure.pretend_router import PretendRouter, link_through

PROMPTS = ("Once upon", "Zwei »龍«\nund 🙂", '"quoted" \\ and\ttabbed', "\u2028 odd")
JOB = (
    "--router",
    "ipc://pretend/r",
    "--prompts",
    "prompts.jsonl",
    "-l",
    "3",
    "--seed",
    "7",
    "-b",
    "1",
)
TIMED = r'("\w+_s"|"\w+_bytes"): [0-9.e-]+'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts; no signal handlers."""
    monkeypatch.setattr(program, "turned_into_exceptions", nullcontext)
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"prompt": prompt}) for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(
    monkeypatch: pytest.MonkeyPatch, *words: str, router: PretendRouter | None = None, code: int = 0
) -> PretendRouter:
    """The job without a command."""
    router = router or PretendRouter()
    monkeypatch.setattr(job_module, "link_to", link_through(router))
    assert program.main([*JOB, "-o", "out", "--quiet", *words]) == code
    return router


def lines_of(file: Path) -> list[str]:
    return file.read_bytes().decode().split("\n")


def broken_off(after: int) -> Callable[[PretendRouter], None]:
    """Interrupts at this turn."""
    polls = iter(range(after))

    def before_turn(_: PretendRouter) -> None:
        if next(polls, None) is None:
            raise Interrupted("SIGINT")

    return before_turn


def journal_of_two_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What a job leaves that was interrupted at its third prompt."""
    run(monkeypatch, router=PretendRouter(before_turn=broken_off(12)), code=130)
    return (folder / "out.part").read_bytes()


def test_output_files_are_as_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name, words in {
        "txt": (),
        "jsonl": ("--format", "jsonl"),
        "jsonl, timings": ("--format", "jsonl", "--timings"),
    }.items():
        run(monkeypatch, *words)
        found[name] = [re.sub(TIMED, r"\1: 0", each) for each in lines_of(folder / "out")]
    journal = journal_of_two_answers(folder, monkeypatch).decode()
    found["journal of two answers"] = journal.split("\n")
    check("files.json", found)


def test_a_recorded_journal_is_taken_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = recorded("files.json")
    (folder / "out.part").write_bytes("\n".join(golden["journal of two answers"]).encode())
    line = run(monkeypatch, "--format", "jsonl")
    assert [each.prompt for each in line.submitted] == list(PROMPTS[2:])
    assert lines_of(folder / "out") == golden["jsonl"]


# ---- run-batch


ASKED: tuple[tuple[str, Mapping[str, Any], Reply], ...] = (
    (
        "/v1/completions",
        {"prompt": "Once", "max_tokens": 2},
        Reply(200, {"id": "cmpl-1", "choices": [{"index": 0, "text": " «龍» \n"}]}, "cmpl-1"),
    ),
    (
        "/v1/chat/completions",
        {"messages": []},
        Reply(400, {"error": {"message": "no", "type": "invalid_request_error"}}, "r-2"),
    ),
)


@dataclass
class PretendServing:
    """A server with fixed replies."""

    @property
    def http(self) -> "PretendServing":
        return self

    def ask(self, path: str, body: Mapping[str, Any]) -> Reply:
        (reply,) = (each for url, given, each in ASKED if (url, given) == (path, body))
        return reply

    def supervise(self) -> None:
        pass


def test_lines_of_a_batch_are_as_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serving_cluster(*_: object, **__: object) -> Iterator[PretendServing]:
        yield PretendServing()

    monkeypatch.setattr(batch_module, "serving_cluster", serving_cluster)
    asked = [
        {"custom_id": f"q{index}", "method": "POST", "url": url, "body": body}
        for index, (url, body, _) in enumerate(ASKED)
    ]
    (folder / "in.jsonl").write_text("\n".join(json.dumps(each) for each in asked))
    assert program.main(["run-batch", "in.jsonl", "out.jsonl"]) == 0
    lines = [
        re.sub(r"batch_req_[0-9a-f]{16}", "batch_req_<16 hex>", each)
        for each in lines_of(folder / "out.jsonl")
    ]
    check("batch.json", {"asked": asked, "lines": lines})
