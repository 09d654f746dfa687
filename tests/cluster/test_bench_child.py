"""The processes of `bench engine`'s arms: answers, failures, and their end."""

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.benchmarks.child import Child

PEERS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "peers"
ARM = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(PEERS)!r})
from lines import serve

class Arm:
    def load(self, folder, dtype, threads):
        if dtype == "int8":
            raise ValueError("no int8 here\\nand more of it")
        if dtype == "wordless":
            raise MemoryError
        if dtype == "dies":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if dtype == "forks and dies":
            if os.fork():
                os._exit(3)
            signal.pause()
        if dtype == "sleeps":
            signal.pause()

    def generate(self, prompts, new):
        print("on stdout", flush=True)
        subprocess.run(["echo", "a process of its own on stdout"], check=True)
        return [[sum(prompt), *prompt] for prompt in prompts]

    def prefill(self, prompt):
        raise KeyError(prompt[0])

serve(Arm())
"""
STUBBORN = """
import json, os, signal, sys
sys.stdin.readline()
other = os.fork()
if other:
    print(json.dumps({"pids": [os.getpid(), other]}), flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def arm(tmp_path: Path) -> Callable[..., Child]:
    def start(script: str = ARM, limit_s: float = 60.0, leave_s: float = 10.0) -> Child:
        (tmp_path / "an_arm.py").write_text(script)
        command = [sys.executable, str(tmp_path / "an_arm.py")]
        return Child(command, tmp_path, os.environ, limit_s, leave_s)

    return start


def asked_to_load(child: Child, dtype: str) -> str:
    return str(child.ask(do="load", folder="", dtype=dtype, threads=1).get("failure"))


def test_what_an_arm_and_its_processes_print_is_no_answer(arm: Callable[..., Child]) -> None:
    with arm() as child:
        for _ in range(2):
            got = child.ask(do="generate", prompts=[[1, 2], [3, 4]], new=2)
            assert got["ids"] == [[3, 1], [7, 3]]  # cut after `new`


def test_an_arm_that_cannot_says_why_and_goes_on(arm: Callable[..., Child]) -> None:
    with arm() as child:
        assert asked_to_load(child, "int8") == "ValueError: no int8 here"
        assert asked_to_load(child, "wordless") == "MemoryError: "
        assert child.ask(do="prefill", prompt=[5])["failure"] == "KeyError: 5"
        assert child.ask(do="load", folder="", dtype="float32", threads=1)["seconds"] >= 0


def test_an_arm_that_dies_is_a_failure_with_its_last_words(arm: Callable[..., Child]) -> None:
    with arm() as child:
        assert asked_to_load(child, "dies") == "the process ended (3): out of luck"
        assert asked_to_load(child, "float32") == "the process ended (3): out of luck"


def test_an_arm_that_dies_is_seen_though_another_process_holds_its_pipe(
    arm: Callable[..., Child],
) -> None:
    with arm() as child:
        assert asked_to_load(child, "forks and dies").startswith("the process ended (3)")


def test_an_arm_that_is_silent_for_too_long_is_ended(arm: Callable[..., Child]) -> None:
    with arm(limit_s=0.3) as child:
        assert asked_to_load(child, "sleeps") == "no answer in 0.3 s"
        assert asked_to_load(child, "float32").startswith("the process ended (-9)")


def ended(pidfds: list[int]) -> bool:
    """Each is readable once its process has ended."""
    done = all(select.select([fd], [], [], 30)[0] for fd in pidfds)
    for fd in pidfds:
        os.close(fd)
    return done


def stubborn(child: Child) -> list[int]:
    """It and a process that it started."""
    return [os.pidfd_open(pid) for pid in child.ask(do="go")["pids"]]


def test_an_arm_that_does_not_leave_is_ended_with_all_it_started(
    arm: Callable[..., Child],
) -> None:
    with arm(STUBBORN, leave_s=0.1) as child:
        pidfds = stubborn(child)
    assert ended(pidfds)


def test_ctrl_c_ends_an_arm_at_once_with_all_it_started(arm: Callable[..., Child]) -> None:
    pidfds = []

    def interrupted() -> None:
        with arm(STUBBORN, leave_s=1e6) as child:
            pidfds.extend(stubborn(child))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended(pidfds)
