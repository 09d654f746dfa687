"""Embeddings in a town: computed by prefill workers alone, whoever dies meanwhile."""

from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from baton.errors import TransferError
from baton.kv.grant import Grant
from baton.kv.region import Region
from baton.params import GenerationParams
from baton.wire import messages as msg
from router.batching import Rules
from tests.pure.town import ROUTER, Town, calm_answer

PROMPTS: dict[str, list[int]] = {"long": [*range(2, 25)], "short": [3], "equal": [*range(2, 25)]}


def embed(town: Town, name: str, prompt: Sequence[int], **more: Any) -> None:
    params = GenerationParams(1)
    town.client(msg.Submit(name, tuple(prompt), params, **{"pooling": "mean"} | more))


def embedding(prompt: Sequence[int]) -> bytes:
    """What the town's prefill workers make of it: each token, once and in order."""
    return array("f", prompt).tobytes()


def check(town: Town) -> None:
    for name, prompt in PROMPTS.items():
        outcome = town.outcomes[name]
        assert (outcome.ends, outcome.tokens) == (["stop"], [])
        assert outcome.embedding == embedding(prompt)
        assert outcome.cached_tokens == 0


def test_prefill_computes_all_tokens_and_decode_is_asked_for_none() -> None:
    town, orders = Town(), list[str]()
    town.before = lambda sender, receiver, message: orders.append(type(message).__name__)
    for name, prompt in PROMPTS.items():
        embed(town, name, prompt)
    town.run_all(PROMPTS)
    check(town)
    assert orders.count("Embedded") == len(PROMPTS)
    assert not {"Start", "Decoded", "Filled"} & set(orders)
    assert not any(model.pooled for model in town.prefill_models)


def test_generation_beside_them_is_not_changed() -> None:
    town = Town()
    town.submit("talk", [5, 6, 7, 8, 9, 10, 11], 6)
    for name, prompt in PROMPTS.items():
        embed(town, name, prompt)
    town.submit("after", PROMPTS["long"], 4)
    town.run_all([*PROMPTS, "talk", "after"])
    check(town)
    assert town.outcomes["talk"].tokens == calm_answer([5, 6, 7, 8, 9, 10, 11], 6)[0]
    assert town.outcomes["after"].tokens == calm_answer(PROMPTS["long"], 4)[0]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_each_ends_once_with_the_same_embedding_whoever_dies_before_any_message(role: str) -> None:
    calm = Town(prefills=2, decodes=2)
    for name, prompt in PROMPTS.items():
        embed(calm, name, prompt)
    calm.run_all(PROMPTS)
    for moment in range(5, calm.delivered, 2):
        town = Town(prefills=2, decodes=2)

        def kill(sender: str, receiver: str, message: msg.Message) -> None:
            if town.delivered == moment:  # noqa: B023
                town.kill(town.workers(role)[0])  # noqa: B023

        town.before = kill
        for name, prompt in PROMPTS.items():
            embed(town, name, prompt)
        town.run_all(PROMPTS)
        check(town)


def test_one_that_is_aborted_gives_everything_back() -> None:
    for event in ("Reserve", "Fill", "ChunkFilled", "Embedded"):
        town, done = Town(), list[str]()

        def abort(sender: str, receiver: str, message: msg.Message) -> None:
            if type(message).__name__ == event and not done:  # noqa: B023
                done.append(event)  # noqa: B023
                town.client(msg.Abort("long"))  # noqa: B023

        town.before = abort
        embed(town, "long", PROMPTS["long"])
        town.run_all(["long"])
        assert done
        assert town.outcomes["long"].ends in (["abort"], ["stop"])
        assert not any(model.pooled for model in town.prefill_models)


def test_without_prefill_workers_it_waits_for_one_and_a_colocated_cluster_refuses_it() -> None:
    town = Town(prefills=0)
    embed(town, "late", [3, 4], queue_timeout_s=5.0)
    town.run_all(["late"])
    assert town.outcomes["late"].ends == ["queue_timeout"]

    town = Town(
        prefills=0, rules=Rules(batch_size=4, window_s=0.0, token_budget=64, colocated=True)
    )
    embed(town, "never", [3, 4])
    embed(town, "strange", [3, 4], pooling="sum")
    town.run_all(["never", "strange"])
    assert town.outcomes["never"].ends == ["unsupported"]
    assert "prefill workers" in town.outcomes["never"].why


def test_bytes_that_are_no_vector_are_a_failed_fill() -> None:
    town, broken = Town(), list[str]()

    def embedded(grant: Grant) -> bytes:
        broken.append(grant.run)
        return b"12345" if len(broken) == 1 else embedding(PROMPTS["long"])

    town.prefill_models[0].embedded = embedded  # type: ignore[method-assign]
    embed(town, "long", PROMPTS["long"])
    town.run_all(["long"])
    assert len(broken) == 2
    assert town.outcomes["long"].embedding == embedding(PROMPTS["long"])
    assert town.router.reports.forged == 1


