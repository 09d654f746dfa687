"""`python main.py`, whole, with its processes: one file, whatever the topology and whoever is killed."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from baton.client.batch import Completion
from baton.model_files import BUNDLED
from baton.offline.outputs import rendered
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.points import SLOWLY, Points, failpoints
from tests.cluster.processes import (
    Ends,
    Terminal,
    children_of,
    journaled,
    shared_memory,
    short_folder,
    terminals,
)
from tests.patience import PATIENCE_S, until

Type = Callable[..., Terminal]
LENGTH = 60
SMALL_POOL_BYTES = 1_100_000  # 8 blocks: one request of the longest takes 5 to 6


@cache
def calm_file(kind: str = "txt") -> bytes:
    """What an undisturbed greedy run writes."""
    greedy = SamplingParams(temperature=0)
    answers = {
        i: Completion(i, each.text, each.tokens, each.reason)
        for i, each in enumerate(calm.answers(LENGTH, greedy))
    }
    return "".join(rendered(calm.PROMPTS, answers, kind, timings=False)).encode()


class Job:
    """One `python main.py` with the twelve prompts, in a folder of its own."""

    def __init__(self, type_in: Type, folder: Path, points: Points) -> None:
        self._type, self.points = type_in, points
        self.folder = folder
        self.output, self.part = folder / "out.txt", folder / "out.txt.part"
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("".join(f"{prompt}\n" for prompt in calm.PROMPTS))
        self.runs = folder / "r"  # where clusters make their run folders: short, for their sockets
        self.runs.mkdir()
        self.shared = shared_memory()

    def start(self, *options: object) -> Terminal:
        common = ("main.py", "-l", LENGTH, "--greedy", "--prompts", self.prompts)
        return self._type(
            *common, "-o", self.output, *options, TMPDIR=str(self.runs), **self.points.environment
        )

    def children(self, terminal: Terminal, *names: str) -> dict[str, int]:
        """The processes it has started, once they are these."""
        wanted = {"router", *names}

        def look() -> dict[str, int]:
            assert terminal.runs(), terminal.said
            found = children_of(terminal.process.pid)
            return found if wanted <= found.keys() else {}

        return until(look, f"processes {sorted(wanted)}")

    def await_answers(self, terminal: Terminal, count: int) -> None:
        """Until so many answers are in the journal, while there is still work to do."""

        def look() -> bool:
            assert terminal.runs(), f"it ended too soon: {terminal.said}"
            return journaled(self.part) >= count

        until(look, f"{count} answers in the journal")

    def check_done(self, terminal: Terminal) -> str:
        """The undisturbed file, and nothing else is left. What was said."""
        said = terminal.ends(0)
        assert self.output.read_bytes() == calm_file()
        assert not self.part.exists()
        self.check_nothing_left()
        return said

    def check_nothing_left(self) -> None:
        assert list(self.runs.iterdir()) == []
        assert shared_memory() <= self.shared


@pytest.fixture
def job(type_in: Type) -> Iterator[Job]:
    with short_folder() as folder, failpoints() as points:
        yield Job(type_in, folder, points)


@pytest.fixture
def type_in() -> Iterator[Type]:
    with terminals() as opened:
        yield opened


def test_two_of_each_and_a_batch_of_eight(job: Job) -> None:
    terminal = job.start("-b", 8, "--num-prefill", 2, "--num-decode", 2)
    ends = Ends(job.children(terminal, "prefill-0", "prefill-1", "decode-0", "decode-1"))
    said = job.check_done(terminal)
    ends.wait()
    assert "shared memory" in said
    assert " 0 retries" in said


def test_a_kv_pool_too_small_for_all_of_them(job: Job) -> None:
    """Room for one request of the longest: the others begin, give way, and begin again."""
    said = job.check_done(job.start("-b", 8, "--kv-cache-memory-bytes", SMALL_POOL_BYTES))
    assert "the youngest request began again" in said
    assert " 0 retries" in said


def test_both_workers_killed_in_the_middle(job: Job) -> None:
    """The decode worker after two answers, where it has stopped: the run cannot end without it."""
    job.points.arm("decode.step:stop:150")
    terminal = job.start("-b", 2)
    first = job.children(terminal, "prefill-0", "decode-0")
    ends = Ends(first)
    job.await_answers(terminal, 2)
    job.points.fired(1)
    os.kill(first["decode-0"], signal.SIGKILL)
    os.kill(first["prefill-0"], signal.SIGKILL)
    said = job.check_done(terminal)
    ends.wait()
    assert "decode-0 died (signal 9) and is started again" in said
    assert "prefill-0 died (signal 9) and is started again" in said


def test_main_itself_killed_and_run_again(job: Job) -> None:
    """No orphan; the same command does only the rest; the sockets' folder of the dead is swept."""
    options = ("-b", 1, "--kv-transport", "frames")
    job.points.arm("decode.step:stop:150")
    terminal = job.start(*options)
    ends = Ends(job.children(terminal, "prefill-0", "decode-0"))
    job.await_answers(terminal, 2)
    terminal.signal(signal.SIGKILL)
    terminal.process.wait(PATIENCE_S)
    ends.wait()
    saved = journaled(job.part)
    assert 2 <= saved < len(calm.PROMPTS)
    assert not job.output.exists()
    assert len(list(job.runs.iterdir())) == 1
    again = job.start(*options)
    said = job.check_done(again)
    assert f"resuming: {saved} of 12 done" in said
    assert f"{12 - saved} requests in " in said
    assert "ZeroMQ frames" in said


