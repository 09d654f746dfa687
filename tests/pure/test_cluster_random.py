"""Long random lives of whole clusters: anything, at any moment, in any order.

Every request ends once; with the tokens of a calm run unless it was taken back or ran out of tries;
every block is back in the end; no block is ever in two hands; nobody writes into another's blocks.
"""

import random
from collections.abc import Callable

import pytest

from baton.kv.grant import Grant
from baton.kv.region import Arrival, Receipt
from baton.lifecycle import LIVE
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from decode_worker.worker import ARRIVAL_S, DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.batching import Rules
from router.router import Router
from tests.pure.slow_loads import wrong_choices, wrong_counts
from tests.pure.town import Memory, Town, calm_answer

SHAKEN = ("abort", "worker_lost", "fill_failed")
"""Ends a request may have under fire besides its own."""


RECOUNT = 4
"""Turns from one recount of what the router counts to the next: it takes longer than the turns."""


class WildTown(Town):
    """A town whose messages take any order between channels (never within one), and whose pool
    remembers which run each block is for: a write by another run is caught in the act."""

    def __init__(self, dice: random.Random, **options: object) -> None:
        self.dice, self.turns = dice, 0
        super().__init__(**options)  # type: ignore[arg-type]

    def deliver_one(self) -> bool:
        full = sorted(c for c, queue in self.mail.items() if queue and c[1] not in self.stalled)
        if not full:
            return False
        chosen = self.dice.choice(full)
        self.mail = type(self.mail)(
            self.mail.default_factory, {chosen: self.mail[chosen], **self.mail}
        )
        return super().deliver_one()

    def turn(self) -> None:
        super().turn()
        for node in self.nodes.values():
            if isinstance(node, DecodeWorker):
                node.table.check()
        assert_states_agree(self.router)
        self.turns += 1
        if self.turns % RECOUNT == 0:
            assert not [*wrong_counts(self.router), *wrong_choices(self.router, self.now)]


def assert_states_agree(router: Router) -> None:
    """What the ledger says of each live request is complete."""
    ledger = router.ledger
    entries = ledger.in_state(*LIVE)
    assert len(entries) == len(ledger)
    for entry in entries:
        assert (entry.decode is None) == (entry.state.value == "queued"), entry
        assert len(entry.emitted) < entry.params.max_new_tokens, (
            f"{entry.id} has all its tokens and goes on"
        )


def town_of(dice: random.Random) -> WildTown:
    batch = dice.choice([1, 2, 4, 8])
    rules = Rules(
        batch_size=batch,
        window_s=dice.choice([0.0, 0.01]),
        token_budget=dice.choice([8, 64]),
        local_tokens=dice.choice([0, 0, 4]),
    )
    return WildTown(
        dice,
        prefills=dice.randint(1, 3),
        decodes=dice.randint(1, 3),
        blocks=dice.choice([8, 12, 40]),
        rules=rules,
        prefill_budget=dice.choice([1, 5, 16]),
    )


def prompts_of(dice: random.Random) -> dict[str, tuple[list[int], int]]:
    return {
        f"r{index}": (
            [dice.randrange(1, 900) for _ in range(dice.randint(1, 20))],
            dice.randint(1, 8),
        )
        for index in range(dice.randint(3, 14))
    }


def assert_ended(town: Town, prompts: dict[str, tuple[list[int], int]]) -> None:
    for name, (prompt, length) in prompts.items():
        outcome = town.outcomes[name]
        assert len(outcome.ends) == 1, f"{name} ended {outcome.ends}"
        tokens, reason = calm_answer(prompt, length)
        if outcome.ends[0] in SHAKEN:
            assert outcome.tokens == tokens[: len(outcome.tokens)], name
        else:
            assert (outcome.tokens, outcome.ends[0]) == (tokens, reason), name


def fire(town: Town, dice: random.Random, names: list[str], faults: int) -> Callable[..., None]:
    """Something bad before some messages, until so many bad things have happened."""
    left = [faults]

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if not left[0] or dice.random() > 0.04:
            return
        left[0] -= 1
        workers = town.workers()
        match dice.choice(["kill", "kill", "stall", "stall", "wake", "cancel", "all"]):
            case "kill":
                town.kill(dice.choice(workers))
            case "stall":
                town.stalled.add(dice.choice(workers))
            case "wake":
                town.stalled.clear()
            case "cancel":
                town.client(msg.Abort(dice.choice(names)))
            case "all":
                for worker in workers:
                    town.kill(worker)

    return before


def run_under_fire(
    town: Town, dice: random.Random, prompts: dict[str, tuple[list[int], int]], faults: int
) -> None:
    """Every request ends once and rightly, whatever happens to the workers meanwhile."""
    town.before = fire(town, dice, list(prompts), faults=faults)
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)

    def over() -> bool:
        if len(town.stalled) == len(town.workers()) or dice.random() < 0.02:
            town.stalled.clear()
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=12_000)
    town.before = None
    town.settle()
    assert_ended(town, prompts)


