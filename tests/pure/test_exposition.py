"""/metrics as Prometheus reads it: the text's form, counters that never fall, times that are observed
when they are known."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from baton.client.aio import RouterClient
from baton.errors import InputError
from baton.server.metrics import Metrics
from baton.server.monitor import Monitor
from baton.server.options import settings_from
from baton.server.totals import Totals
from baton.wire.messages import ClusterInfo, Observe, Observed
from baton.wire.records import (
    FORWARD_TOKENS,
    ITL_BUCKETS_S,
    Counts,
    Ended,
    FirstToken,
    PoolInfo,
    Timings,
    Work,
    WorkerInfo,
    WorkerWork,
)
from baton.wire.tally import Tally
from tests.pure.test_dashboard import full
from tests.pure.test_embedding_town import embed
from tests.pure.town import Town
from tests.pure.town_app import serving

TIMES = Timings(
    queue_s=0.5, prefill_s=0.25, handover_s=0.125, ttft_s=1.0, moved_bytes=64, cached_tokens=4
)
FIRST = FirstToken("r", 9, "pinned", TIMES)
ENDED = Ended("r", "stop", 9, 3, "pinned", replace(TIMES, total_s=3.0, decode_s=2.0))


def families(metrics: Metrics) -> list[Metric]:
    """As Prometheus reads the text."""
    return list(text_string_to_metric_families(metrics.exposition().decode()))


def values(found: Iterable[Metric]) -> dict[Any, float]:
    """Every sample by name and labels. None comes twice: Prometheus would drop one."""
    keyed = [
        ((each.name, *sorted(each.labels.items())), each.value)
        for family in found
        for each in family.samples
    ]
    assert [key for key, number in Counter(key for key, _ in keyed).items() if number > 1] == []
    return dict(keyed)


def samples(metrics: Metrics) -> dict[Any, float]:
    """Without the detour through a text."""
    return values(metrics.registry.collect())


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Of a series of model m."""
    return samples(metrics).get((f"baton:{name}", *sorted((labels | {"model_name": "m"}).items())))


def test_what_prefill_workers_reused_is_counted_where_they_filled() -> None:
    metrics = Metrics("m")
    metrics.started(replace(FIRST, timings=replace(TIMES, prefill_reused_tokens=3)))
    metrics.started(replace(FIRST, request="here", transport=""))
    assert value(metrics, "prefill_prefix_cache_queries_total") == 9
    assert value(metrics, "prefill_prefix_cache_hits_total") == 3
    assert value(metrics, "prefix_cache_queries_total") == 18
    assert value(metrics, "prefix_cache_hits_total") == 8


def only_grows(metrics: Metrics) -> dict[Any, float]:
    """Counters, and the parts of histograms."""
    return {
        (each.name, *sorted(each.labels.items())): each.value
        for family in metrics.registry.collect()
        if family.type in ("counter", "histogram")
        for each in family.samples
        if not each.name.endswith("_created")
    }


def check_form(metrics: Metrics) -> list[Metric]:
    """What promtool checks, and what a scrape would refuse. Returns what Prometheus reads."""
    text = metrics.exposition().decode()
    lines = text.splitlines()
    for word in ("# HELP ", "# TYPE "):
        named = Counter(line.split(" ")[2] for line in lines if line.startswith(word))
        assert {name for name, number in named.items() if number > 1} == set()
    found = list(text_string_to_metric_families(text))
    for family in found:
        assert family.type in ("counter", "gauge", "histogram"), family
        assert family.documentation
        if family.type == "counter":
            assert {each.name for each in family.samples} <= {f"{family.name}_total"}
            assert f"# TYPE {family.name}_total counter" in lines
        if family.type == "histogram":
            check_histogram(family)
    values(found)
    return found


