"""Reports: which of a worker's reports the router believes.

Any member can send any message about any run. A worker speaks for itself alone: about runs that it was
given, and what it says must fit what it was asked. Everything else is dropped and counted. A report about
a run that is over is late, not forged: the ledger ignores and counts it.
"""

from collections.abc import Sequence

from baton.kv.grant import Grant
from baton.lifecycle import State
from baton.wire import messages as msg
from baton.wire.messages import Message
from router.ledger import Entry, Ledger
from router.workers import DECODE, ENGINE, PREFILL, Member

ENDS = (None, "stop", "length")
BROKEN = "worker_error"
"""Code of a request whose decode worker sent tokens that cannot be."""


class Reports:
    """Checks reports before they take effect."""

    def __init__(self, ledger: Ledger, vocabulary: int) -> None:
        self._ledger = ledger
        self._vocabulary = vocabulary
        self.forged = 0

    def believed(self, member: Member, message: Message) -> Sequence[Message]:
        """What of this report is about the member's own runs; usually the message itself."""
        match message:
            case msg.Decoded(runs):
                sound, broken = self._decoded(member, runs)
                whole = [message] if len(sound) == len(runs) else [msg.Decoded(tuple(sound))]
                return [*(whole if sound else []), *broken]
            case msg.Reserved(grant):
                entry = self._ledger.running(grant.run)
                late = entry is None or entry.decode != member.worker
                fits = late or (entry is not None and _granted_rightly(grant, entry, member))
            case msg.ChunkFilled(run, tokens):
                entry = self._ledger.running(run)
                fits = self._fills(member, run) and (entry is None or tokens <= entry.length)
            case msg.Filled(run) | msg.FillFailed(run) | msg.Embedded(run):
                fits = self._fills(member, run)
                entry = self._ledger.running(run)
                if entry is not None and isinstance(message, msg.Filled):
                    fits = fits and message.reused < entry.length
                if entry is not None and isinstance(message, msg.Filled | msg.Embedded):
                    fits = fits and bool(entry.pooling) is isinstance(message, msg.Embedded)
                if fits and isinstance(message, msg.Embedded) and not _is_vector(message.vector):
                    self._count()
                    return (msg.FillFailed(run, f"{len(message.vector)} bytes are no embedding"),)
            case msg.Released():
                fits = member.hello.role == PREFILL
            case msg.PromptLogprobs(run, logprobs):
                entry = self._ledger.running(run)
                fits = self._decodes(member, run)
                if entry is not None:
                    wanted = entry.params.prompt_logprobs >= 0
                    fits = fits and wanted and len(logprobs) == len(entry.prompt_ids) - 1
            case msg.Deferred(run) | msg.Preempted(run) | msg.Outgrown(run) | msg.Expired(run):
                fits = self._decodes(member, run)
            case msg.FillRefused(run) | msg.RunFailed(run) | msg.RunReturned(run):
                fits = self._decodes(member, run)
            case msg.PoolStats(free, cached, quarantined):
                blocks = member.hello.blocks if member.hello.role == DECODE else -1
                fits = max(free, cached, quarantined) <= blocks
            case msg.Attached() | msg.AttachFailed() | msg.WayLost():
                fits = member.hello.role == PREFILL
            case msg.Paused():
                fits = member.hello.role == ENGINE
            case msg.Heartbeat() | msg.Leaving() | msg.AdaptersHeld():
                fits = True
            case _:  # an order, or an answer to a client
                fits = False
        if not fits:
            self._count()
        return (message,) if fits else ()

    def from_stranger(self, message: Message) -> None:
        """Count what a worker that was given up, and lives, says about its runs: all of them are over."""
        if not isinstance(message, msg.Heartbeat):
            self._ledger.late_reports += 1

    def _count(self) -> None:
        """Forged ones are among the late reports of Counts."""
        self.forged += 1
        self._ledger.late_reports += 1

    def _fills(self, member: Member, run: str) -> bool:
        """It fills this run, or the run is over. A decode worker cannot say what a writer does."""
        if member.hello.role != PREFILL:
            return False
        entry = self._ledger.running(run)
        return entry is None or entry.prefill in (None, member.worker)

    def _decodes(self, member: Member, run: str) -> bool:
        if member.hello.role not in (DECODE, ENGINE):
            return False
        entry = self._ledger.running(run)
        return entry is None or entry.decode == member.worker

    def _decoded(
        self, member: Member, runs: tuple[msg.RunTokens, ...]
    ) -> tuple[list[msg.RunTokens], list[Message]]:
        """Those that can be, and reports on the others. Tokens that cannot be end their request with an
        error. Without it a client would get them, or wait for ever for those that come after."""
        sound: list[msg.RunTokens] = []
        broken: list[Message] = []
        decodes, worker = member.hello.role != PREFILL, member.worker
        running = self._ledger.running
        for tokens in runs:
            entry = running(tokens.run)
            if not decodes or (entry is not None and entry.decode != worker):
                self._count()
                continue
            why = "" if entry is None else self._impossible(entry, tokens)
            if entry is not None and why and entry.state is State.DECODING:
                self._count()
                text = f"the decode worker sent tokens that cannot be: {why}"
                broken.append(msg.RunFailed(tokens.run, BROKEN, text))
            else:
                sound.append(tokens)
        return sound, broken

    def _impossible(self, entry: Entry, new: msg.RunTokens) -> str:
        """Why these tokens cannot follow; empty if they can. A gap before them is found when they are
        added."""
        ids = new.token_ids
        count = len(ids)
        if ids and max(ids) >= self._vocabulary:
            return f"id {max(ids)}, and the vocabulary has {self._vocabulary:,}"
        end, reach = new.position + count, entry.reach
        if end > reach or (end == reach and new.finish is None):
            return f"{end} tokens, and it ends with {reach}"
        if new.finish not in ENDS:
            return f"it ends with {new.finish!r:.40}"
        if new.logprobs and len(new.logprobs) != count:
            return f"{len(new.logprobs)} logprobs for {count} tokens"
        if new.ages and len(new.ages) != count:
            return f"{len(new.ages)} ages for {count} tokens"
        return ""


def _granted_rightly(grant: Grant, entry: Entry, member: Member) -> bool:
    """The grant is the member's own, of its current epoch and pool, and as large as was asked for."""
    hello = member.hello
    if entry.state is not State.RESERVING:
        return True  # late
    if (grant.worker, grant.epoch) != (hello.worker, hello.epoch):
        return False
    size, table = hello.block_size, grant.table
    asked = len(table) == -(-entry.reserved // size) and max(table, default=0) < hello.blocks
    return asked and len(grant.prefix) * size < entry.length


def _is_vector(data: bytes) -> bool:
    """Of float32."""
    return len(data) > 0 and len(data) % 4 == 0