@pytest.mark.parametrize("seed", range(120))
def test_whatever_happens_every_request_ends_once_and_rightly(seed: int) -> None:
    dice = random.Random(seed)
    town, prompts = town_of(dice), prompts_of(dice)
    town.before = fire(town, dice, list(prompts), faults=dice.randint(0, 12))
    if dice.random() < 0.3:
        town.damage = lambda grant: dice.random() < 0.1
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)

    def over() -> bool:
        if len(town.stalled) == len(town.workers()):
            town.stalled.clear()  # somebody must be there to work
        if dice.random() < 0.02:
            town.stalled.clear()
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=6000)
    town.before = None  # no more faults: let it come to rest
    town.settle()
    assert_ended(town, prompts)


@pytest.mark.parametrize("seed", range(30))
def test_routers_die_too_and_what_is_asked_again_is_answered(seed: int) -> None:
    dice = random.Random(1000 + seed)
    town, prompts = town_of(dice), prompts_of(dice)
    deaths = dice.randint(1, 3)

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal deaths
        if deaths and dice.random() < 0.02:
            deaths -= 1
            town.kill(ROUTER if dice.random() < 0.7 else dice.choice(town.workers()))

    town.before = before
    for round_number in range(4):
        asked = {f"{name}.{round_number}": each for name, each in prompts.items()}
        for name, (prompt, length) in asked.items():
            town.submit(name, prompt, length)
        for _ in range(dice.randint(10, 60)):
            town.turn()
    town.before = None
    last = {f"{name}.last": each for name, each in prompts.items()}
    for name, (prompt, length) in last.items():
        town.submit(name, prompt, length)
    town.run_all(last)
    assert_ended(town, last)
    for outcome in town.outcomes.values():
        assert len(outcome.ends) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_come_and_go_all_the_time_leave_nothing_behind(seed: int) -> None:
    dice = random.Random(2000 + seed)
    town = town_of(dice)
    prompts: dict[str, tuple[list[int], int]] = {}
    for index in range(60):
        name = f"r{index}"
        prompts[name] = (
            [dice.randrange(1, 900) for _ in range(dice.randint(1, 16))],
            dice.randint(1, 8),
        )
        town.submit(name, *prompts[name])
        if dice.random() < 0.4:
            town.client(msg.Abort(dice.choice(list(prompts))))
        if dice.random() < 0.05:
            town.kill(dice.choice(town.workers()))
        for _ in range(dice.randint(0, 4)):
            town.turn()
    town.run_all(prompts)
    assert_ended(town, prompts)
    router = town.router
    assert not router.ledger._runs
    assert len(list(router.workers)) == len(town.workers())
    for node in town.nodes.values():
        if isinstance(node, PrefillWorker):
            assert not node._jobs
        if isinstance(node, DecodeWorker):
            assert (node.runs, node.arriving) == ({}, {})


# ---- a write that comes late


class Guarded(Memory):
    """A pool that knows, from its own table, whose each block is when somebody writes into it."""

    def __init__(self, worker: DecodeWorker) -> None:
        super().__init__()
        self.worker = worker

    def owner(self, block: int) -> str | None:
        held = self.worker.table._held.values()
        return next((h.grant.run for h in held if block in h.grant.blocks), None)

    def written(self, grant: Grant) -> None:
        """A prefill worker writes under this grant, now."""
        for block in grant.blocks:
            owner = self.owner(block)
            assert owner in (None, grant.run), f"{grant.run} wrote into a block of {owner}"
            assert block not in self.worker.table._free, f"{grant.run} wrote into a free block"


def guard(town: Town) -> None:
    """Look at every write of every prefill worker of this town, as it happens."""
    for node in town.nodes.values():
        if not isinstance(node, PrefillWorker) or hasattr(node._model, "guarded"):
            continue
        model, fill = node._model, node._model.fill

        def watched(worker: str, chunks: object, fill: Callable[..., None] = fill) -> None:
            decode = town.nodes.get(worker)
            if isinstance(decode, DecodeWorker):
                for chunk in chunks:  # type: ignore[attr-defined]
                    if chunk.grant.epoch.startswith(worker):
                        Guarded(decode).written(chunk.grant)
            fill(worker, chunks)

        model.fill = watched  # type: ignore[method-assign]
        model.guarded = True  # type: ignore[attr-defined]


