"""Trace: the stages of requests as a Chrome trace, for Perfetto (https://ui.perfetto.dev) or
chrome://tracing. The router's queue and each worker are processes; concurrent requests have rows of their
own; an arrow leads from a request's prefill to its decode.

Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import heapq
from collections.abc import Iterable
from itertools import pairwise
from math import inf
from typing import Any

from baton.timeline import Life, Stage, short_name

ROUTER = "router"
IN_QUEUE = ("queue", "reserve", "wait")
MICRO = 1e6


def chrome_trace(
    lives: Iterable[Life], *, model: str = "", now: float | None = None
) -> dict[str, Any]:
    """The trace as a JSON object. Open stages end at `now`, by default where the last stage begins."""
    every = list(lives)
    starts = [stage.start for life in every for stage in life.stages]
    ends = [s.end if s.end is not None else s.start for life in every for s in life.stages]
    latest = now if now is not None else max(ends, default=0.0)
    begin = min(starts, default=0.0)
    placed: dict[str, list[tuple[float, float, Stage, Life]]] = {ROUTER: []}
    shared = _shared(stage for life in every for stage in life.stages)
    for life in every:
        for stage in life.stages:
            end = stage.end if stage.end is not None else max(latest, stage.start)
            short = short_name(stage.worker)
            where = stage.worker if short in shared else short or "?"
            where = ROUTER if stage.name in IN_QUEUE else where
            placed.setdefault(where, []).append((stage.start - begin, end - begin, stage, life))
    events: list[dict[str, Any]] = []
    workers = placed.keys() - {ROUTER}
    names = [ROUTER, *sorted(workers, key=lambda name: (not name.startswith("prefill"), name))]
    for pid, name in enumerate(names):
        title = "queue (router)" if name == ROUTER else name
        events.append(_meta("process_name", pid, 0, name=title))
        events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
        events += _slices(pid, placed[name])
    events += _running(len(names), every, begin, latest)
    events.sort(key=lambda event: event.get("ts", -1.0))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"model": model}}


def _shared(stages: Iterable[Stage]) -> set[str]:
    """Short names of several workers that worked at the same time: no successors of each other, but
    workers that were started with one name. Only their full names tell them apart."""
    spans: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in stages:
        if stage.name in IN_QUEUE or not stage.worker:
            continue
        own = spans.setdefault(short_name(stage.worker), {})
        begin, end = own.get(stage.worker, (stage.start, stage.start))
        last = stage.end if stage.end is not None else inf
        own[stage.worker] = min(begin, stage.start), max(end, last)
    return {
        short
        for short, own in spans.items()
        if any(a[1] > b[0] for a, b in pairwise(sorted(own.values())))
    }


def _meta(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _slices(pid: int, placed: list[tuple[float, float, Stage, Life]]) -> list[dict[str, Any]]:
    """Each request has its own row while it is here; free rows are used again."""
    visits: list[list[tuple[float, float, Stage, Life]]] = []
    last: dict[str, list[tuple[float, float, Stage, Life]]] = {}
    for each in sorted(placed, key=lambda p: (p[0], p[1])):
        visit = last.get(each[3].request)
        if visit is not None and visit[-1][1] >= each[0]:  # it stayed here
            visit.append(each)
        else:
            last[each[3].request] = [each]
            visits.append(last[each[3].request])
    events: list[dict[str, Any]] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    rows = 0
    for visit in sorted(visits, key=lambda v: v[0][0]):
        while busy and busy[0][0] <= visit[0][0]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            row = heapq.heappop(free)
        else:
            rows += 1
            row = rows
            events.append(_meta("thread_name", pid, row, name=f"row {row}"))
        heapq.heappush(busy, (visit[-1][1], row))
        for start, end, stage, life in visit:
            events += _slice(pid, row, start, end, stage, life)
    return events


def _slice(
    pid: int, tid: int, start: float, end: float, stage: Stage, life: Life
) -> list[dict[str, Any]]:
    args = {
        "request": life.request,
        "prompt_tokens": life.prompt_tokens,
        "tokens": life.tokens,
        "ended": life.ended,
        **({"why": stage.why} if stage.why else {}),
        **({"reused_tokens": stage.reused} if stage.reused else {}),
    }
    where = {"pid": pid, "tid": tid}
    found = [
        {"ph": "X", "name": stage.name, "cat": "request", "args": args, **where,
         "ts": start * MICRO, "dur": (end - start) * MICRO},
    ]  # fmt: skip
    at = next(index for index, each in enumerate(life.stages) if each is stage)
    flow = {"name": "KV", "cat": "handover", "ts": start * MICRO, **where}
    if _hands_over(life, at):
        found.append({"ph": "s", "id": f"{life.request} {at + 1}", **flow})
    if _hands_over(life, at - 1):
        found.append({"ph": "f", "bp": "e", "id": f"{life.request} {at}", **flow})
    return found


def _hands_over(life: Life, at: int) -> bool:
    """Does an arrow lead from this stage to the next? A request that is filled again has several."""
    pair = [stage.name for stage in life.stages[max(at, 0) : at + 2]]
    return len(pair) == 2 and pair[0] in ("prefill", "handover") and pair[1] == "decode"


def _running(pid: int, lives: list[Life], begin: float, latest: float) -> list[dict[str, Any]]:
    """Counter events: how many requests decode at each time."""
    steps: list[tuple[float, int]] = []
    for life in lives:
        for stage in life.stages:
            if stage.name in ("decode", "stall"):
                end = stage.end if stage.end is not None else max(latest, stage.start)
                steps += [(stage.start - begin, 1), (end - begin, -1)]
    events = [_meta("process_name", pid, 0, name="requests that decode")] if steps else []
    count = 0
    for at, change in sorted(steps):
        count += change
        events.append(
            {"ph": "C", "name": "decoding", "pid": pid, "tid": 0, "ts": at * MICRO,
             "args": {"requests": count}}
        )  # fmt: skip
    return events
