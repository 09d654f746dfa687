"""Hand-over cost against prompt length, by every transport that runs here: real requests through a
cluster that has no other way (`kv_transport`), one at a time.

Bytes and time are of one event, the writer's receipt: from the first push of a request's blocks until
they are all on their way and sealed. So GB/s may be compared with what this machine's memory reads,
and must stay below it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from baton.errors import BatonError
from tools.lab.disagg_handed import Handed
from tools.lab.disagg_plan import PREFILL_TOKENS, TRANSPORTS, Plan
from tools.lab.study import Notebook
from tools.measure.limits import BUFFER, best
from tools.measure.slo import Trace
from tools.measure.split import Split, options_for, running
from tools.measure.workload import single

NEW_TOKENS = 2


def measure_handover(plan: Plan, notebook: Notebook) -> list[Handed]:
    """Every transport, every length, several times."""
    lengths = []
    for length in plan.lengths:
        if 2 <= length <= plan.context - NEW_TOKENS:
            lengths.append(length)
        else:
            why = f"{plan.model} takes prompts of 2 to {plan.context - NEW_TOKENS} tokens here"
            notebook.failed(f"hand-over of {length} tokens", why)
    found: list[Handed] = []
    for transport in TRANSPORTS if lengths else ():
        notebook.say(f"hand-over by {transport}")
        try:
            for handed in _by(transport, lengths, plan):
                notebook.record("handover", **asdict(handed))
                found.append(handed)
        except (BatonError, OSError) as error:
            notebook.failed(f"hand-over by {transport}", error)
    return found


def _by(transport: str, lengths: Sequence[int], plan: Plan) -> Iterator[Handed]:
    split = Split(transport, False, PREFILL_TOKENS)
    options = options_for(split, model=plan.model, dtype=plan.dtype, streams=4)
    with running(split, replace(options, kv_transport=transport)) as arm:
        arm.drive(single(lengths[0], NEW_TOKENS, plan.seed))  # not counted
        for length in lengths:
            for number in range(plan.repeats):
                (trace,) = arm.drive(single(length, NEW_TOKENS, 100 * plan.seed + number))
                yield _handed(transport, trace)


def _handed(transport: str, trace: Trace) -> Handed:
    timings = trace.timings
    if not timings.prefill_s:
        raise BatonError(f"a prompt of {trace.prompt_tokens} tokens was not filled by prefill")
    return Handed(
        transport,
        trace.prompt_tokens,
        timings.kv_bytes,
        timings.moved_bytes,
        1e3 * timings.handover_s,
        1e3 * trace.ttft,
        1e3 * timings.prefill_s,
    )


def memory_read_gb_s() -> float:
    """By all of torch's threads, as measure.limits takes it."""
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64)
    return BUFFER / best(buffer.sum) / 1e9
