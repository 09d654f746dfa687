"""What stands in the simulation in the place of tensors: models that take time and compute nothing."""

from collections.abc import Sequence

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt, Region
from baton.kv.row import Row
from baton.plan.machine import Machine
from baton.text import Tokenizer
from baton.wire import messages as msg
from decode_worker.model import Draw, Drawn
from prefill_worker.model import Chunk, News
from prefill_worker.scratch import Scratch

TOKEN = 7  # every answer is made of it


class Timed:
    """A model of either role. `spent_s`: in forwards so far, by its own clock."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.spent_s = 0.0
        self._cores = 0

    def use_cores(self, cores: tuple[int, ...]) -> None:
        self._cores = len(cores)

    def clock(self) -> float:
        return self.spent_s


class SimulatedDecode(Timed):
    """DecodeModel without KV."""

    def expect(self, grant: Grant) -> None:
        pass

    def poll(self) -> bool:
        return False

    def arrival(self, grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        return Arrival.READY

    def retire(self, grant: Grant) -> None:
        pass

    def let_in(self, writer: str) -> None:
        pass

    def shut_out(self, writer: str) -> None:
        pass

    def renew_epoch(self, epoch: str) -> tuple[Region, ...]:
        return ()

    def step(self, rows: Sequence[Row], draws: Sequence[Draw]) -> list[Drawn | None]:
        self.spent_s += self.machine.rows(rows, self._cores)
        return [Drawn(TOKEN)] * len(draws)


class SimulatedPrefill(Timed):
    """PrefillModel without KV. Where memory is shared it reads cached prefixes in place; elsewhere
    it keeps those of KEPT blocks."""

    waits = False

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._scratch = Scratch(KEPT, KEPT)

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        gb_per_s = self.machine.kv_bytes_per_s / 1e9
        return msg.Attached(worker, epoch, "frames" if gb_per_s else "shm", gb_per_s, "")

    def detach(self, worker: str) -> None:
        pass

    def poll(self) -> list[News]:
        return []

    def takes(self, worker: str) -> bool:
        return True

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        if not self.machine.kv_bytes_per_s or -(-tokens // BLOCK) > KEPT:
            return True
        most = (tokens - 1) // BLOCK
        return self._scratch.take(grant.run, -(-tokens // BLOCK), block_hashes, most)

    def known(self, grant: Grant) -> int:
        if not self.machine.kv_bytes_per_s:
            return len(grant.prefix) * BLOCK
        return self._scratch.known(grant.run) * BLOCK if grant.run in self._scratch.held else 0

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        spans = [(chunk.start, len(chunk.token_ids)) for chunk in chunks]
        self.spent_s += self.machine.forward(spans, 0, self._cores)

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        sent = max(0, tokens - len(grant.prefix) * BLOCK) if self.machine.kv_bytes_per_s else 0
        seconds = self.machine.handover(sent)
        self.spent_s += seconds
        if grant.run in self._scratch.held:
            self._scratch.keep(grant.run)
            self._scratch.give_back(grant.run)
        return Receipt(sent * self.machine.kv_bytes_per_token, b"", seconds, "shm")

    def embedded(self, grant: Grant) -> bytes:
        raise TransferError("the simulation computes no embeddings")

    def abandon(self, grant: Grant) -> bool:
        self._scratch.give_back(grant.run)
        return False


BLOCK = 16  # tokens
KEPT = 4096  # blocks of a prefill worker


class Wordless(Tokenizer):
    """A tokenizer without text."""

    longest_token = 1
    falls_back = False
    cleans_up = False

    def __init__(self) -> None:
        pass

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [TOKEN] * len(text)

    def decode_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "." * len(ids)

    def decode_whole_loose(self, ids: Sequence[int], *, special: bool = False) -> str:
        return "." * len(ids)
