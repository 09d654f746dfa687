"""Readiness: whether requests can be served, what is missing, and why, in words for people.

Readiness follows death, not silence: a suspect worker gets no new work, but the cluster stays ready.
Without prefill workers the decode workers fill the prompts themselves, and the cluster is degraded. At
the start it waits for its prefill workers, for a limited time. The process that starts the workers
reports those that do not run (Supervised), so the words name their last error and their log.
"""

from collections.abc import Sequence
from math import inf

from baton.bounds import short
from baton.timeline import short_name
from baton.wire.records import ProcessDown
from router.workers import DECODE, ENGINE, PREFILL, Health, Member, WorkerRegistry

PREFILL_GRACE_S = 30.0
"""From the first decode worker's Hello. A prefill worker loads the same model, but is checked longer."""
MAX_SUPERVISORS = 16
NAMED = 8
"""Most causes that one text names: in a large cluster all of them would not fit a message."""
FILLING_THEMSELVES = "decode workers fill the prompts themselves"


class Readiness:
    """Judges the members of a cluster."""

    def __init__(self, members: WorkerRegistry, *, colocated: bool) -> None:
        self._members = members
        self._colocated = colocated
        self._reports: dict[str, tuple[float, tuple[ProcessDown, ...]]] = {}  # by who sent it
        self._news = False  # since take_news()

    # ---- processes that do not run

    def supervised(self, sender: str, down: tuple[ProcessDown, ...], now: float) -> None:
        """Keep the sender's last report."""
        self._news = True
        self._reports.pop(sender, None)
        if down:
            self._reports[sender] = (now, down)
        while len(self._reports) > MAX_SUPERVISORS:
            del self._reports[next(iter(self._reports))]

    def forget(self, sender: str) -> None:
        """The sender has disconnected."""
        if self._reports.pop(sender, None) is not None:
            self._news = True

    def take_news(self) -> bool:
        """Whether a report has changed since the last call."""
        news, self._news = self._news, False
        return news

    @property
    def supervisors(self) -> tuple[str, ...]:
        """Whose reports are kept. They get heartbeats, so that one which is gone is noticed."""
        return tuple(self._reports)

    def _down(self, role: str) -> list[ProcessDown]:
        return [each for _, down in self._reports.values() for each in down if each.role == role]

    def _deaths(self, role: str, now: float) -> list[str]:
        return [
            _death(each, each.restart_in_s - (now - written))
            for written, down in self._reports.values()
            for each in down
            if each.role == role
        ]

    # ---- verdicts

    def fill_themselves(self, now: float) -> bool:
        """No prefill worker can fill anything and none is waited for: decode workers fill by
        themselves."""
        if self._colocated:
            return True
        return not self._in_grace(now) and not self._members.any_fill_possible(now)

    def due(self, now: float) -> float:
        """Seconds until the prefill workers are not waited for any more."""
        since = self._members.decode_since
        if since is None or not self._in_grace(now):
            return inf
        return since + PREFILL_GRACE_S - now

    def missing(self, now: float) -> str:
        """Why requests cannot be served now; empty if they can. Changes at most once a second."""
        if engines := self._staying(ENGINE):
            return "" if any(not e.out_of_order for e in engines) else _out_of_order(engines)
        if self._members.of(ENGINE):
            return self._absent(ENGINE, now)
        if not self._staying(DECODE):
            return self._absent(DECODE, now)
        if self._colocated or not self._in_grace(now):
            return ""
        return self._absent(PREFILL, now) if not self._staying(PREFILL) else _unattached([])

    def degraded(self, now: float) -> str:
        """What is missing although requests are served; empty if nothing is."""
        if engines := self._staying(ENGINE):
            return _out_of_order(engines)
        found = []
        if not self._colocated and self.fill_themselves(now):
            found.append(f"{self._no_prefill(now)}; {FILLING_THEMSELVES}")
        elif not self._colocated:
            found += self._deaths(PREFILL, now)
            down = _down_ways(self._staying(PREFILL))
            found += [f"{_listed(down)}; tried again, and other ways are used"] if down else []
        return _listed([*found, *self._deaths(DECODE, now)])

    def _in_grace(self, now: float) -> bool:
        """The cluster is starting, and waits for its first prefill worker."""
        members, since = self._members, self._members.decode_since
        if members.filled_once or since is None or now - since >= PREFILL_GRACE_S:
            return False
        prefills = self._staying(PREFILL)
        if not prefills:
            return not self._down(PREFILL)
        return any(d.worker not in p.failed for d in self._staying(DECODE) for p in prefills)

    def _staying(self, role: str) -> list[Member]:
        """Suspect ones too: silent is not dead."""
        return [member for member in self._members.of(role) if not member.leaving]

    def _no_prefill(self, now: float) -> str:
        prefills = self._staying(PREFILL)
        if not prefills:
            return self._absent(PREFILL, now)
        silent = [
            f"{_name(each)} is silent for {int(now - each.last_heard)} s"
            for each in prefills
            if each.health(now) is not Health.ALIVE
        ]
        if silent:
            where = "(at a long step, or stalled)"
            return f"no prefill worker answers: {_listed(silent, ', ')} {where}"
        return _unattached(prefills)

    def _absent(self, role: str, now: float) -> str:
        if deaths := self._deaths(role, now):
            return f"no {role} worker runs: {_listed(deaths)}"
        if leaving := [_name(each) for each in self._members.of(role)]:
            return f"no {role} worker accepts requests: {_listed(leaving, ', ')} leaving"
        return f"no {role} worker has joined"


def _down_ways(prefills: Sequence[Member]) -> list[str]:
    found = [(p.worker, d, why) for p in prefills for d, why in p.failed.items()]
    return [f"{prefill} cannot write to {decode}: {short(why)}" for prefill, decode, why in found]


def _unattached(prefills: Sequence[Member]) -> str:
    return _listed(_down_ways(prefills)) or "no prefill worker is attached to a decode worker yet"


def _out_of_order(engines: Sequence[Member]) -> str:
    found = [each for each in engines if each.out_of_order]
    return _listed([f"{_name(each)}: {short(each.out_of_order)}" for each in found])


def _listed(causes: Sequence[str], separator: str = "; ") -> str:
    """The first of them, and how many more there are."""
    more = [f"and {len(causes) - NAMED} more"] if len(causes) > NAMED else []
    return separator.join([*causes[:NAMED], *more])


def _name(member: Member) -> str:
    """Its name without what distinguishes one boot from another."""
    return short_name(member.worker)


def _death(down: ProcessDown, restart_in_s: float) -> str:
    """In whole seconds, so that the text changes at most once a second."""
    times = f"died {down.deaths} times within 60 s, the last time" if down.deaths > 1 else "died"
    soon = max(0, round(restart_in_s))
    again = f"within {soon} s" if soon else "now"
    why, log = short(down.why), short(down.log)
    return f"{down.name} {times} with {why}; it is started again {again}; log: {log}"