def check_histogram(family: Metric) -> None:
    """Cumulative buckets in ascending order up to +Inf, which is the count."""
    by_labels: dict[Any, dict[str, Any]] = {}
    for each in family.samples:
        own = {name: text for name, text in each.labels.items() if name != "le"}
        found = by_labels.setdefault(tuple(sorted(own.items())), {"buckets": []})
        if each.name == f"{family.name}_bucket":
            found["buckets"].append((float(each.labels["le"]), each.value))
        else:
            found[each.name.removeprefix(family.name)] = each.value
    assert by_labels or not family.samples
    for found in by_labels.values():
        ends, counts = zip(*found["buckets"], strict=True)
        assert list(ends) == sorted(set(ends))
        assert list(counts) == sorted(counts)
        assert ends[-1] == math.inf
        assert counts[-1] == found["_count"]
        assert found["_sum"] >= 0


def counts_of(router: str, tokens: int, *works: WorkerWork) -> Counts:
    """Of a router that has seen so many tokens, all of one gap."""
    itl = (tokens, *(0 for _ in ITL_BUCKETS_S))
    return Counts(0, 0, tokens, tokens, 1, 0, 0, 0, itl, tokens / 4, (), works=works, router=router)


# ---- the form


def test_everything_there_is_to_say_is_said_in_the_right_form() -> None:
    check_form(full())
    check_form(Metrics("m"))


@settings(max_examples=10)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_labels_are_escaped(text: str) -> None:
    metrics = Metrics(text)
    metrics.rejected(text)
    metrics.ended(replace(ENDED, reason=text, transport=text))
    check_form(metrics)
    labels = {
        each for family in families(metrics) for s in family.samples for each in s.labels.items()
    }
    assert ("model_name", text) in labels
    assert ("transport", text) in labels


def test_a_name_that_is_no_text_can_be_shown() -> None:
    check_form(Metrics("caf\udce9"))


def test_a_worker_and_its_successor_are_one_series() -> None:
    metrics = full()
    workers = tuple(WorkerInfo(f"decode-0.{x}", "decode", "cpu", state)
                    for x, state in (("a", "leaving"), ("b", "alive"), ("c", "suspect")))  # fmt: skip
    metrics.info = ClusterInfo(True, "demo", "f", 9, 9, "float32", {}, workers, "")
    check_form(metrics)
    labels = (("model_name", "demo"), ("role", "decode"), ("worker", "decode-0"))
    assert samples(metrics)["baton:worker_up", *labels] == 1
    metrics.info = replace(metrics.info, workers=())
    assert samples(metrics)["baton:num_workers", *labels[:2]] == 0


def test_workers_of_one_name_are_told_apart_and_all_are_counted() -> None:
    def up(metrics: Metrics) -> dict[str, float]:
        found = samples(metrics).items()
        return {key[-1][1]: number for key, number in found if key[0] == "baton:worker_up"}

    def info(*workers: tuple[str, str, str]) -> ClusterInfo:
        rows = tuple(WorkerInfo(name, role, "cpu", state) for name, role, state in workers)
        return ClusterInfo(True, "demo", "f", 9, 9, "float32", {}, rows, "")

    metrics = Metrics("m")
    metrics.info = info(
        *((f"prefill.{boot}", "prefill", "alive") for boot in ("aa", "bb")),
        *((f"10.0.0.{host}.cc", "decode", "alive") for host in (7, 8)),
        ("bare", "decode", "suspect"),
    )
    assert up(metrics) == {
        "prefill.aa": 1, "prefill.bb": 1, "10.0.0.7": 1, "10.0.0.8": 1, "bare": 0,
    }  # fmt: skip
    for role in ("prefill", "decode"):
        assert value(metrics, "num_workers", role=role) == 2
    check_form(metrics)

    metrics.info = info(("decode.aa", "decode", "alive"), ("decode.bb", "decode", "alive"))
    names = "decode.aa", "decode.bb", "10.0.0.7.aa", "10.0.0.8.bb"
    pools = tuple(PoolInfo(name, 9, 4, 2, 1) for name in names)
    metrics.counted(replace(counts_of("r/1", 1), pools=pools))
    told = {dict(key[1:])["worker"] for key in samples(metrics) if "cache_config" in key[0]}
    assert told == {"decode.aa", "decode.bb", "10.0.0.7", "10.0.0.8"}
    check_form(metrics)


