"""Two hosts out of namespaces, joined by cables that are cut, flap and go half-open, under load.

    python -m tools.faults.two_hosts                        needs root, ip, unshare, nsenter
    python -m tools.faults.two_hosts --kv-transport nixl    where NIXL is installed

    host a: router, prefill-0, decode-0        host b: prefill-1, decode-1
            veth0 ----------- control ----------- veth0
            veth1 ---- KV from b to decode-0 ---- veth1
            veth2 ---- KV from a to decode-1 ---- veth2

Each host has a network and a PID namespace, so no memory is shared between them. The commands are the
README's. Jobs of long prompts run one after the other while the KV cables misbehave: a prompt's KV, about
16 MB, exceeds what TCP holds. The file of every job must equal the one that a single host wrote, byte for
byte. The last line printed is JSON.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from baton.package import ROOT
from baton.wire.keys import make_keys
from prompts import PROMPTS

PORT = 7000
READY_S = 240.0
JOB_S = 600.0
NOWHERE = "02:00:00:00:00:99"  # no cable has this address: what is sent there is dropped in silence
MODEL = ("--model", "demo")
AFRESH = "--no-enable-prefix-caching"  # or later jobs would hand over nothing


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to one cable, and for how long."""

    name: str
    cable: int
    hit: Sequence[str]  # arguments of `ip`, in which {a} and {b} are the hosts
    heal: Sequence[str]
    seconds: float
    times: int = 1


def dead(direction: str, cable: int) -> tuple[str, str]:
    """Nothing that one host sends arrives, and it is not told so; and the end of it."""
    there = 2 if direction == "a" else 1
    device = f"dev veth{cable}"
    address = f"10.79.{cable}.{there}"
    return (
        f"-n {{{direction}}} neigh replace {address} lladdr {NOWHERE} nud permanent {device}",
        f"-n {{{direction}}} neigh del {address} {device}",
    )


def faults() -> list[Fault]:
    """In the order in which they happen."""
    down, up = "-n {b} link set veth2 down", "-n {b} link set veth2 up"
    to_b, from_b = dead("a", 2), dead("b", 2)
    return [
        Fault("cable pulled out", 2, [down], [up], 15.0),
        Fault("flapping", 2, [down], [up], 1.5, times=6),
        Fault("half-open: KV vanishes", 2, to_b[:1], to_b[1:], 15.0),
        Fault("half-open: answers vanish", 2, from_b[:1], from_b[1:], 15.0),
        Fault("silent in both directions", 2, [to_b[0], from_b[0]], [to_b[1], from_b[1]], 15.0),
    ]


def ip(command: str) -> None:
    """One call of `ip`."""
    subprocess.run(["ip", *command.split()], check=True)


class Host:
    """A network and a PID namespace."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ip(f"netns add {name}")
        ip(f"-n {name} link set lo up")
        inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"]
        self._holder = subprocess.Popen(["ip", "netns", "exec", name, *inside])
        tasks = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self._init = waited(lambda: tasks.read_text().split(), "a PID namespace", 10.0)[0]

    def command(self, *words: object) -> list[str]:
        """As typed on this host."""
        enter = ["nsenter", "--target", self._init, "--net", "--pid", "--mount", f"--wd={ROOT}"]
        return [*enter, "--", sys.executable, *map(str, words)]

    def start(self, name: str, *words: object) -> None:
        """A process whose output goes to NAME.log in the folder."""
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                self.command(*words), stdout=log, stderr=log, cwd=ROOT
            )

    def close(self) -> None:
        """With the first process of a PID namespace all others end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self._init), signal.SIGKILL)
        for each in (*self.processes.values(), self._holder):
            each.wait(20)
        ip(f"netns del {self.name}")