def test_an_unknown_pooling_and_false_reports_are_refused() -> None:
    town = Town()
    embed(town, "sum", [3, 4], pooling="sum")
    town.run_all(["sum"])
    assert town.outcomes["sum"].ends == ["invalid_request"]
    assert "mean, last" in town.outcomes["sum"].why

    forged = list[str]()

    def forge(sender: str, receiver: str, message: msg.Message) -> None:
        """A prefill worker that answers a fill with an embedding."""
        if isinstance(message, msg.Fill) and not forged:
            forged.append(receiver)
            lie = msg.Embedded(message.grant.run, b"1234", 0.0)
            town.mail[receiver, ROUTER].append(lie)

    town.before = forge
    prompt = [5, 6, 7, 8, 9, 10, 11]
    town.submit("talk", prompt, 3)
    town.run_all(["talk"])
    assert forged
    assert town.outcomes["talk"].tokens == calm_answer(prompt, 3)[0]
    assert town.router.reports.forged == 1


def test_one_that_has_blocks_when_the_last_prefill_worker_goes_waits_without_them() -> None:
    """Else it would wait for ever: its deadline ended with its grant, and nobody fills it."""
    town = Town(blocks=16)
    town.submit("first", [5, 6, 7, 8, 9], 3)
    town.run_all(["first"])
    prefill = town.workers("prefill")[0]
    reserved = list[str]()

    def gone(sender: str, receiver: str, message: msg.Message) -> None:
        if isinstance(message, msg.Reserved):
            reserved.append(message.grant.run)
            if prefill in town.nodes:
                town.kill(prefill, restart=False)

    town.before = gone
    embed(town, "waits", range(2, 16), queue_timeout_s=5.0)
    embed(town, "goes on", range(2, 16))
    for _ in range(20):
        town.turn()
    town.before = None
    assert reserved
    town.submit("talk", [5, 6, 7, 8, 9], 3)  # takes blocks that the embeddings had
    town.run(lambda: bool(town.outcomes["waits"].ends and town.outcomes["talk"].ends))
    assert town.outcomes["waits"].ends == ["queue_timeout"]
    assert town.outcomes["talk"].tokens == calm_answer([5, 6, 7, 8, 9], 3)[0]
    assert not town.outcomes["goes on"].ends
    town.start_worker("prefill", 0)
    town.run_all(["goes on"])
    assert town.outcomes["goes on"].embedding == embedding(range(2, 16))


def degraded(case: str) -> Town:
    """A town in which the decode worker fills by itself: its prefill worker is gone, or cannot write."""
    town = Town()
    town.submit("first", [5, 6, 7, 8, 9], 3)
    town.run_all(["first"])
    [prefill], [decode] = town.workers("prefill"), town.workers("decode")
    if case == "gone":
        town.kill(prefill, restart=False)
    else:
        failing = town.prefill_models[0]

        def attach(worker: str, epoch: str, regions: Sequence[Region]) -> msg.Attached:
            raise TransferError("no way")

        failing.attach = attach  # type: ignore[method-assign]
        town.mail[prefill, ROUTER].append(msg.WayLost(decode, f"{decode}/0", "cut", ()))
    town.submit("probe", [5, 6, 7, 8, 9], 3)
    town.run_all(["probe"])
    return town


@pytest.mark.parametrize("case", ["gone", "all ways down"])
def test_while_no_worker_can_compute_them_they_stop_nobody_and_later_they_go_on(case: str) -> None:
    town = degraded(case)
    embed(town, "timed", [3, 4, 5], queue_timeout_s=5.0)
    for number in range(3):
        embed(town, f"embed {number}", [3, 4 + number])
        town.submit(f"talk {number}", [5, 6, 7, 8, 9 + number], 3)
    talks = [f"talk {number}" for number in range(3)]
    town.run(lambda: all(town.outcomes[name].ends for name in [*talks, "timed"]))
    for number, name in enumerate(talks):
        assert town.outcomes[name].tokens == calm_answer([5, 6, 7, 8, 9 + number], 3)[0]
    assert town.outcomes["timed"].ends == ["queue_timeout"]
    assert not any(town.outcomes[f"embed {number}"].ends for number in range(3))
    town.client(msg.Abort("embed 1"))
    if case == "gone":
        town.start_worker("prefill", 0)
    else:
        del town.prefill_models[0].attach
    town.run_all(["embed 0", "embed 1", "embed 2"])
    assert town.outcomes["embed 1"].ends == ["abort"]
    for number in (0, 2):
        assert town.outcomes[f"embed {number}"].embedding == embedding([3, 4 + number])