def test_every_name_has_the_prefix_but_those_of_the_process() -> None:
    metrics = Metrics("m", "vllm:")
    metrics.counted(counts_of("r/1", 3, WorkerWork("d.1", "decode", Work((1,), 3, 1, 4, (1, 0)))))
    metrics.started(FIRST)
    metrics.ended(ENDED)
    names = {family.name for family in families(metrics)}
    assert {name.split(":")[0].split("_")[0] for name in names} == {"vllm", "process"}
    told = {key[0] for key in samples(metrics)}
    assert "process_cpu_seconds_total" in told
    assert {f"vllm:{name}" for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total",
        "generation_tokens_total", "request_success_total", "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket", "iteration_tokens_total_bucket", "request_params_n_bucket",
        "request_params_max_tokens_bucket", "request_max_num_generation_tokens_bucket",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket", "request_inference_time_seconds_bucket",
        "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
        "request_prefill_kv_computed_tokens_bucket", "corrupted_requests_total",
        "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens_per_pos_total",
    )} <= told  # fmt: skip
    assert not any(name.startswith("baton:") for name in told)


@pytest.mark.parametrize("prefix", ["", "9", "vllm-", "a b", "é", "baton:\n", "a.", "{", 'x"'])
def test_a_prefix_that_cannot_begin_a_name_is_refused(prefix: str) -> None:
    with pytest.raises(InputError, match="--metrics-prefix") as refused:
        settings_from({"router": "", "model": "demo", "metrics_prefix": prefix})
    assert len(str(refused.value).splitlines()) == 1
    assert "[a-zA-Z_:]" in str(refused.value)


@pytest.mark.parametrize("prefix", ["baton:", "vllm:", "_", "A9_:", ":"])
def test_any_other_prefix_is_taken_and_passed_on(prefix: str) -> None:
    server = settings_from({"router": "", "model": "demo", "metrics_prefix": prefix})
    given_on = server.arguments()
    assert prefix == "baton:" or prefix in given_on
    check_form(Metrics("m", server.metrics_prefix))


# ---- when


def test_what_is_known_at_the_first_token_is_observed_then() -> None:
    metrics = Metrics("m")
    metrics.started(FIRST)
    early = {
        "time_to_first_token_seconds": 1.0, "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 0.25, "kv_transfer_seconds": 0.125,
        "request_prefill_kv_computed_tokens": 5,
    }  # fmt: skip
    for _ in range(2):  # before its end, and after
        for name, sum_ in early.items():
            assert value(metrics, f"{name}_count") == 1, name
            assert value(metrics, f"{name}_sum") == sum_, name
        assert value(metrics, "prompt_tokens_total") == 9
        assert value(metrics, "prefix_cache_hits_total") == 4
        assert value(metrics, "kv_transfer_bytes_total", transport="pinned") == 64
        if value(metrics, "e2e_request_latency_seconds_count") == 0:
            metrics.ended(ENDED)
    assert value(metrics, "e2e_request_latency_seconds_sum") == 3.0
    assert value(metrics, "request_inference_time_seconds_sum") == 2.5
    assert value(metrics, "request_success_total", finished_reason="stop") == 1


def test_what_this_server_has_not_seen_begin_is_observed_at_its_end() -> None:
    metrics = Metrics("m")
    metrics.ended(ENDED)
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "prompt_tokens_total") == 9
    assert value(metrics, "request_prefill_kv_computed_tokens_sum") == 5
    metrics.ended(replace(ENDED, request="s", reason="worker_lost"))
    assert value(metrics, "time_to_first_token_seconds_count") == 1


