"""F10, F11, L6: offline jobs that are killed again and again, and that run out of disk."""

import atexit
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.faults.battery import Battery, Result
from tools.faults.check import Answer
from tools.faults.service import ROOT, TOKEN, children, holders
from tools.faults.workload import WORDS

KILLS = 50
KILLS_OF_A_JOB = 12
MAIN_SHARE = 0.25  # of the kills: main.py is one of four processes
PROMPTS, LENGTH = 300, 48
L6_LENGTH = 16
JOB_S = 120.0
FULL_BYTES = 20_000  # more, once some answers are saved
UNWRITABLE, USAGE = 5, 2  # exit codes
DISTINCT = 400  # prompts of L6; each comes many times, and its answer is known
LOOK_S = 0.01
JOB = f"job-{os.getpid()}"  # in the environment of every process of a job


class Job:
    """`main.py` with a prompts file, in a folder."""

    def __init__(
        self, folder: Path, prompts: int, seed: int, *, distinct: int | None = None
    ) -> None:
        """`distinct`: so many different prompts only."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.out = folder, folder / "out.txt"
        self.part = folder / "out.txt.part"
        rng = random.Random(f"job {seed}")
        texts = [
            " ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(distinct or prompts)
        ]
        lines = texts if distinct is None else [rng.choice(texts) for _ in range(prompts)]
        self.prompts = lines
        (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
        for left in (self.out, self.part):
            left.unlink(missing_ok=True)

    def start(self, *options: object) -> subprocess.Popen[bytes]:
        """The same command every time."""
        words: list[object] = ["main.py", "--prompts", self.folder / "prompts.txt", "--quiet"]
        words += ["-b", 8, "-l", LENGTH, "--greedy", "-o", self.out, *options]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, TOKEN: JOB, "TMPDIR": str(_short())},
            )  # fmt: skip

    def end(self, process: subprocess.Popen[bytes], within_s: float = JOB_S) -> int:
        """Its exit code."""
        try:
            return process.wait(within_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def saved(self) -> int:
        """Whole lines in the journal."""
        with contextlib.suppress(OSError):
            return max(0, self.part.read_bytes().count(b"\n") - 1)
        return 0


def _short() -> Path:
    """A folder for sockets, whose paths must be short."""
    short = Path("/tmp") / f"bf-job-{os.getpid()}"
    if not short.exists():
        short.mkdir(mode=0o700)
        atexit.register(shutil.rmtree, short, ignore_errors=True)
    return short


def f10(battery: Battery) -> list[Result]:
    """Killed at random: main.py, or one of its processes; run again until the file is there."""
    result = Result("F10", "offline job: main.py or one of its processes killed, then run again")
    folder, rng = battery.folder / "job", battery.rng("F10")
    number, kills = battery.count(PROMPTS, least=40), battery.count(KILLS, least=3)
    calm = Job(folder / "calm", number, battery.seed)
    result.require(calm.end(calm.start()) == 0, f"the undisturbed job failed: {calm.said[-300:]}")
    right = calm.out.read_bytes() if calm.out.exists() else b""
    killed = {"main": 0, "workers": 0}
    while result.injected < kills and not result.problems:
        job = Job(folder / "killed", number, battery.seed)
        _until_done(job, result, rng, killed, most=min(KILLS_OF_A_JOB, kills - result.injected))
        if result.problems:
            break
        result.requests += number
        if job.out.read_bytes() != right:
            result.wrong += 1
            result.problems.append("the file differs from the undisturbed one")
    left = holders(JOB)
    result.require(not left, f"processes left: {left}")
    result.notes.append(
        f"killed: main.py {killed['main']}, its processes {killed['workers']} times"
    )
    return [result]


def _until_done(
    job: Job, result: Result, rng: random.Random, killed: dict[str, int], *, most: int
) -> None:
    """Run the command until it succeeds; at most `most` kills at random moments."""
    here = 0
    for _ in range(60):
        process = job.start()
        while process.poll() is None and here < most:
            _progress(job, process, rng)
            if process.poll() is not None:
                break
            here += 1
            result.injected += 1
            if rng.random() < MAIN_SHARE:
                process.kill()
                killed["main"] += 1
                break
            if pids := list(children(process.pid).values()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pids), signal.SIGKILL)
                killed["workers"] += 1
        code = job.end(process)
        if judge_end(result, code, done=job.out.exists(), said=job.said):
            return
    result.problems.append("not finished after 60 tries")


def judge_end(result: Result, code: int, *, done: bool, said: str) -> bool:
    """Whether a job needs no other run. It ends with 0 and the file, or it was killed itself: nothing
    that happens to its processes is an error of the job. Killed after the file was there is no matter."""
    result.require(code in (0, -signal.SIGKILL), f"exit code {code}: {said[-300:]}")
    result.require(code != 0 or done, "exit code 0, and no file")
    return done or bool(result.problems)


def _progress(job: Job, process: subprocess.Popen[bytes], rng: random.Random) -> None:
    """Until some more answers are in the journal, or the job ends."""
    wanted = job.saved() + rng.choice([0, 1, 10, 40])
    deadline = time.monotonic() + 30
    while process.poll() is None and job.saved() < wanted and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    time.sleep(rng.uniform(0, 0.3))


def f11(battery: Battery) -> list[Result]:
    """No room on the disk: exit 5, what is saved stays, the next run finishes."""
    result = Result(
        "F11", "offline job on a full disk (RLIMIT_FSIZE of main.py, /dev/full)", in_table=False
    )
    folder, number = battery.folder / "disk", battery.count(PROMPTS, least=200)
    calm = Job(folder / "calm", number, battery.seed)
    result.require(calm.end(calm.start()) == 0, f"the undisturbed job failed: {calm.said[-300:]}")
    job = Job(folder / "full", number, battery.seed)

    process = job.start()
    while process.poll() is None and job.saved() < 1:
        time.sleep(LOOK_S)
    if process.poll() is None:  # main.py alone: a pool in shared memory is a file too
        limits = (job.part.stat().st_size + FULL_BYTES, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    code = job.end(process)
    saved = job.saved()
    result.injected += 1
    judge_stopped(result, code, job.said, f"{saved} of {number}")
    result.require(0 < saved < number, f"{saved} answers are saved")
    result.require(not job.out.exists(), "the file is there, though not complete")
    result.require(job.end(job.start()) == 0, f"it was not resumed: {job.said[-300:]}")
    if job.out.exists() and calm.out.exists() and job.out.read_bytes() != calm.out.read_bytes():
        result.wrong += 1
        result.problems.append("the resumed file differs from the undisturbed one")
    full = Job(folder / "devfull", 20, battery.seed)
    full.part.symlink_to("/dev/full")
    code = full.end(full.start())
    result.injected += 1
    judge_refused(result, code, full.said)
    result.requests = 2 * number + 20
    return [result]


def judge_refused(result: Result, code: int, said: str) -> None:
    """A job that cannot write: one line, and exit code 5 where that line says that a write failed, which
    is during the work; 2 where it refuses the path before."""
    wanted = UNWRITABLE if "cannot write" in said else USAGE
    result.require(code == wanted, f"/dev/full: exit code {code}, not {wanted}: {said[-300:]}")
    result.require("Traceback" not in said, f"/dev/full: a traceback: {said[-300:]}")
    result.require(said.count("error: ") == 1, f"/dev/full: not one line: {said[-300:]}")


def judge_stopped(result: Result, code: int, said: str, saved: str) -> None:
    """A job that ran out of room: exit code 5, and how many answers are saved."""
    result.require(code == UNWRITABLE, f"exit code {code}, not 5: {said[-300:]}")
    result.require("Traceback" not in said, f"a traceback: {said[-300:]}")
    result.require(saved in said.replace(",", ""), f"it does not say {saved!r}: {said[-300:]}")
    result.notes.append(" ".join(said.split())[:200])


def l6(battery: Battery) -> list[Result]:
    """A long batch: the file is exact. A service that nothing happens to answered the same prompts."""
    result = Result("L6", "offline batch of 10,000 prompts", in_table=False)
    number = battery.count(10_000, least=100)
    job = Job(battery.folder / "long", number, battery.seed, distinct=min(DISTINCT, number // 2))
    right = _asked(battery, sorted(set(job.prompts)))
    began = time.monotonic()
    code = job.end(job.start("-b", 32, "-l", L6_LENGTH, "--format", "jsonl"), 900)
    took = time.monotonic() - began
    result.requests = number
    result.require(code == 0, f"exit code {code}: {job.said[-300:]}")
    lines: Sequence[str] = job.out.read_text().splitlines() if job.out.exists() else ()
    tokens = judge_lines(result, job.prompts, lines, right)
    result.notes.append(f"{tokens / took:.0f} tokens/s, start included")
    return [result]


def judge_lines(
    result: Result, prompts: Sequence[str], lines: Sequence[str], right: Mapping[str, Answer]
) -> int:
    """The lines of a jsonl file against the prompts in order and the right answer to each: how many
    tokens they have in all."""
    found = [json.loads(line) for line in lines]
    indices = [each.get("index") for each in found]
    result.require(
        indices == list(range(len(prompts))), f"{len(indices)} answers, not one for each in order"
    )
    wrong = []
    for prompt, each in zip(prompts, found, strict=False):
        answer = right[prompt]
        have = (each.get("text"), each.get("finish_reason"), len(each.get("token_ids", ())))
        if have != (answer.text, answer.finish, answer.tokens):
            wrong.append(f"{each.get('index')}: {have}, not {answer}")
    result.wrong += len(wrong)
    result.require(not wrong, f"{len(wrong)} answers are wrong: {'; '.join(wrong[:3])}")
    return sum(len(each.get("token_ids", ())) for each in found)


def _asked(battery: Battery, prompts: Sequence[str]) -> dict[str, Answer]:
    """The greedy answers of a service to these prompts, at L6's length."""
    bodies: dict[int, dict[str, object]] = {
        case: {"model": "demo", "prompt": prompt, "max_tokens": L6_LENGTH, "temperature": 0}
        for case, prompt in enumerate(prompts)
    }
    with battery.service() as service:
        found = battery.ask_all(service, "L6-reference", bodies)
    return {prompt: found[case] for case, prompt in enumerate(prompts)}