def waited(look: Callable[[], list[str]], what: str, within_s: float) -> list[str]:
    """What it finds, once it finds something."""
    deadline = time.monotonic() + within_s
    while not (found := look()):
        if time.monotonic() > deadline:
            raise SystemExit(f"error: {what} did not come within {within_s:g} s")
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two, with three cables: 10.79.CABLE.1 and .2."""
    a = Host(f"baton-a-{os.getpid()}", folder)
    try:
        b = Host(f"baton-b-{os.getpid()}", folder)
        try:
            for cable in range(3):
                ends = f"type veth peer name veth{cable} netns {b.name}"
                ip(f"-n {a.name} link add veth{cable} {ends}")
                for host, number in ((a, 1), (b, 2)):
                    ip(f"-n {host.name} address add 10.79.{cable}.{number}/24 dev veth{cable}")
                    ip(f"-n {host.name} link set veth{cable} up")
            yield a, b
        finally:
            b.close()
    finally:
        a.close()


def long_prompts(count: int, characters: int) -> list[str]:
    """Different ones, the same every time."""
    dice = random.Random(27)
    words = " ".join(" ".join(each.split()) for each in PROMPTS).split()
    prompts = []
    for _ in range(count):
        text = ""
        while len(text) < characters:
            text += dice.choice(words) + " "
        prompts.append(text[:characters])
    return prompts


@dataclass(slots=True)
class Outcome:
    """What came of all jobs."""

    transport: str
    jobs: int = 0
    requests: int = 0
    wrong: int = 0  # files that differ
    failed: int = 0  # jobs that did not end well
    faults: list[str] = field(default_factory=list)
    lost: int = 0  # ways, as the router logs them
    opened_again: int = 0
    slowest_job_s: float = 0.0
    calm_job_s: float = 0.0


class Cables:
    """Hurts and heals the cables by the clock, while jobs run."""

    def __init__(self, a: Host, b: Host, calm_s: float) -> None:
        self._names = {"a": a.name, "b": b.name}
        self._steps: list[tuple[float, str, str]] = []  # at this second, say this, `ip` this
        at = calm_s
        for fault in faults():
            for turn in range(fault.times):
                said = fault.name if turn == 0 else ""
                self._steps += [(at, said if i == 0 else "", h) for i, h in enumerate(fault.hit)]
                at += fault.seconds
                self._steps += [(at, "", each) for each in fault.heal]
                at += 1.0 if turn + 1 < fault.times else calm_s
        self._ends = at
        self._began = time.monotonic()

    def turn(self, outcome: Outcome) -> None:
        """Do what is due."""
        now = time.monotonic() - self._began
        while self._steps and self._steps[0][0] <= now:
            _, said, command = self._steps.pop(0)
            if said:
                outcome.faults.append(said)
                print(f"{now:6.1f} s  {said}", flush=True)
            ip(command.format(**self._names))

    @property
    def over(self) -> bool:
        """All has happened, and a while has passed."""
        return not self._steps and time.monotonic() - self._began >= self._ends


def run_job(
    host: Host, words: Sequence[object], cables: Cables | None, outcome: Outcome, log: Path
) -> bool:
    """Whether a job ends well, and in time."""
    with log.open("ab") as said:
        job = subprocess.Popen(host.command(*words), stdout=said, stderr=said, cwd=ROOT)
        deadline = time.monotonic() + JOB_S
        while job.poll() is None:
            if time.monotonic() > deadline:
                job.kill()
            if cables is not None:
                cables.turn(outcome)
            time.sleep(0.05)
    return job.returncode == 0


def launch(a: Host, b: Host, folder: Path, transport: str) -> None:
    """The README's commands, on both."""
    router = f"tcp://10.79.0.1:{PORT}"
    keys = folder / "keys"
    make_keys(keys)
    abroad = folder / "abroad"  # host b has no router.secret
    shutil.copytree(keys, abroad)
    (abroad / "router.secret").unlink()
    a.start("router", "-m", "router", "--address", router, "--keys", keys, *MODEL)
    for number, (host, its) in enumerate(((a, keys), (b, abroad))):
        common: tuple[object, ...] = (
            "--router",
            router,
            "--keys",
            its,
            *MODEL,
            "--device",
            "cpu",
            "--threads",
            1,
        )
        if transport != "auto":
            common = (*common, "--kv-transport", transport)
        kv = ("--kv-host", f"10.79.{number + 1}.{number + 1}")
        host.start(f"prefill-{number}", "-m", "prefill_worker", *common)
        host.start(f"decode-{number}", "-m", "decode_worker", *common, *kv, AFRESH)


def count(log: Path, *words: str) -> int:
    """Lines of a log that hold all of these."""
    lines = log.read_text(errors="replace").splitlines()
    return sum(all(word in line for word in words) for line in lines)


def measure(
    folder: Path, prompts: int, characters: int, length: int, transport: str, calm_s: float
) -> Outcome:
    """Everything."""
    outcome, file = Outcome(transport), folder / "prompts.jsonl"
    texts = long_prompts(prompts, characters)
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = ["main.py", "--prompts", file, "-l", length, "-b", 8, "--format", "jsonl"]
    alone = folder / "alone.jsonl"
    words = [sys.executable, *map(str, asked), "-o", str(alone), *MODEL, AFRESH]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with two_hosts(folder) as (a, b):
        launch(a, b, folder, transport)
        joined = ("--router", f"tcp://10.79.0.1:{PORT}", "--keys", folder / "keys")
        log, out = folder / "jobs.log", folder / "out.jsonl"
        cables: Cables | None = None
        ready_by = time.monotonic() + READY_S
        while cables is None or not cables.over:
            began = time.monotonic()
            well = run_job(a, [*asked, *joined, "-o", out], cables, outcome, log)
            if cables is None and not well and time.monotonic() < ready_by:
                continue  # the router is not there yet
            took = time.monotonic() - began
            outcome.jobs, outcome.requests = outcome.jobs + 1, outcome.requests + prompts
            outcome.failed += not well
            outcome.wrong += well and out.read_bytes() != alone.read_bytes()
            out.unlink(missing_ok=True)
            if cables is None:
                if not well:
                    raise SystemExit(
                        f"error: the job fails without a fault:\n{log.read_text()[-2000:]}"
                    )
                cables = Cables(a, b, calm_s)
                outcome.calm_job_s = round(took, 1)
            outcome.slowest_job_s = round(max(outcome.slowest_job_s, took), 1)
        router = folder / "router.log"
        outcome.lost = count(router, "cannot write to")
        outcome.opened_again = count(router, "can write to", "again")
    return outcome


@click.command()
@click.option("--prompts", default=16, show_default=True, help="Of each job.")
@click.option("--characters", default=10_000, show_default=True, help="Of each prompt.")
@click.option("-l", "--generation-length", "length", default=60, show_default=True)
@click.option("--kv-transport", "transport", default="auto", show_default=True)
@click.option("--calm", "calm_s", default=12.0, show_default=True, help="Seconds between faults.")
@click.option("--keep", type=click.Path(path_type=Path), default=None, help="Folder for the logs.")
def main(
    prompts: int, characters: int, length: int, transport: str, calm_s: float, keep: Path | None
) -> None:
    """Cut the KV cables between two hosts under load; exit with 1 if a request is lost or wrong."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        raise SystemExit("error: this makes namespaces: it needs root, ip, unshare and nsenter")
    with tempfile.TemporaryDirectory(prefix="baton-hosts-") as name:
        folder = keep or Path(name)
        folder.mkdir(exist_ok=True)
        outcome = measure(folder, prompts, characters, length, transport, calm_s)
    print(json.dumps(asdict(outcome)))
    if outcome.wrong or outcome.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