def test_an_embedding_generates_nothing_and_looks_up_no_prefix() -> None:
    metrics, town = Metrics("m"), Town()

    def observe(sender: str, receiver: str, message: object) -> None:
        if isinstance(message, Observed):
            for ended in message.ended:
                metrics.ended(ended)

    town.before = observe
    town.client(Observe(), "observer")
    embed(town, "e", range(2, 25))
    town.run_all(["e"])
    while not value(metrics, "request_success_total", finished_reason="stop"):
        town.turn()
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_prefill_kv_computed_tokens",
                 "request_prompt_tokens"):  # fmt: skip
        assert value(metrics, f"{name}_count") == 1, name
    for name in ("time_to_first_token_seconds", "request_generation_tokens",
                 "request_decode_time_seconds", "request_inference_time_seconds",
                 "request_time_per_output_token_seconds"):  # fmt: skip
        assert value(metrics, f"{name}_count") == 0, name
    assert value(metrics, "request_prefill_kv_computed_tokens_sum") == 23
    assert value(metrics, "prompt_tokens_total") == 23
    assert value(metrics, "prefix_cache_queries_total") == 0
    metrics.ended(Ended("f", "abort", 9, 0, "", Timings(), embedding=True))
    assert value(metrics, "prefix_cache_queries_total") == 0


def test_an_aborted_request_had_its_first_token_too() -> None:
    metrics = Metrics("m")
    metrics.started(FIRST)
    metrics.ended(replace(ENDED, reason="abort"))
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0


def test_a_hand_over_after_the_first_token_is_one_more() -> None:
    metrics = Metrics("m")
    metrics.started(FIRST)
    later = replace(ENDED.timings, handover_s=0.375, moved_bytes=200, retries=1)
    metrics.ended(replace(ENDED, timings=later))
    assert value(metrics, "kv_transfer_seconds_count") == 2
    assert value(metrics, "kv_transfer_seconds_sum") == 0.375
    assert value(metrics, "kv_transfer_bytes_total", transport="pinned") == 200
    assert value(metrics, "request_retries_total") == 1


def test_the_next_routers_first_token_of_a_request_is_not_its_first() -> None:
    metrics = Metrics("m")
    metrics.started(FIRST)
    metrics.started(replace(FIRST, timings=replace(TIMES, moved_bytes=16)))
    metrics.ended(replace(ENDED, timings=replace(ENDED.timings, moved_bytes=16)))
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "prompt_tokens_total") == 9
    assert value(metrics, "kv_transfer_bytes_total", transport="pinned") == 80
    metrics.started(
        replace(FIRST, request="s")
    )  # this one ends with another router, before it speaks
    metrics.ended(Ended("s", "abort", 9, 0, "", Timings()))
    assert value(metrics, "request_failure_total", reason="abort") == 1


def test_parameters_of_requests_and_their_longest_choice() -> None:
    metrics = Metrics("m")
    metrics.asked(2, [16, 16, 7, 7])
    metrics.answered(11)
    assert value(metrics, "request_params_n_sum") == 2
    assert value(metrics, "request_params_max_tokens_sum") == 46
    assert value(metrics, "request_params_max_tokens_count") == 4
    assert value(metrics, "request_max_num_generation_tokens_sum") == 11


# ---- counters never fall

