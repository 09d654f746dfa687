"""Adapters in a cluster: each request has its own on all workers, whatever dies, and its own prefixes."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from baton.adapters.identity import MOST, Adapter
from baton.errors import RequestError
from baton.kv.grant import Grant
from baton.params import GenerationParams, Limits, check_request
from baton.wire import codec
from baton.wire import messages as msg
from baton.wire.orders import unfit_fill, unfit_start
from router.catalog import Catalog
from tests.pure.town import BLOCK, GREEDY, Town, calm_answer

SQL, LAW = Adapter("sql", "11"), Adapter("law", "22")
BOTH = (LAW, SQL)
PROMPT = range(1, 26)
ASKED = {"base": "", "sql": SQL.digest, "law": LAW.digest, "sql again": SQL.digest}
LENGTH = 6


def town_of_adapters(**options: object) -> Town:
    return Town(**{"prefills": 2, "decodes": 2, "adapters": BOTH} | options)


def ask(town: Town) -> None:
    for name, adapter in ASKED.items():
        town.submit(name, PROMPT, LENGTH, adapter=adapter)


def assert_right(town: Town) -> None:
    for name, adapter in ASKED.items():
        tokens, reason = calm_answer(PROMPT, LENGTH, adapter=adapter)
        assert (town.outcomes[name].tokens, town.outcomes[name].ends) == (tokens, [reason]), name
    answers = {tuple(town.outcomes[name].tokens) for name in ASKED}
    assert len(answers) == 3, "the pretend model heeds its adapters"


def messages_of_a_calm_run() -> int:
    town = town_of_adapters()
    ask(town)
    town.run_all(ASKED)
    assert_right(town)
    return town.delivered


CALM_MESSAGES = messages_of_a_calm_run()
DEATHS: dict[str, Callable[[Town], None]] = {
    "decode": lambda town: town.kill(town.workers("decode")[0]),
    "prefill": lambda town: town.kill(town.workers("prefill")[0]),
}


@pytest.mark.parametrize("role", DEATHS)
def test_a_death_before_any_message_changes_no_token(role: str) -> None:
    for at in range(1, CALM_MESSAGES, 3):
        town = town_of_adapters()
        ask(town)

        def before(sender: str, receiver: str, message: msg.Message, *, at=at, town=town) -> None:
            if town.delivered == at:
                DEATHS[role](town)

        town.before = before
        town.run_all(ASKED)
        assert_right(town)


@pytest.mark.parametrize("prefills", [0, 1])
def test_a_prefix_is_never_that_of_another_adapter(prefills: int) -> None:
    town = town_of_adapters(prefills=prefills, decodes=1)
    for turn, cached in ((1, 0), (2, len(PROMPT) // BLOCK * BLOCK)):
        for name, adapter in (("base", ""), ("sql", SQL.digest), ("law", LAW.digest)):
            request = f"{name} {turn}"
            town.submit(request, PROMPT, LENGTH, adapter=adapter)
            town.run_all([request])
            assert town.outcomes[request].tokens == calm_answer(PROMPT, LENGTH, adapter=adapter)[0]
            assert town.outcomes[request].cached_tokens == cached, request


def test_an_adapter_that_the_router_does_not_know_is_refused() -> None:
    town = town_of_adapters()
    town.submit("old", PROMPT, LENGTH, adapter="33")
    town.run_all(["old"])
    assert town.outcomes["old"].ends == ["model_not_found"]
    assert "adapter 33 is not loaded here, but law (22), sql (11)" in town.outcomes["old"].why


def test_the_router_tells_its_adapters() -> None:
    town = town_of_adapters()
    town.client(msg.GetClusterInfo())
    town.run(lambda: bool(town.infos))
    assert town.infos[-1].adapters == BOTH


def hello_of(town: Town, role: str) -> msg.Hello:
    (name,) = town.workers(role)
    return town.router.workers.get(name).hello


def test_a_worker_with_other_adapters_cannot_join() -> None:
    town = town_of_adapters(prefills=0, decodes=1)
    town.run(lambda: bool(town.router.workers.hellos))
    hello = hello_of(town, "decode")
    catalog = Catalog(BOTH, model="pretend")
    assert catalog.rejection(hello) is None
    changed = Adapter("sql", "12")  # the same name, another folder
    for theirs, shown in (((), "no adapters"), ((LAW, changed), "law (22), sql (12)")):
        why = catalog.rejection(replace(hello, adapters=theirs))
        assert why is not None
        assert why.startswith(
            f"the worker has {shown}, the router law (22), sql (11): start both with"
        )


def test_an_engine_is_not_told_of_an_option_that_it_lacks() -> None:
    town = town_of_adapters(prefills=0, decodes=1)
    town.run(lambda: bool(town.router.workers.hellos))
    engine = replace(hello_of(town, "decode"), role="engine", adapters=())
    why = Catalog(BOTH, model="pretend").rejection(engine)
    assert why is not None
    assert "other engines cannot serve beside adapters" in why
    assert "same --lora" not in why


def test_refusals_for_the_most_and_longest_adapters_reach_their_receiver() -> None:
    """A message beyond the bounds of its fields is dropped, and whoever waits for it waits for ever."""
    most = tuple(Adapter(f"{i:04}".rjust(256, "n"), f"{i:032x}") for i in range(MOST))
    other = (*most[:-1], replace(most[-1], digest="f" * 32))
    town = town_of_adapters(prefills=0, decodes=1, adapters=most)
    town.run(lambda: bool(town.router.workers.hellos))
    hello = hello_of(town, "decode")
    refused = Catalog(most, model="pretend").rejection(replace(hello, adapters=other))
    assert refused is not None
    assert f"{other[-1].name} (ffffffffffff) of the worker" in refused
    params = town_params("33")
    with pytest.raises(RequestError) as failed:
        check_request((1,), params, Limits(context=100, vocabulary=10, adapters=most))
    held = [each.digest for each in most]
    start = unfit_start(msg.Start("r#0", (1, 2), 2, params), hello, 10, held)
    fill = msg.Fill(Grant(hello.worker, hello.epoch, "r#0", 1, (0,)), (1, 2), adapter="33")
    unfilled = unfit_fill(fill, hello, 10, held, pool=(hello.epoch, 4))
    for sent in (
        msg.Refused(refused),
        msg.Failed("r", "model_not_found", str(failed.value)),
        msg.RunFailed("r#0", "worker_error", start),
        msg.FillFailed("r#0", unfilled),
    ):
        assert codec.decode(codec.encode(sent)) == sent


def test_a_worker_carries_out_no_order_for_an_adapter_that_it_lacks() -> None:
    town = town_of_adapters(prefills=0, decodes=1)
    town.run(lambda: bool(town.router.workers.hellos))
    hello = hello_of(town, "decode")
    params = town_params("33")
    start = msg.Start("r#0", (1, 2), 2, params)
    assert "adapter 33 is not loaded here" in unfit_start(start, hello, 10, ("11", "22"))
    assert not unfit_start(replace(start, params=town_params("11")), hello, 10, ("11", "22"))
    grant = Grant(hello.worker, hello.epoch, "r#0", 1, (0,))
    fill = msg.Fill(grant, (1, 2), adapter="33")
    pool = hello.epoch, 4
    assert "adapter 33 is not loaded here" in unfit_fill(fill, hello, 10, ("22",), pool=pool)
    assert not unfit_fill(replace(fill, adapter="22"), hello, 10, ("22",), pool=pool)


def town_params(adapter: str) -> GenerationParams:
    return GenerationParams(4, GREEDY, adapter=adapter)
