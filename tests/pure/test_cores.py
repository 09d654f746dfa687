"""Cores: no two workers that are at work on one core, and no core unused while there is work."""

from hypothesis import given
from hypothesis import strategies as st

from baton.lifecycle import State
from baton.wire import messages as msg
from router.at_work import AtWork
from router.cores import shares
from tests.pure.test_cluster_nodes import PROMPTS, assert_calm, town_with_requests
from tests.pure.town import CORES, Town

WORKERS = ("decode-0", "decode-1", "prefill-0", "prefill-1", "prefill-2")


@given(
    st.integers(1, 12).map(lambda n: tuple(range(10, 10 + n))),
    st.integers(1, len(WORKERS)),
    st.sets(st.sampled_from(WORKERS)),
)
def test_shares(cores: tuple[int, ...], count: int, busy: set[str]) -> None:
    workers = WORKERS[:count]
    found = shares(cores, workers, busy)
    assert set(found) == set(workers)
    assert all(found.values())
    at_work = [worker for worker in workers if worker in busy]
    used = [core for worker in at_work for core in found[worker]]
    assert set(used) <= set(cores)
    if len(at_work) <= len(cores) and at_work:
        assert len(used) == len(set(used)), "two at work on one core"
    if at_work and count <= len(cores):
        assert set(used) == set(cores), "a core is left over"
    if count <= len(cores):
        sizes = [len(found[worker]) for worker in at_work]
        assert not sizes or max(sizes) - min(sizes) <= 2
        own = shares(cores, workers, ())
        assert all(set(own[worker]) <= set(found[worker]) for worker in workers)


def test_the_example_of_the_book() -> None:
    both = {"decode": (0,), "prefill": (1,)}
    assert shares((0, 1), ("decode", "prefill"), ()) == both
    assert shares((0, 1), ("decode", "prefill"), ("decode", "prefill")) == both
    assert shares((0, 1), ("decode", "prefill"), ("decode",))["decode"] == (0, 1)
    assert shares((0, 1), ("decode", "prefill"), ("prefill",))["prefill"] == (0, 1)


STEPS = st.lists(
    st.tuples(st.sampled_from(WORKERS), st.sampled_from(WORKERS), st.sampled_from(["+", "-", "share"])),
    max_size=30,
)  # fmt: skip


@given(st.integers(0, 12), STEPS)
def test_the_number_of_one_worker_s_cores_is_that_of_the_shares_of_all(
    cores: int, steps: list[tuple[str, str, str]]
) -> None:
    kept, reasons, sharers = AtWork(), list[str](), list[str]()
    for worker, other, what in steps:
        if what == "+":
            kept.add(worker)
            reasons.append(worker)
        elif what == "share":
            sharers = sorted({*sharers, worker} - {other}) if worker != other else []
            kept.share(sharers, cores)
        elif worker in reasons:
            kept.remove(worker)
            reasons.remove(worker)
        assert set(kept) == set(reasons)
        for beside in (None, other):
            busy = {*reasons, worker, *([beside] if beside else [])}
            there = worker in sharers and cores > 0
            wanted = len(shares(range(cores), sharers, busy)[worker]) if there else 0
            assert kept.cores(worker, beside) == wanted
            assert kept.alone(worker) == (
                len(shares(range(cores), sharers, {worker})[worker]) if there else 0
            )


def told(town: Town) -> dict[str, tuple[int, ...]]:
    """What every living worker computes on."""
    models = {
        name: getattr(node, "model", None) or getattr(node, "_model", None)
        for name, node in town.nodes.items()
        if name != "router"
    }
    return {name: model.cores for name, model in models.items() if hasattr(model, "cores")}


def test_who_is_at_work_has_cores_of_its_own() -> None:
    town = town_with_requests()
    seen = set()

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        ledger = town.router.ledger
        filling = {each.prefill for each in ledger.in_state(State.FILLING)}
        decoding = {each.decode for each in ledger.in_state(State.DECODING)}
        seen.add((len(filling), len(decoding)))

    town.before = before
    town.run_all(PROMPTS)
    assert_calm(town)
    assert {(0, 1), (1, 0)} & seen
    final = told(town)
    assert len(final) == 4
    assert sorted(core for cores in final.values() for core in cores) == list(CORES)


def test_a_lone_decode_worker_gets_all_cores_while_it_works() -> None:
    town = Town(prefills=1, decodes=1)
    town.submit("a", [5, 6, 7, 8], 8)
    widest: dict[str, int] = {}

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Cores):
            widest[receiver] = max(widest.get(receiver, 0), len(message.cores))

    town.before = before
    town.run_all(["a"])
    assert {name.split("-")[0]: count for name, count in widest.items()} == {
        "prefill": len(CORES),
        "decode": len(CORES),
    }


def test_a_worker_that_comes_back_is_told_again() -> None:
    town = Town(prefills=1, decodes=1)
    town.submit("a", [5, 6, 7], 4)
    town.run_all(["a"])
    town.kill(next(name for name in town.nodes if name.startswith("decode")))
    town.submit("b", [5, 6, 7], 4)
    town.run_all(["b"])
    assert len(told(town)) == 2


def test_a_decode_worker_has_its_cores_before_its_first_step() -> None:
    """What was filled together is started together, behind the cores that are free with its end."""
    town = Town(prefills=1, decodes=1, prefill_budget=64)
    orders: list[msg.Message] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        if receiver.startswith("decode") and isinstance(message, msg.Cores | msg.Start):
            orders.append(message)

    town.before = before
    for name in "abc":
        town.submit(name, [5, 6, 7, 8], 8)
    town.run_all("abc")
    starts = [i for i, message in enumerate(orders) if isinstance(message, msg.Start)]
    assert len(starts) == 3
    (*_, last) = [m for m in orders[: starts[-1]] if isinstance(m, msg.Cores)]
    assert last.cores == CORES
