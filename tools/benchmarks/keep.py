"""Keep: a run of an arm as a file for `python main.py plan --measured` (baton/plan/recorded.py)."""

import re
from collections.abc import Sequence
from pathlib import Path

from baton.host import core_numbers
from baton.plan.recorded import Recorded, Setting, lines
from tools.measure.slo import Trace
from tools.measure.split import RunningArm


def save_run(path: Path, arm: RunningArm, traces: Sequence[Trace]) -> None:
    """Write the requests of one run, and what its cluster was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines(setting_of(arm), [recorded(each) for each in traces if each.tokens]))


def setting_of(arm: RunningArm) -> Setting:
    """As the cluster was started. All workers compute on the cores of this process."""
    options = arm.options
    return Setting(
        prefills=len(options.topology.prefill_devices),
        decodes=len(options.topology.decode_devices),
        cores=len(core_numbers()),
        role_policy="colocated" if arm.split.colocated else arm.split.role_policy,
        batch_size=options.batch_size,
        token_budget=arm.split.max_num_batched_tokens,
        slo_ttft_s=options.slo_ttft or 0.0,
        slo_itl_s=options.slo_itl or 0.0,
    )


def recorded(trace: Trace) -> Recorded:
    """A request as the client saw it, with the router's word on what its workers did."""
    timings = trace.timings
    return Recorded(
        at=trace.intended,
        prompt_tokens=trace.prompt_tokens,
        began=trace.intended + timings.queue_s + timings.reserve_s,
        fill_s=timings.prefill_s,
        handover_s=timings.handover_s,
        tokens=trace.tokens,
    )


def slug(name: str) -> str:
    """A file's name without anything a shell minds."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
