"""Cluster: the processes of one cluster on this machine. They are started with the commands of the
README, restarted when they die, and stopped in any case.

    run folder (mode 0700)/   router.sock   kv-*.sock   pids.json   logs/router.log, prefill-0.log ...

Every child ends with this process, even after SIGKILL (baton/host.py). When a child is started again:
baton/cluster/restarts.py. The router and the HTTP server show that their loops turn (baton/pulse.py),
and are killed when stuck, as are workers that join no router: baton/cluster/stuck.py. An exit code for
which a restart cannot help (2, 3, 4, 6) ends the cluster, with the last error message of that child,
unless the child has worked before or a service was ready.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from baton.clock import Clock, monotonic
from baton.cluster import ends
from baton.cluster.child import WORKERS, Child
from baton.cluster.notices import Notices
from baton.cluster.options import ClusterOptions, beside
from baton.cluster.run_folder import LOGS, SOCKET, RunFolder, sweep
from baton.cluster.spare import Spare
from baton.cluster.stuck import STUCK_S, Absence, Awake, Silence
from baton.errors import BatonError, InputError, ModelError, OutOfMemory, ProtocolError, WorkerLost
from baton.host import any_stopped, core_numbers, family, processor_time, sees_children
from baton.package import ROOT
from baton.pulse import Ear
from baton.topology import threads_per_worker
from baton.wire.messages import ClusterInfo
from baton.wire.records import ProcessDown

PIDS = "pids.json"
# For router and server: glibc gives each thread a heap of its own otherwise, and none gives back.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
LEAVES_S = 5.0  # added to --drain-timeout: a worker that leaves and still runs then is stuck
TERM_S, KILL_S = 0.05, 1.0  # stop(): between two SIGTERMs, and until SIGKILL
ENDS_S = 1.0  # after SIGKILL
TAIL_BYTES = 65536
ERROR = re.compile(r"error: |[\w.]*(Error|Exception)(: |$)")
WORDS = 500  # characters of an error message

FINAL: dict[int, type[BatonError]] = {
    error.exit_code: error for error in (InputError, ModelError, ProtocolError, OutOfMemory)
}


@dataclass(frozen=True, slots=True)
class Beside:
    """A process to run beside the cluster. It is passed the router's address, prints to the terminal and
    inherits these descriptors. `prepare` is called before each start: the run folder may be a new one."""

    name: str
    command: list[str]
    descriptors: tuple[int, ...] = ()
    prepare: Callable[[], object] = lambda: None


class Cluster:
    """A context manager: at the end of the block all its processes have ended."""

    def __init__(
        self, options: ClusterOptions, *, lasting: bool = False, clock: Clock = monotonic
    ) -> None:
        """`lasting`: once it was ready it goes on although processes keep dying. Otherwise check() raises
        WorkerLost."""
        self.options = options
        self._lasting = lasting
        self._clock = clock
        self._awake = Awake()
        self._doubtful: ClusterInfo | None = None  # to be looked at again
        self._folder: RunFolder | None = None
        self._children: list[Child] = []
        self._spare: Spare | None = None
        self._ready = False  # as the router last said
        self._was_ready = False  # at any time: until then this is a start, not a service

    @property
    def run_dir(self) -> Path:
        """Sockets, pids and logs, once it was started."""
        return self._folder.path if self._folder is not None else Path("/")

    @property
    def address(self) -> str:
        """Where the router listens."""
        return f"ipc://{self.run_dir}/{SOCKET}"

    def start(self) -> None:
        """Start the router and every worker, at the same time. Returns at once."""
        sweep()
        self._folder = RunFolder()
        for name, command in self.commands():
            child = Child(name, command, self.run_dir / LOGS / f"{name}.log")
            self._children.append(child)
            self._spawn(child)
        if self.options.spare_worker:
            self._spare = Spare(self.run_dir / LOGS, self._imports())

    def add(self, beside: Beside) -> None:
        """Start one more process, and supervise it too."""
        self.launch(replace(beside, command=[*beside.command, "--router", self.address]))

    def launch(self, beside: Beside) -> None:
        """The same for one whose command names its router."""
        child = Child(beside.name, beside.command, None, beside.descriptors, prepare=beside.prepare)
        self._children.append(child)
        self._spawn(child)

    def commands(self) -> list[tuple[str, list[str]]]:
        """Names and command lines, as a user would type them into as many terminals."""
        options = self.options
        router = ["router", "--address", self.address, *options.arguments("router")]
        router += ["--batch-size", str(options.batch_size)]
        if options.topology.colocated:
            router.append("--colocated")
        commands = [("router", router)]
        threads = str(threads_per_worker(options.topology))
        for role, devices in (
            ("prefill", options.topology.prefill_devices),
            ("decode", options.topology.decode_devices),
        ):
            for index, device in enumerate(devices):
                name = f"{role}-{index}"
                command = [f"{role}_worker", "--router", self.address]
                command += options.worker_arguments(role)
                command += ["--device", device, "--name", name]
                hands_out = core_numbers() and options.ranks(role) == 1  # does the router, of cores
                if device == "cpu" and not hands_out:
                    command += ["--threads", threads]
                if role == "decode":
                    command += ["--max-num-seqs", str(options.batch_size)]
                    command += beside(options, device)
                commands.append((name, command))
        return commands

    # ---- while it runs

    def check(self, info: ClusterInfo | None = None) -> list[str]:
        """Restart processes that died, and kill those that are stuck; call it once a second or more
        often. Returns notices for the user; raises the error of a process for which a restart cannot
        help, and WorkerLost if nothing but crash loops is left of a job, or of a start."""
        notes = []
        now = self._clock()
        awake = self._awake.look(now)
        if (info := info or self._doubtful) is not None:
            certain = awake >= self._awake.pardon
            notes += self._look_at(info, now, may_kill=certain)
            self._doubtful = None if certain else info
        for child in self._children:
            if child.process and child.leaves_by is not None and awake >= child.leaves_by:
                notes.append(self._kill(child, now, "did not end after SIGTERM"))
            self._listen(child, awake, now)
            notes += self._miss(child, awake, now)
            notes += child.notices.new() if child.notices is not None else []
            if child.process is not None and (code := ends.ended(child.process)) is not None:
                notes += self._ended(child, code, now)
            due = child.restarts.due
            if child.process is None and due is not None and now >= due:
                notes += self._restart(child, now)
        self._keep_spare(now)
        return notes

    def let_end(self, name: str) -> int | None:
        """Do not start this process again when it ends. Its pid, if it runs."""
        (child,) = [each for each in self._children if each.name == name]
        child.may_end = True
        child.restarts.started()  # whatever was planned
        return child.process.pid if child.process is not None else None

    def down(self) -> tuple[ProcessDown, ...]:
        """The processes that have died and do not work again yet, as of now."""
        now = self._clock()
        return tuple(
            ProcessDown(
                child.name,
                child.role,
                child.restarts.recent_deaths(now),
                child.why,
                max(0.0, child.restarts.due - now) if child.restarts.due is not None else 0.0,
                child.log_place,
            )
            for child in self._children
            if child.restarts.down
        )

    def _look_at(self, info: ClusterInfo, now: float, *, may_kill: bool) -> list[str]:
        """Take in who has joined. Kills workers that had joined and that the router no longer lists: they
        are stalled. What a former router said, and was on its way, counts no more."""
        routers = [each.process for each in self._children if each.role == "router"]
        if routers and info.router_pid and info.router_pid not in {p.pid for p in routers if p}:
            return []
        self._ready = info.ready
        self._was_ready |= info.ready
        listed = {worker.worker.rpartition(".")[0]: worker for worker in info.workers}
        notes = []
        for child in self._children:
            if child.process is None or child.doomed or ends.ended(child.process) is not None:
                continue
            worker = listed.get(child.name)
            if child.role == "router":
                self._works(child, now)
            elif not child.is_worker:
                continue
            elif worker is not None and worker.worker != child.former:
                child.boot = worker.worker
                if child.restarts.down and child.restarts.crash_loop:
                    notes.append(f"{child.name} works again, after {child.restarts.deaths} deaths")
                self._works(child, now)
                if worker.state == "leaving" and child.leaves_by is None:
                    child.leaves_by = self._awake.seconds + self.options.drain_timeout + LEAVES_S
            elif not may_kill or worker is not None or child.leaves_by is not None:
                continue
            elif child.restarts.serving:
                notes.append(self._kill(child, now, "had stopped answering"))
        return notes

    def _works(self, child: Child, now: float) -> None:
        child.has_worked, child.absence = True, None
        child.restarts.serves(now)

    def _kill(self, child: Child, now: float, why: str) -> str:
        assert child.process is not None
        child.restarts.serves_no_more(now)
        child.leaves_by = child.absence = None
        child.doomed = True
        ends.kill(child.process, ENDS_S)
        return f"{child.name} {why} and was killed"

    def _miss(self, child: Child, awake: float, now: float) -> list[str]:
        """Kill a worker that will join no router: nobody else hears of it."""
        if child.process is None or child.doomed or child.absence is None:
            return []
        if not child.absence.due(awake):
            return []
        routers = [each.restarts.serving for each in self._children if each.role == "router"]
        if child.boot and not all(routers):  # there is none to join
            child.absence = Absence(awake, again=True)
        pids = family(child.process.pid)  # with compilers and other ranks
        work = processor_time(pids) if sees_children() else None  # it may wait for a compiler
        stopped = any_stopped(pids)
        why = child.absence.too_long(awake, stopped=stopped, work=work)
        if not why or child.may_end or ends.ended(child.process) is not None:
            return []
        return [self._kill(child, now, why)]

    def _listen(self, child: Child, awake: float, now: float) -> None:
        """Kill it if its loop is stuck, or if nobody new can reach it. One that may end has a deadline of
        its own. Nobody else reports that the HTTP server works."""
        if child.process is None or child.doomed or child.may_end:
            return
        if child.ear is None or child.silence is None:
            return
        why = ""
        if child.ear.heard():
            child.silence.heard(awake)
            if child.role == "server":
                self._works(child, now)
        else:
            why = child.silence.too_long(awake)
        listens = child.role == "router" and self.address in child.command
        if not why and child.restarts.serving and listens:
            why = "its socket was removed" * (not _is_there(self.run_dir / SOCKET))
        if why and ends.ended(child.process) is None:
            child.killed, child.doomed = f"{why}, so it was killed", True
            ends.kill(child.process, ENDS_S)

    def _ended(self, child: Child, code: int, now: float) -> list[str]:
        """A process has ended. Plans its next start."""
        worked = child.restarts.serving or child.leaves_by is not None
        child.process, child.leaves_by = None, None
        killed, child.killed, child.doomed = child.killed, "", False
        child.deafen()
        child.former = child.boot or child.former
        if child.may_end:
            return []
        if child.role == "router":  # workers join the next one anew
            self._ready, self._doubtful = False, None
            for other in self._children:
                if other.is_worker:
                    other.restarts.serves_no_more(now)
                    if other.boot:
                        other.absence = Absence(self._awake.seconds, again=True)
        if code == 0 and worked:
            child.restarts.left(now)
            return [f"{child.name} ended as it was told to (SIGTERM) and is started again"]
        last_words = self.last_words(child.name)
        if code in FINAL and not child.has_worked and self.ends_for_one:
            raise FINAL[code](last_words or f"{child.name} ended with exit code {code}")
        how = killed or (f"signal {-code}" if code < 0 else f"exit code {code}")
        return self._died(child, how + (f": {last_words}" if last_words else ""), now)

    def _died(self, child: Child, why: str, now: float) -> list[str]:
        restarts, child.why = child.restarts, why
        known = restarts.at_the_longest and not restarts.serving
        wait_s = restarts.died(now)
        self._end_if_hopeless(child)
        if known and restarts.at_the_longest:
            return []  # the user has been told, and that it goes on like this
        if not wait_s:
            then = "is started again"
        elif restarts.at_the_longest:
            then = f"is started again every {wait_s:g} s until it works"
        else:
            then = f"is started again in {wait_s:g} s"
        times = f", death {restarts.deaths}" if restarts.deaths > 1 else ""
        return [f"{child.name} died ({why}{times}) and {then}; its log: {child.log_place}"]

    @property
    def ends_for_one(self) -> bool:
        """A process that can never work ends it. A service that was ready goes on."""
        return not (self._lasting and self._was_ready)

    def _end_if_hopeless(self, child: Child) -> None:
        """Raise WorkerLost if whoever waits for this cluster would wait in vain: it is not ready, and
        every process that is down is in a crash loop. Starts are counted, however long each one takes."""
        lasts = self._lasting and self._was_ready
        if lasts or not child.restarts.crash_loop or (self._ready and child.is_worker):
            return
        if all(each.restarts.crash_loop for each in self._children if each.restarts.down):
            raise WorkerLost(
                f"{child.name} died {child.restarts.deaths} times, the last time with {child.why}"
            )

    def last_words(self, name: str) -> str:
        """The last error message in the log of a process, of its present life: ours, or the end of a
        traceback."""
        (child,) = [each for each in self._children if each.name == name]
        if child.log is None:
            return ""
        with suppress(OSError), child.log.open("rb") as log:
            log.seek(max(child.log_start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
            errors = [line for line in lines if ERROR.match(line)]
            if errors:
                return errors[-1].removeprefix("error: ")[:WORDS]
        return ""

    def pids(self) -> dict[str, int]:
        """Process ids of the running processes; `spare` is the idle one. Also in the run folder."""
        found = {c.name: c.process.pid for c in self._children if c.process is not None}
        if self._spare is not None and self._spare.process is not None:
            found["spare"] = self._spare.process.pid
        return found

    def running(self) -> set[str]:
        """Names of the running processes."""
        return {c.name for c in self._children if c.process and ends.ended(c.process) is None}

    # ---- starting and stopping

    def _restart(self, child: Child, now: float) -> list[str]:
        """Start it again. That there is no memory for a process is one more death."""
        sweep()  # what the last life may have left
        try:
            self._spawn(child)
        except OSError as error:
            return self._died(child, f"it cannot be started: {error.strerror}", now)
        return []

    def _spawn(self, child: Child) -> None:
        now = self._clock()
        child.restarts.started()
        child.boot = ""
        child.absence = Absence(self._awake.seconds) if child.is_worker else None
        command = [*child.command, "--parent", str(os.getpid())]
        assert self._folder is not None
        self._folder.make()  # a cleaner of old files may have removed it
        child.prepare()
        if child.log is not None:
            child.log_start = child.log.stat().st_size if child.log.exists() else 0
            child.notices = Notices(child.log) if child.is_worker else None
            if self._spare is not None and child.is_worker and not child.restarts.crash_loop:
                child.process = self._spare.become(command, child.log, now)
        if child.process is None:
            self._run(child, command)
        self._write_pids()

    def _run(self, child: Child, command: list[str]) -> None:
        descriptors = child.descriptors
        if child.role in STUCK_S:
            child.ear = Ear()
            child.silence = Silence(STUCK_S[child.role], self._awake.seconds)
            descriptors += (child.ear.descriptor,)
            command = [*command, "--pulse", str(child.ear.descriptor)]
        try:
            with child.log.open("ab") if child.log else nullcontext() as log:
                child.process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ if child.is_worker else {**ONE_ARENA, **os.environ},
                    pass_fds=descriptors,
                    start_new_session=True,  # Ctrl-C reaches this process only
                )
        finally:
            if child.ear is not None:
                child.ear.inherited()
                if child.process is None:
                    child.deafen()

    def _imports(self) -> list[str]:
        """What a spare imports: both roles, and what loads a model where it is not compiled."""
        topology = self.options.topology
        on_cpu = {*topology.prefill_devices, *topology.decode_devices} == {"cpu"}
        lazily = "baton.engine.cpu.select" if on_cpu else "baton.engine.loading"
        return [*(f"{role}_worker.process" for role in WORKERS), lazily]

    def _keep_spare(self, now: float) -> None:
        """A new one is started while no other process starts: its imports take a core."""
        starting = any(each.starting for each in self._children)
        if self._spare is not None and not starting and self._spare.keep(now):
            self._write_pids()

    def _write_pids(self) -> None:
        """For operators. A disk that is full stops no restart."""
        with suppress(OSError):
            new = self.run_dir / f"{PIDS}.new"
            new.write_text(json.dumps(self.pids()) + "\n")
            new.replace(self.run_dir / PIDS)

    def stop(self) -> None:
        """Stop every process and remove the run folder. A worker does not drain: SIGTERM is repeated, and
        its second one ends it at once."""
        running = [c.process for c in self._children if c.process is not None]
        if self._spare is not None:
            self._spare.end()
        deadline = time.monotonic() + KILL_S
        while running and time.monotonic() < deadline:
            for process in running:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            ends.await_end(running[0], TERM_S)
            running = [process for process in running if ends.ended(process) is None]
        for process in running:
            ends.kill(process, ENDS_S)
        for child in self._children:
            child.deafen()
        if self._children and (keep := os.environ.get("BATON_KEEP_LOGS")):
            logs = Path(keep) / self.run_dir.name
            with suppress(OSError):  # a full disk must not keep the rest from ending
                shutil.copytree(self.run_dir / LOGS, logs, dirs_exist_ok=True)
        if self._folder is not None:
            self._folder.remove()
            sweep()  # what killed ones have left
        self._children, self._spare = [], None

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _is_there(path: Path) -> bool:
    """Also where that cannot be seen."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True
