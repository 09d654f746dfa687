"""The dashboard and the alerts of users rest on names: every one of them is there."""

import json
import re
from pathlib import Path

from baton.server.metrics import Metrics
from baton.wire.messages import ClusterInfo
from baton.wire.records import (
    ITL_BUCKETS_S,
    Counts,
    Ended,
    PoolInfo,
    RoleBacklog,
    Timings,
    Work,
    WorkerInfo,
    WorkerWork,
)

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana.json"


def full() -> Metrics:
    """Metrics with something to say about everything."""
    metrics = Metrics("demo")
    timings = Timings(0.1, 0.0, 0.2, 0.01, 0.5, 0.0, 0.3, 0.8, 100, 50, 1, 1, 2)
    metrics.ended(Ended("r", "stop", 9, 5, "shm", timings))
    metrics.ended(Ended("s", "worker_lost", 9, 5, "", timings))
    itl = tuple(range(len(ITL_BUCKETS_S) + 1))
    backlogs = RoleBacklog("decode", 3, 70, 1.5), RoleBacklog("prefill", 2, 60, 0.5)
    pools = (PoolInfo("d", 9, 4, 2, 1),)
    works = (WorkerWork("decode-0.a", "decode", Work((1, 2), 9, 2, 8, (2, 1))),)
    counts = Counts(1, 2, 50, 3, 4, 5, 6, 7, itl, 8.0, pools, backlogs, 1, works, "r/1")
    metrics.counted(counts)
    worker = WorkerInfo("decode-0.a", "decode", "cpu", "alive")
    metrics.info = ClusterInfo(True, "demo", "f", 9, 9, "float32", {}, (worker,), "")
    metrics.rejected("overloaded")
    return metrics


def values(text: str) -> dict[str, float]:
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_the_dashboard_asks_for_what_is_there() -> None:
    text = full().exposition().decode()
    told = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    asked = set(re.findall(r"baton:\w+", DASHBOARD.read_text()))
    assert len(asked) > 20
    assert asked <= told, asked - told
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_query_asks_for_labels_that_are_there() -> None:
    """What a query selects or groups by, and what a legend shows, is a label of the query's metrics:
    a label that does not exist is no error to Prometheus, but one series without a name."""
    labels: dict[str, set[str]] = {}
    for line in full().exposition().decode().splitlines():
        if found := re.match(r"([\w:]+)\{(.*)\} ", line):
            labels.setdefault(found[1], set()).update(re.findall(r'(\w+)="', found[2]))
    scraped = {"instance", "job"}  # Prometheus adds them
    checked = 0
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for target in panel["targets"]:
            query = target["expr"]
            metrics = re.findall(r"baton:\w+", query)
            known = scraped.union(*(labels[name] for name in metrics))
            lists = re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", query)
            asked = {each.strip() for words in lists for each in words.split(",") if each.strip()}
            asked |= set(re.findall(r"(\w+)\s*[=!]~?\"", query))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert asked | shown <= known, query
            assert shown <= asked or not re.search(r"\bsum\b", query), f"{query} drops {shown}"
            checked += len(asked)
    assert checked > 15


def test_no_two_panels_share_a_place() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]  # Grafana's columns
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_counts_are_passed_on_as_they_were_told() -> None:
    found = values(full().exposition().decode())
    assert found['baton:kv_blocks_leased{model_name="demo"}'] == 5
    assert found['baton:workers_lost_total{model_name="demo",role="decode"}'] == 6
    assert found['baton:num_preemptions_total{model_name="demo"}'] == 3
    assert found['baton:backlog_tokens{model_name="demo",role="prefill"}'] == 60
    assert found['baton:backlog_requests{model_name="demo",role="decode"}'] == 3
    assert found['baton:queue_age_seconds{model_name="demo",role="decode"}'] == 1.5
    buckets = sum(range(len(ITL_BUCKETS_S) + 1))
    assert found['baton:inter_token_latency_seconds_count{model_name="demo"}'] == buckets
    assert found['baton:inter_token_latency_seconds_sum{model_name="demo"}'] == 8.0
    assert found['baton:spec_decode_num_accepted_tokens_total{model_name="demo"}'] == 3
    assert found['baton:iteration_tokens_total_count{model_name="demo",role="decode"}'] == 3
    assert found['baton:num_requests_without_token{model_name="demo"}'] == 1
    assert found['baton:worker_up{model_name="demo",role="decode",worker="decode-0"}'] == 1


def test_what_one_request_took_is_observed_when_it_ends_well() -> None:
    found = values(full().exposition().decode())
    assert found['baton:request_success_total{finished_reason="stop",model_name="demo"}'] == 1
    assert found['baton:request_failure_total{model_name="demo",reason="worker_lost"}'] == 1
    assert found['baton:time_to_first_token_seconds_count{model_name="demo"}'] == 1
    assert found['baton:kv_transfer_bytes_total{model_name="demo",transport="shm"}'] == 50
    assert found['baton:prompt_tokens_total{model_name="demo"}'] == 18
    per_token = found['baton:request_time_per_output_token_seconds_sum{model_name="demo"}']
    assert abs(per_token - 0.125) < 1e-9


def test_before_anything_happened_there_is_something_to_read_too() -> None:
    found = values(Metrics("demo").exposition().decode())
    assert found['baton:prompt_tokens_total{model_name="demo"}'] == 0
    assert found['baton:router_up{model_name="demo"}'] == 0
