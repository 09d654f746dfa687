"""Child: one process of a cluster, as its supervisor (supervisor.py) keeps track of it."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.cluster.notices import Notices
from baton.cluster.restarts import Restarts
from baton.cluster.stuck import Absence, Silence
from baton.pulse import Ear

WORKERS = ("prefill", "decode")


@dataclass(slots=True)
class Child:
    """One process, through all its restarts."""

    name: str
    command: list[str]
    log: Path | None  # None: the terminal
    descriptors: tuple[int, ...] = ()
    prepare: Callable[[], object] = lambda: None  # before each start
    process: subprocess.Popen[bytes] | None = None
    restarts: Restarts = field(default_factory=Restarts)
    has_worked: bool = False  # in any of its lives
    may_end: bool = False  # it is not started again
    boot: str = ""  # this life's name in the cluster
    former: str = ""  # that of the last life
    leaves_by: float | None = None  # it drains: when it must have ended, in seconds of Awake
    ear: Ear | None = None  # of one that shows that its loop turns
    silence: Silence | None = None
    absence: Absence | None = None  # of a worker that runs and is in no cluster
    doomed: bool = (
        False  # it was sent SIGKILL; it may hang in the kernel, which ends it when it can
    )
    killed: str = ""  # why, if it was because it is stuck
    log_start: int = 0  # where this life begins in the log
    notices: Notices | None = None  # of this life
    why: str = ""  # of its last death

    @property
    def role(self) -> str:
        """prefill, decode, router or server."""
        return self.name.partition("-")[0]

    @property
    def is_worker(self) -> bool:
        """Whether it joins the router, which lists it."""
        return self.role in WORKERS

    @property
    def starting(self) -> bool:
        """Whether it runs and does not work yet."""
        if self.process is None:
            return False
        if self.is_worker:
            return not self.restarts.serving
        return self.silence is not None and not self.silence.began

    def deafen(self) -> None:
        """Its present life is over, so nothing will be heard of it."""
        if self.ear is not None:
            self.ear.close()
        self.ear = self.silence = None

    @property
    def log_place(self) -> str:
        """Where its log is, for people."""
        return str(self.log) if self.log is not None else "this terminal"