def late_writer(victim_stalls_for: float = 20.0) -> tuple[Town, str]:
    """A prefill worker that was stalled with a Fill in hand, and given up; others took its work."""
    town = Town(prefills=2, decodes=1, blocks=8, prefill_budget=2)
    town.run(lambda: len(town.router.workers.infos(town.now)) == 3)
    town.turn()
    for index in range(4):
        town.submit(f"r{index}", range(index * 20 + 1, index * 20 + 13), 4)
    stalled = ""

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal stalled
        if not stalled and isinstance(message, msg.Fill):
            stalled = receiver

    town.before = before
    town.run(lambda: bool(stalled))
    town.stalled.add(stalled)
    assert isinstance(town.nodes[stalled], PrefillWorker)
    assert town.nodes[stalled]._jobs  # type: ignore[attr-defined]
    began = town.now
    town.run(lambda: town.now > began + victim_stalls_for)
    return town, stalled


def test_blocks_a_stalled_writer_may_still_write_to_are_given_to_nobody() -> None:
    town, stalled = late_writer()
    (decode,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
    quarantined = {b for q in decode.table._quarantine for b in q.blocks}
    in_hand = {b for j in town.nodes[stalled]._jobs.values() for b in j.grant.blocks}  # type: ignore[attr-defined]
    assert in_hand
    assert in_hand <= quarantined


def test_a_stalled_writer_that_wakes_and_writes_late_harms_nobody() -> None:
    town, _ = late_writer()
    for index in range(4, 10):  # new requests, in whatever blocks there are
        town.submit(f"r{index}", range(index * 20 + 1, index * 20 + 13), 4)
    for _ in range(6):
        town.turn()
    guard(town)
    town.stalled.clear()
    names = [f"r{index}" for index in range(10)]
    town.run_all(names)
    for index, name in enumerate(names):
        tokens, reason = calm_answer(range(index * 20 + 1, index * 20 + 13), 4)
        assert (town.outcomes[name].tokens, town.outcomes[name].ends) == (tokens, [reason])


@pytest.mark.parametrize("seed", range(60))
def test_no_prefill_worker_ever_writes_where_somebody_else_lives(seed: int) -> None:
    dice = random.Random(3000 + seed)
    town, prompts = town_of(dice), prompts_of(dice)
    shake = fire(town, dice, list(prompts), faults=10)

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        shake(sender, receiver, message)
        guard(town)

    town.before = before
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)

    def over() -> bool:
        if len(town.stalled) == len(town.workers()) or dice.random() < 0.02:
            town.stalled.clear()
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=6000)
    town.before = None  # no more faults: let it come to rest
    town.settle()
    assert_ended(town, prompts)


def test_a_fill_may_take_longer_than_a_lease() -> None:
    town = Town(patience_s=300.0)
    town.submit("a", range(1, 12), 4)

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Fill):
            town.stalled.add(receiver)

    town.before = before
    town.run(lambda: town.now > 150.0)
    town.stalled.clear()
    town.run_all(["a"])
    assert town.outcomes["a"].tokens == calm_answer(range(1, 12), 4)[0]
    assert town.router.ledger.late_reports == 0


def test_kv_that_never_arrives_is_filled_again() -> None:
    town = Town()
    (decode,) = [node for node in town.nodes.values() if isinstance(node, DecodeWorker)]
    looked = decode.model.arrival

    def arrival(grant: Grant, receipt: Receipt, tokens: int) -> Arrival:
        return Arrival.PENDING if grant.run == "a#0" else looked(grant, receipt, tokens)

    decode.model.arrival = arrival  # type: ignore[method-assign]
    town.submit("a", range(1, 12), 4)
    town.run(lambda: bool(town.outcomes["a"].ends), turns=30_000)
    town.settle()
    assert town.outcomes["a"].tokens == calm_answer(range(1, 12), 4)[0]
    assert town.now > ARRIVAL_S


def life_with_a_hanging_router(seed: int) -> None:
    """The router hangs for seconds, again and again; workers take it for dead and start anew."""
    dice = random.Random(seed)
    town, prompts = town_of(dice), prompts_of(dice)
    hangs = 4

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        nonlocal hangs
        guard(town)
        if hangs and dice.random() < 0.05:
            hangs -= 1
            town.stalled.add(ROUTER)

    town.before = before
    for name, (prompt, length) in prompts.items():
        town.submit(name, prompt, length)

    def over() -> bool:
        if dice.random() < 0.1:
            town.stalled.clear()
        return all(town.outcomes[name].ends for name in prompts)

    town.run(over, turns=6000)
    town.before = None
    town.settle()
    for name, (prompt, length) in prompts.items():
        outcome = town.outcomes[name]
        assert len(outcome.ends) == 1
        tokens, _ = calm_answer(prompt, length)
        assert outcome.tokens == tokens[: len(outcome.tokens)], name


@pytest.mark.parametrize("seed", range(40))
def test_a_router_that_hangs_and_comes_back_harms_nobody(seed: int) -> None:
    life_with_a_hanging_router(seed)