works = st.builds(
    Work,
    st.lists(st.integers(0, 9), max_size=len(FORWARD_TOKENS) + 3).map(tuple),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
reports = st.builds(
    WorkerWork,
    st.sampled_from(["decode-0.a", "decode-0.b", "prefill-0.c", "stranger"]),
    st.sampled_from(["decode", "prefill"]),
    works,
)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.integers(0, 9), st.lists(reports, max_size=3),
            st.sampled_from(["none", "first", "end"]), st.integers(0, 3),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_no_counter_falls_whatever_dies(steps: list[Any]) -> None:
    """A router's totals begin anew with each router; workers come, go, come back, and say anything."""
    metrics, router, tokens, before = Metrics("m"), 0, 0, dict[Any, float]()
    for restarts, more, said, what, name in steps:
        router, tokens = (router + 1, more) if restarts else (router, tokens + more)
        metrics.counted(counts_of(f"r/{router}", tokens, *said))
        request = f"r{name}"
        if what == "first":
            metrics.started(replace(FIRST, request=request))
        elif what == "end":
            metrics.ended(replace(ENDED, request=request, timings=replace(TIMES, moved_bytes=more)))
        now = only_grows(metrics)
        assert {key: now.get(key, -1) for key in before if now.get(key, -1) < before[key]} == {}
        before = now
    check_form(metrics)


def test_totals_of_all_routers_and_of_workers_whoever_tells_them() -> None:
    totals, done = Totals(), Work((2, 1), 20, 3, 9, (3, 1))
    totals.add(counts_of("r/1", 5, WorkerWork("d.1", "decode", done)))
    totals.add(counts_of("r/1", 7, WorkerWork("d.2", "decode", done)))
    # A new router: d.1 is dead, d.2 goes on and tells its totals again.
    now = totals.add(counts_of("r/2", 2, WorkerWork("d.2", "decode", replace(done, tokens=30))))
    assert (now.generated_tokens, now.itl[0], now.itl_s, now.refills) == (9, 9, 2.25, 2)
    assert totals.add(counts_of("r/3", 1)).generated_tokens == 10
    assert totals.work("decode") == Work((4, 2), 50, 6, 18, (6, 2))
    assert totals.work("prefill") == Work()


def test_workers_that_are_long_gone_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.server.totals.REMEMBERED", 8)
    totals = Totals()
    for number in range(30):
        totals.add(counts_of("r/1", 0, WorkerWork(f"d.{number}", "decode", Work((1,), 2))))
    assert totals.work("decode").tokens == 60
    assert len(totals._works) == 8


def test_a_tally_adds_up_forwards_and_drafts() -> None:
    tally = Tally()
    assert tally.report() is None
    for tokens in (1, 2, 8, 9, 20_000):
        tally.forward(tokens)
    tally.draft(3, 2)
    tally.draft(1, 0)
    tally.draft(4, 4)
    done = tally.report()
    assert done is not None
    assert (done.forwards[:3], done.forwards[-1], done.tokens) == ((1, 2, 1), 1, 20_020)
    assert (done.drafts, done.draft_tokens, done.accepted) == (3, 8, (2, 2, 1, 1))


def test_a_clients_parameters_and_answers_are_observed_once() -> None:
    async def ask() -> dict[Any, float]:
        async with serving() as client:
            body = {"prompt": "In the future", "max_tokens": 6, "n": 2}
            for given in (body, body | {"stream": True}):
                answer = await client.ask("/v1/completions", given, submits=2)
                assert answer.status == 200
            text = (await client.ask("/metrics")).body.decode()
            return values(text_string_to_metric_families(text))

    found = asyncio.run(ask())
    pretend = ("model_name", "pretend")
    for name, count, sum_ in (
        ("request_params_n", 2, 4),
        ("request_params_max_tokens", 4, 24),
        ("request_max_num_generation_tokens", 2, 12),
    ):
        assert found[f"baton:{name}_count", pretend] == count, name
        assert found[f"baton:{name}_sum", pretend] == sum_, name


def test_the_page_shows_a_ttft_before_the_answers_end() -> None:
    monitor = Monitor(RouterClient("ipc:///nowhere"), Metrics("m"))
    monitor.observed(Observed(1.0, (), (), counts_of("r/1", 8), (FIRST,)))
    assert monitor.numbers()["ttft_ms"] == {"p50": 1000.0, "p99": 1000.0}
    monitor.observed(
        Observed(3.0, (), (), counts_of("r/2", 2))
    )  # another router: 2 more, not 6 less
    assert monitor.numbers()["tokens_per_s"] == 1.0
