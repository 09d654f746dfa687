"""Prefix caching: what is computed once is used again, by the right requests only, and never written."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.blocks import ANY_WRITER, BlockTable
from baton.kv.grant import Grant
from baton.kv.prefix import extended, root
from baton.wire import messages as msg
from router.batching import Rules
from tests.pure.town import BLOCK, Town, calm_answer

IDS = st.lists(st.integers(0, 5), max_size=40)


@given(IDS, st.integers(1, 7), st.text(max_size=3))
def test_a_chain_has_a_root_and_a_name_for_each_full_block(
    ids: list[int], size: int, salt: str
) -> None:
    chain = extended([root(salt)], ids, size)
    assert len(chain) == 1 + len(ids) // size
    assert len(set(chain)) == len(chain)


@given(IDS, IDS, st.integers(1, 5))
def test_names_are_equal_exactly_as_far_as_the_sequences_are(
    a: list[int], b: list[int], size: int
) -> None:
    one, two = (extended([root()], ids, size)[1:] for ids in (a, b))
    for i, (name, other) in enumerate(zip(one, two, strict=False)):
        assert (name == other) is (a[: (i + 1) * size] == b[: (i + 1) * size])


@given(IDS, st.integers(1, 5), st.integers(0, 40))
def test_a_chain_goes_on_where_it_was(ids: list[int], size: int, cut: int) -> None:
    begun = extended([root()], ids[:cut], size)
    assert extended(begun, ids, size) == extended([root()], ids, size)


def test_another_salt_is_another_circle() -> None:
    assert extended([root("a")], [1, 2], 2)[1:] != extended([root("b")], [1, 2], 2)[1:]


@dataclass
class Walk:
    """A table, what its blocks hold, and who reads and writes them: random steps, checked after each."""

    dice: random.Random
    table: BlockTable = field(default_factory=lambda: BlockTable("d", "e0", 12, 10.0))
    grants: dict[str, Grant] = field(default_factory=dict)
    chains: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    content: dict[int, bytes] = field(default_factory=dict)  # block -> name of what is in it
    writing: dict[str, tuple[int, ...]] = field(default_factory=dict)  # quarantined: still written
    serial: int = 0

    def reserve(self) -> None:
        self.serial += 1
        run = f"r{self.serial}"
        ids = [self.dice.randrange(2) for _ in range(self.dice.randrange(1, 5))]
        chain = extended([root()], ids, 1)[1:]
        count = len(chain) + self.dice.randrange(1, 3)
        grant = self.table.reserve(run, count, 0.0, chain)
        if grant is None:
            assert count > self.table.free_blocks - len(chain)
            return
        for block, name in zip(grant.prefix, chain, strict=False):
            assert self.content[block] == name, "the prefix is not what its name says"
        live = {b for other in self.grants.values() for b in other.table}
        late = {b for blocks in self.writing.values() for b in blocks}
        assert not set(grant.blocks) & (live | late), "a block that somebody reads or writes"
        for block in grant.blocks:
            self.content.pop(block, None)
        self.grants[run], self.chains[run] = grant, chain

    def start(self) -> None:
        if run := self.pick(set(self.grants) - self.started):
            self.table.start(run)
            self.started.add(run)
            grant, chain = self.grants[run], self.chains[run]
            for block, name in list(zip(grant.table, chain, strict=False))[len(grant.prefix) :]:
                self.content[block] = name
            self.table.publish(run, chain)

    def end(self) -> None:
        if run := self.pick(set(self.grants)):
            writer = None if run in self.started else self.dice.choice([None, "w", ANY_WRITER])
            self.table.release(run, writer)
            if writer and self.table.writers:
                self.writing[run] = self.grants[run].blocks
            self.forget(run)

    def writer(self) -> None:
        run = self.pick(set(self.writing))
        match self.dice.randrange(4):
            case 0:
                self.table.writer_joined("w")
            case 1 if run:
                self.table.writer_released("w", run)
                del self.writing[run]
            case 2:
                self.table.writer_clear("w")
                self.writing.clear()

    def anew(self) -> None:
        if self.dice.random() < 0.05:
            for run in list(self.grants):
                if self.table.writers:
                    self.writing[run] = self.grants[run].blocks
                self.forget(run)
            self.table.renew_epoch("e1")
            self.content.clear()

    def pick(self, runs: set[str]) -> str | None:
        return self.dice.choice(sorted(runs)) if runs else None

    def forget(self, run: str) -> None:
        del self.grants[run], self.chains[run]
        self.started.discard(run)


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_no_block_has_two_owners_and_no_name_lies(seed: int) -> None:
    walk = Walk(random.Random(seed))
    steps = [walk.reserve, walk.reserve, walk.start, walk.start, walk.end, walk.writer, walk.anew]
    for _ in range(200):
        walk.dice.choice(steps)()
        walk.table.check()
    walk.table.writer_clear("w")
    for run in list(walk.grants):
        walk.table.release(run, None)
    walk.table.check()
    assert walk.table.idle


LONG = list(range(100, 100 + 5 * BLOCK + 2))
PROMPTS = {
    "a": LONG,
    "b": LONG,  # the same
    "c": [*LONG[: 3 * BLOCK], 7, 8, 9],  # the same beginning
    "d": [1, *LONG[1:]],  # the same but for the first token: nothing of it
    "e": [*LONG, *calm_answer(LONG, 6)[0], 50, 51],  # goes on after the answer, as a chat does
}


@pytest.mark.parametrize("options", [{}, {"prefills": 2, "decodes": 1}, {"prefills": 0}])
def test_one_after_the_other_they_use_what_is_there(options: dict[str, int]) -> None:
    rules = Rules(4, 0.0, 64, colocated=options.get("prefills") == 0)
    town = Town(rules=rules, **options)
    for name, prompt in PROMPTS.items():
        town.submit(name, prompt, 6)
        town.run_all([name])
        assert town.outcomes[name].tokens == calm_answer(prompt, 6)[0], name
    cached = {name: town.outcomes[name].cached_tokens for name in PROMPTS}
    assert cached["e"] >= 6 * BLOCK
    del cached["e"]
    assert cached == {"a": 0, "b": 5 * BLOCK, "c": 3 * BLOCK, "d": 0}


def test_another_salt_shares_nothing() -> None:
    town = Town()
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        town.submit(name, LONG, 3, cache_salt=salt)
        town.run_all([name])
    cached = {name: town.outcomes[name].cached_tokens for name in "abc"}
    assert cached == {"a": 0, "b": 0, "c": 5 * BLOCK}


@pytest.mark.parametrize("at", range(2, 90, 2))
@pytest.mark.parametrize("victim", ["prefill", "decode", "cancel"])
def test_together_and_disturbed_the_answers_are_right(victim: str, at: int) -> None:
    town = Town(prefills=2, decodes=2, blocks=24)
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


def test_a_small_pool_gives_up_what_was_used_longest_ago() -> None:
    town = Town(blocks=12)
    for turn in range(6):
        prompt = [turn * 50 + i for i in range(4 * BLOCK)]
        town.submit(f"r{turn}", prompt, 4)
        town.run_all([f"r{turn}"])
        assert town.outcomes[f"r{turn}"].tokens == calm_answer(prompt, 4)[0]


def test_the_next_turn_of_a_conversation_goes_where_the_last_one_was() -> None:
    town = Town(decodes=3)
    town.run(lambda: len(town.router.workers.infos(town.now)) == 4)
    talks = {
        name: list(range(start, start + 20)) for name, start in (("a", 1), ("b", 101), ("c", 201))
    }
    for name, prompt in talks.items():
        town.submit(f"{name}0", prompt, 6)
    town.run_all([f"{name}0" for name in talks])
    for name in ("c", "a", "b"):  # in another order
        talks[name] += [*town.outcomes[f"{name}0"].tokens, 7, 8, 9]
        town.submit(f"{name}1", talks[name], 6)
        town.run_all([f"{name}1"])
        assert town.outcomes[f"{name}1"].cached_tokens >= 20
        tokens, reason = calm_answer(talks[name], 6)
        assert (town.outcomes[f"{name}1"].tokens, town.outcomes[f"{name}1"].ends) == (
            tokens,
            [reason],
        )
