"""A prefill worker that copies keeps what it has computed: its blocks, who is chosen, and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.adapters.identity import Adapter
from baton.kv.grant import Grant
from baton.kv.prefix import extended, root
from baton.kv.region import Receipt, Region
from baton.pace import Pace, Span
from baton.wire import messages as msg
from baton.wire.node import ROUTER, To
from prefill_worker.model import Chunk
from prefill_worker.scratch import Scratch, most_kept
from router.batching import Rules
from router.placement import PrefillChoice, choose_prefill
from router.role_policy import DecodeSide, PrefillSide, Slo, choose
from tests.depth import deep
from tests.pure.town import BLOCK, Memory, PretendPrefill, Town, calm_answer

ROOM, MOST = 12, 7  # blocks of the pool, and how many of them may be kept


def hashes_of(ids: Sequence[int], salt: str = "") -> tuple[bytes, ...]:
    return extended([root(salt)], ids, BLOCK)[1:]


# ---- its blocks


@dataclass
class Filling:
    """One run that computes: what it must find in each of its blocks from now on."""

    hashes: tuple[bytes, ...]
    content: dict[int, object] = field(default_factory=dict)


class ScratchMachine(RuleBasedStateMachine):
    """Runs begin, compute, are finished or given up, in any order. A block's content is the hash that the
    real one's tokens have; whoever writes must be the only one who holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Scratch(ROOM, MOST)
        self.memory: dict[int, object] = {}
        self.runs: dict[str, Filling] = {}
        self.begun = 0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        rest=st.integers(0, BLOCK - 1),
        salt=st.sampled_from(["", "x"]),
    )
    def begin(self, prompt: list[int], rest: int, salt: str) -> None:
        ids = [token for token in prompt for _ in range(BLOCK)] + [9] * rest
        count, most = -(-len(ids) // BLOCK), (len(ids) - 1) // BLOCK
        run, hashes = f"r{self.begun}", hashes_of(ids, salt)
        self.begun += 1
        free = self.scratch.table.free_blocks
        if not self.scratch.take(run, count, hashes, most):
            assert self.scratch.table.free_blocks == free, (
                "a run that gets none leaves all as it was"
            )
            return
        known, table = self.scratch.known(run), self.scratch.held[run]
        assert len(table) == count
        assert known <= most, "nothing is left to compute"
        assert [self.memory[block] for block in table[:known]] == list(hashes[:known])
        others = {block for other in self.runs for block in self.scratch.held[other]}
        assert not others & set(table[known:]), "somebody else uses a block that is written"
        filling = self.runs[run] = Filling(hashes)
        for index, block in enumerate(table):
            if index >= known:
                self.memory[block] = hashes[index] if index < len(hashes) else run
            filling.content[block] = self.memory[block]

    @rule(data=st.data(), finished=st.booleans())
    def end(self, data: st.DataObject, finished: bool) -> None:
        if self.runs:
            run = data.draw(st.sampled_from(sorted(self.runs)))
            if finished:
                self.scratch.keep(run)
            self.scratch.give_back(run)
            del self.runs[run]
            self.scratch.give_back(run)  # again: no effect

    @invariant()
    def nothing_is_lost(self) -> None:
        table = self.scratch.table
        table.check()
        assert self.scratch.held.keys() == self.runs.keys()
        assert table.cached_blocks <= MOST
        assert table.idle or self.runs
        for filling in self.runs.values():
            assert all(self.memory[b] == what for b, what in filling.content.items())


TestScratch = ScratchMachine.TestCase
TestScratch.settings = settings(
    max_examples=deep(400, usual=40), stateful_step_count=deep(60, usual=30), deadline=None
)


def test_the_beginning_is_kept_longest_and_nothing_where_nothing_may_be() -> None:
    ids = list(range(10 * BLOCK))
    scratch = Scratch(ROOM, 3)
    assert scratch.take("a", 10, hashes_of(ids), 9)
    scratch.keep("a")
    scratch.give_back("a")
    assert scratch.table.cached_blocks == 3
    assert scratch.take("b", 10, hashes_of(ids), 9)
    assert scratch.known("b") == 3
    none = Scratch(ROOM)
    for run in "ab":
        assert none.take(run, 10, hashes_of(ids), 9)
        assert none.known(run) == 0
        none.keep(run)
        none.give_back(run)
    assert none.table.cached_blocks == 0


def test_how_much_is_kept_by_default() -> None:
    assert most_kept(100, 10, 16 * 500, reserved=True) == 100
    assert most_kept(100, 10, 16 * 500, reserved=False) == 50
    assert most_kept(100, 10, 10**9, reserved=False) == 100
    assert most_kept(100, 10**6, 10**6, reserved=False) == 0


# ---- who is chosen


def test_who_keeps_a_prompt_fills_it_unless_it_has_too_much_to_do() -> None:
    idle = PrefillChoice("p1", 0, {"d"})
    assert choose_prefill([idle, PrefillChoice("p2", 90, {"d"}, 100)], "d") == "p2"
    assert choose_prefill([idle, PrefillChoice("p2", 110, {"d"}, 100)], "d") == "p1"
    assert choose_prefill([idle, PrefillChoice("p2", 0, {"x"}, 100)], "d") == "p1"


@pytest.mark.parametrize(
    ("known", "span"),
    [
        (None, Span(600, 100)),
        (0, Span(0, 700)),
        (600, Span(600, 100)),
        (650, Span(650, 50)),
        (900, Span(699, 1)),
    ],
)
def test_what_a_prefill_worker_computes_of_a_prompt(known: int | None, span: Span) -> None:
    prefill = PrefillSide(Pace(0.001, 0.001), known=known)
    assert prefill.computes(Span(600, 100)) == span


def test_a_prefix_that_only_decode_has_is_filled_by_decode() -> None:
    """Computing it again on a prefill worker takes longer than the rest does here, beside streams."""
    pace = Pace(0.01, 0.001)
    decode = DecodeSide(pace, pace, pace, streams=1)
    slo = Slo(ttft_s=0.5, itl_s=0.05)
    prompt = Span(2000, 400)
    found = [choose(prompt, decode, PrefillSide(pace, known=known), slo) for known in (2000, 0)]
    assert [each.remote for each in found] == [True, False], found


# ---- answers


class CopyingPrefill(PretendPrefill):
    """Computes into memory of its own, and copies it when a prompt is done. `computed`: tokens."""

    room = 24, 16

    def __init__(self, town: Town) -> None:
        super().__init__(town)
        self.own, self.scratch, self.computed = Memory(), Scratch(*self.room), 0

    def attach(self, worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
        super().attach(worker, epoch, regions)
        return msg.Attached(worker, epoch, "frames", 1.0, "")

    def admit(self, grant: Grant, tokens: int, block_hashes: Sequence[bytes] = ()) -> bool:
        super().admit(grant, tokens)
        most = (tokens - 1) // BLOCK
        return self.scratch.take(grant.run, -(-tokens // BLOCK), block_hashes, most)

    def known(self, grant: Grant) -> int:
        return self.scratch.known(grant.run) * BLOCK

    def fill(self, worker: str, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            table = self.scratch.held[chunk.grant.run]
            cells = self.town.cells(chunk.token_ids, chunk.start, chunk.rope_floor, chunk.adapter)
            for offset, each in enumerate(cells):
                self.own.write(table, chunk.start + offset, each)
            self.computed += len(cells)

    def finish(self, grant: Grant, tokens: int) -> Receipt:
        source = self.scratch.held[grant.run]
        for position in range(len(grant.prefix) * BLOCK, tokens):
            read = self.own.read(source, position)
            assert read is not None
            self.pools[grant.worker].write(grant.table, position, read)
        self.scratch.keep(grant.run)
        self.scratch.give_back(grant.run)
        return super().finish(grant, tokens)

    def abandon(self, grant: Grant) -> None:
        self.scratch.give_back(grant.run)


class Apart(Town):
    """A town whose workers share no memory."""

    prefill_model = CopyingPrefill


class Roomy(CopyingPrefill):
    room = 64, 64


class RoomyTown(Apart):
    prefill_model = Roomy


LONG = list(range(100, 100 + 5 * BLOCK + 2))
PROMPTS = {
    "a": LONG,
    "b": [*LONG, *range(300, 300 + 2 * BLOCK + 1)],
    "c": [*LONG[: 3 * BLOCK], *range(500, 500 + 2 * BLOCK)],
    "d": [1, *LONG[1:]],  # the same but for the first token: nothing of it
}


def test_what_was_computed_before_is_not_computed_again() -> None:
    town = Apart(rules=Rules(4, 0.0, 64))
    (prefill,) = town.prefill_models
    assert isinstance(prefill, CopyingPrefill)
    computed, reused = {}, {}

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Filled):
            reused[message.run[0]] = message.reused

    town.before = before
    for name, prompt in PROMPTS.items():
        before_it = prefill.computed
        town.submit(name, prompt, 6)
        town.run_all([name])
        assert town.outcomes[name].tokens == calm_answer(prompt, 6)[0], name
        computed[name] = prefill.computed - before_it
    assert reused == {"a": 0, "b": 5 * BLOCK, "c": 3 * BLOCK, "d": 0}
    assert computed == {name: len(PROMPTS[name]) - 1 - reused[name] for name in PROMPTS}


def test_a_decode_worker_that_lacks_it_gets_it_without_computing() -> None:
    town = Apart(rules=Rules(4, 0.0, 64))
    (prefill,) = town.prefill_models
    assert isinstance(prefill, CopyingPrefill)
    for name in "ab":
        town.submit(name, LONG, 6)
        town.run_all([name])
        assert town.outcomes[name].tokens == calm_answer(LONG, 6)[0], name
        town.kill(next(each for each in town.nodes if each.startswith("decode")))
        town.run(lambda: len(town.router.workers.infos(town.now)) == 2)
    assert town.outcomes["b"].cached_tokens == 0
    assert prefill.computed == 2 * (len(LONG) - 1) - 5 * BLOCK


def test_of_two_prefill_workers_the_one_that_keeps_it_fills_the_next_turn() -> None:
    town = Apart(prefills=2, rules=Rules(4, 0.0, 64))
    town.run(lambda: len(town.router.workers.infos(town.now)) == 3)
    talks = {"x": list(range(1, 30)), "y": list(range(101, 130))}
    for name, prompt in talks.items():  # together: one each
        town.submit(f"{name}0", prompt, 6)
    town.run_all([f"{name}0" for name in talks])
    first, second = town.prefill_models
    assert isinstance(first, CopyingPrefill)
    assert isinstance(second, CopyingPrefill)
    assert first.computed == second.computed == 28
    for name in ("y", "x"):
        talk = [*talks[name], *town.outcomes[f"{name}0"].tokens, *range(200, 210)]
        town.submit(f"{name}1", talk, 6)
        town.run_all([f"{name}1"])
        assert town.outcomes[f"{name}1"].tokens == calm_answer(talk, 6)[0]
    assert first.computed == second.computed == 28 + (len(talk) - 1 - 28)


class Forgetful(CopyingPrefill):
    room = 24, 0


class ForgetfulTown(Apart):
    prefill_model = Forgetful


def test_of_a_worker_that_keeps_nothing_nothing_is_expected_for_long() -> None:
    town, expected = ForgetfulTown(rules=Rules(4, 0.0, 64)), []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Fill):
            entry = town.router.ledger.running(message.grant.run)
            assert entry is not None
            expected.append(sum(town.router._scheduler._kept.saved(entry).values()))

    town.before = before
    for turn in range(6):
        prompt = [*LONG, *range(700 + 20 * turn, 700 + 20 * turn + 2 * BLOCK)]
        town.submit(f"r{turn}", prompt, 4)
        town.run_all([f"r{turn}"])
        assert town.outcomes[f"r{turn}"].tokens == calm_answer(prompt, 4)[0]
    assert expected == [0, *[5 * BLOCK] * 3, 0, 0]


def test_a_fill_with_hashes_of_blocks_that_it_does_not_fill_is_refused() -> None:
    town = Apart()
    town.run(lambda: len(town.router.workers.infos(town.now)) == 2)
    (name,) = town.workers("prefill")
    (decode,) = town.workers("decode")
    grant = Grant(decode, f"{decode}/0", "r#0", 1, (0, 1))
    order = msg.Fill(grant, (1, 2, 3, 4, 5), block_hashes=(b"1", b"2"))
    (effect,) = town.nodes[name].handle(ROUTER, order, town.now)
    assert isinstance(effect, To)
    assert effect.message == msg.FillFailed("r#0", "2 block hashes for 5 tokens")


def test_an_adapter_reuses_only_its_own() -> None:
    adapters = tuple(Adapter(f"a{number}", str(number)) for number in (1, 2))
    town = RoomyTown(rules=Rules(4, 0.0, 64), adapters=adapters)
    reused = {}

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Filled):
            reused[message.run.partition("#")[0]] = message.reused

    town.before = before
    for turn in range(2):
        for adapter in ("", "1", "2"):
            name = f"{turn}/{adapter}"
            prompt = [*LONG, *range(700, 700 + turn * 2 * BLOCK)]
            town.submit(name, prompt, 4, adapter=adapter)
            town.run_all([name])
            assert town.outcomes[name].tokens == calm_answer(prompt, 4, adapter=adapter)[0], name
    assert reused == {f"{turn}/{a}": turn * 5 * BLOCK for turn in range(2) for a in ("", "1", "2")}


@pytest.mark.parametrize("at", range(2, 90, deep(1, usual=4)))
@pytest.mark.parametrize("victim", ["prefill", "decode", "cancel"])
def test_disturbed_the_answers_are_the_same(victim: str, at: int) -> None:
    town = Apart(prefills=2, decodes=2, blocks=24)
    for name, prompt in PROMPTS.items():
        town.submit(name, prompt, 6)

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if town.delivered == at:
            if victim == "cancel":
                town.client(msg.Abort("b"))
            else:
                town.kill(next(name for name in town.nodes if name.startswith(victim)))

    town.before = before
    town.run_all(PROMPTS)
    for name, prompt in PROMPTS.items():
        if (victim, name) != ("cancel", "b"):
            assert town.outcomes[name].tokens == calm_answer(prompt, 6)[0], name
    for each in town.prefill_models:
        assert isinstance(each, CopyingPrefill)
        each.scratch.table.check()
