"""Failpoints: off without the variable; on, they act once, at the right hit, in one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from baton import failpoint
from baton.failpoint import ACTIONS, FIRED, MESSAGES, ONLY_AT, SITES, VARIABLE, Point, parse
from baton.wire import messages
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, points: str | None) -> subprocess.CompletedProcess[str]:
    """A process that runs `program` after importing failpoint as f."""
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if points is not None:
        environment[VARIABLE] = points
    return subprocess.run(
        [sys.executable, "-c", f"from baton import failpoint as f\n{program}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def test_nothing_is_armed_without_the_variable() -> None:
    every = "".join(f"f.hit({site!r}, lambda: 1 / 0)\n" for site in sorted(SITES))
    ran = run(f"assert f._ARMED is None\n{every}f.messages('sending', 3)\nprint('alive')", None)
    assert (ran.returncode, ran.stdout) == (0, "alive\n"), ran.stderr
    assert run("assert f._ARMED is None", "").returncode == 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_it_acts_at_the_nth_hit(number: int) -> None:
    program = "for i in range(4):\n    print(i, flush=True)\n    f.hit('decode.step')"
    ran = run(program, f"decode.token:kill:1,decode.step:kill:{number}")
    assert ran.returncode == -signal.SIGKILL
    assert ran.stdout.split() == [str(i) for i in range(number)]


def test_another_site_and_a_later_hit_change_nothing() -> None:
    assert run("f.hit('decode.step')", "decode.token:kill:1,decode.step:kill:2").returncode == 0


def test_messages_are_sites_by_their_kind() -> None:
    program = "from baton.wire.messages import *\nf.messages('received', [Renew(()), Cancel('r')])"
    assert run(program, "sending.Cancel:kill:1,received.Filled:kill:1").returncode == 0
    assert run(program, "received.Cancel:kill:1").returncode == -signal.SIGKILL


def test_memory_is_changed_in_place() -> None:
    memory = bytearray(8)
    armed = failpoint.Armed([parse("prefill.stamp:damage:2")], None)
    armed.hit("prefill.stamp", lambda: memory)
    assert memory == bytes(8)
    armed.hit("prefill.stamp", lambda: memory)
    assert sum(byte.bit_count() for byte in memory) == 1
    armed.hit("prefill.stamp", lambda: 1 / 0)
    numbers = [1.0, 2.0]

    class Row:
        def __setitem__(self, where: slice, value: float) -> None:
            numbers[where] = [value] * len(numbers)

    failpoint.Armed([parse("decode.kv:nan:1")], None).hit("decode.kv", Row)
    assert all(number != number for number in numbers)


def test_at_every_nth_hit() -> None:
    memory = bytearray(1)
    armed = failpoint.Armed([parse("prefill.stamp:damage:%3")], None)
    before, changed = bytes(memory), []
    for i in range(1, 10):
        armed.hit("prefill.stamp", lambda: memory)
        if memory != before:
            changed.append(i)
        before = bytes(memory)
    assert changed == [3, 6, 9]


def test_a_file_arms_a_running_process_and_one_of_two_acts(tmp_path: Path) -> None:
    first, second = (failpoint.read({VARIABLE: f"@{tmp_path}"}) for _ in range(2))
    assert first is not None
    assert second is not None
    memory = bytearray(8)
    first.hit("prefill.stamp", lambda: memory)
    for armed in (first, second):
        (tmp_path / "prefill.stamp:damage:2").touch()
        first.hit("prefill.stamp", lambda: memory)
        second.hit("prefill.stamp", lambda: memory)
        assert memory == bytes(8)
        armed.hit("prefill.stamp", lambda: memory)
        assert memory != bytes(8), "the counts began with the file"
        memory[:] = bytes(8)
        for each in (first, second):
            each.hit("prefill.stamp", lambda: memory)
            each.hit("prefill.stamp", lambda: memory)
        assert memory == bytes(8), "it acted twice"
    lines = [json.loads(line) for line in (tmp_path / FIRED).read_text().splitlines()]
    assert [(each["site"], each["action"], each["pid"]) for each in lines] == [
        ("prefill.stamp", "damage", os.getpid())
    ] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode.stepp:kill:1", "no site 'decode.stepp'"),
        ("decode.step:explode:1", "no action 'explode'"),
        ("decode.step:kill:0", "nth must be at least 1"),
        ("decode.step:kill", "SITE:ACTION:NTH"),
        ("decode.step:kill:one", "invalid literal"),
        ("decode.step:delay:1:nan", "seconds"),
        ("decode.step:damage:1", "works at prefill.payload, prefill.stamp"),
        ("@/nonexistent", "existing folder"),
    ],
)
def test_an_unknown_failpoint_ends_the_process_at_its_start(text: str, words: str) -> None:
    ran = run("print('went on')", text)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: BATON_FAILPOINTS: ")
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_point_is_written_as_it_is_read() -> None:
    for text in ("decode.step:kill:1", "decode.step:wedge:%7", "decode.step:delay:2:0.5"):
        assert str(parse(text)) == text
    assert parse("decode.step:delay:2:0.5") == Point("decode.step", "delay", 2, seconds=0.5)


def test_every_site_is_in_the_code_and_nothing_else_is() -> None:
    quoted, used = re.compile(r"\"((?:worker|prefill|decode|follower|server)\.\w+)\""), set()
    for folder in ("baton", "router", "prefill_worker", "decode_worker"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name != "failpoint.py" and "failpoint" in text:
                used |= set(quoted.findall(text))
    assert used == {site for site in SITES if not site.startswith(("received.", "sending."))}
    assert set(MESSAGES) <= set(dir(messages))


def test_actions_that_need_memory_name_their_sites() -> None:
    assert set(ONLY_AT) == {"nan", "damage", "oom"}
    assert set(ACTIONS) > set(ONLY_AT)