def test_ctrl_c_and_run_again_colocated(job: Job) -> None:
    job.points.arm(SLOWLY)
    terminal = job.start("--colocated", "-b", 1)
    children = job.children(terminal, "decode-0")
    assert set(children) == {"router", "decode-0"}
    ends = Ends(children)
    job.await_answers(terminal, 1)
    terminal.signal(signal.SIGINT)
    said = terminal.ends(130)
    ends.wait()
    job.check_nothing_left()
    assert "answers are safe in" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not job.output.exists()
    job.points.disarm(SLOWLY)
    assert "resuming: " in job.check_done(job.start("--colocated", "-b", 4))


def test_interrupted_before_the_workers_are_there(job: Job) -> None:
    job.points.arm("worker.begin:delay:1:3000")
    terminal = job.start("--quiet")
    ends = Ends(job.children(terminal, "prefill-0", "decode-0"))
    terminal.signal(signal.SIGTERM)
    assert terminal.ends(130).startswith("interrupted: ")
    ends.wait()
    job.check_nothing_left()
    assert not job.part.exists()


def test_what_only_a_worker_can_find_out_is_one_line(job: Job, tmp_path: Path) -> None:
    """It looked well from outside: its exit code and its words become those of the command."""
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for each in BUNDLED["demo"].glob("*.json"):
        (damaged / each.name).write_bytes(each.read_bytes())
    weights = load_file(BUNDLED["demo"] / "model.safetensors")
    (name,) = [each for each in weights if each.endswith("h.1.mlp.c_fc.weight")]
    weights[name][3, 5] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    no_number = job.start("--quiet", "--model", damaged)
    no_way = job.start("--quiet", "--kv-transport", "cuda_ipc", "-o", job.folder / "other.txt")
    no_number.refuses(3)
    assert no_number.said == (
        f"error: {damaged} is damaged: its weight {name} holds NaN, which is not a number; fetch or "
        "convert the model again\n"
    )
    no_way.refuses(4, "CUDA IPC")
    job.check_nothing_left()
    assert not list(job.folder.glob("*.part"))


def test_an_adapter_is_refused_before_a_process_is_started(type_in: Type, tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    typed = type_in("main.py", "infer", "--model", tmp_path)
    typed.refuses(3, f"{tmp_path} is a LoRA adapter and not a whole model")
