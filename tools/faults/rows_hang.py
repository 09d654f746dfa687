"""F5: processes that stop and go on, or that hang. What a revived worker still writes harms nobody."""

import random
from collections.abc import Sequence

from tools.faults.battery import Battery, Result
from tools.faults.by_hand import ByHand
from tools.faults.rows_kill import CHUNKED, SERVER_AGAIN, with_leftovers
from tools.faults.stage import RANDOM, SERVER_STAGES, STAGES, Fault, Load, each_stage, under_load

SHORT_S, SHORT_TIMES = 0.4, 2  # a pause that nobody needs to notice; so often at each stage
LONG_S = 16.0  # longer than a worker's patience: it is given up
VICTIMS = ("prefill-0", "decode-0", "router", "server")
NAMES = {
    "prefill": "prefill worker",
    "decode": "decode worker",
    "router": "router",
    "server": "HTTP server",
}


def f5(battery: Battery) -> list[Result]:
    """Pauses, hangs, and workers that come back from the dead."""
    return [
        *_pauses(battery),
        *_frozen(battery),
        *_hangs(battery),
        *_revived(battery),
    ]


def _pauses(battery: Battery) -> list[Result]:
    """Each victim has its own service and its own full load."""
    return [_pause(battery, victim) for victim in VICTIMS]


def _pause(battery: Battery, victim: str) -> Result:
    name = victim.partition("-")[0]
    result = Result(f"F5-pause-{name}", f"{NAMES[name]} stopped for {SHORT_S:g} s, at every stage")
    faults = each_stage(
        [victim], battery.count(SHORT_TIMES), battery.rng(result.row),
        action="stop", resume_s=SHORT_S, replaced=False,
    )  # fmt: skip
    with battery.service(*CHUNKED) as service:
        under_load(battery, service, result, faults)
    return with_leftovers([(result, service)])[0]


def _frozen(battery: Battery) -> list[Result]:
    """As a paused container: whoever wakes first has heard from nobody for longer than any patience."""
    result = Result(
        "F5-frozen", f"everything stopped for {LONG_S:g} s, then it goes on: nobody dies"
    )
    faults = [Fault(("main", *VICTIMS), RANDOM, "stop", LONG_S, replaced=False)]
    with battery.service(*CHUNKED) as service:
        before = service.pids()
        under_load(battery, service, result, faults)
        after = service.pids()
        result.require(after == before, f"processes were replaced: {before}, now {after}")
    return with_leftovers([(result, service)])


def _hangs(battery: Battery) -> list[Result]:
    """Each fault costs the patience with its victim, so a run draws some of each kind by its seed.
    Clients of a server that was killed ask again; those of a router or a worker only wait."""
    return [
        _hang(
            battery, Result("F5-hang", "worker stopped for good, or its loop wedged: replaced"), 2,
            stopped=[(("prefill-0",), "mid-push"), (("decode-0",), "first token")],
            wedged=[
                Fault(("prefill-0",), "prefill", "wedge"),
                Fault(("decode-0",), "mid-stream", "wedge"),
                Fault(("decode-0",), "reserve", "wedge"),
            ],
        ),
        _hang(
            battery, Result("F5-router", "router likewise"), 1,
            stopped=[(("router",), stage) for stage in STAGES],
            wedged=[
                Fault(("router",), "queue", "wedge", site=f"received.{message}")
                for message in ("Submit", "Reserved", "Filled", "Decoded")
            ],
        ),
        _hang(
            battery, Result("F5-server", "HTTP server likewise (clients ask again)"), 1,
            stopped=[(("server",), stage) for stage in STAGES],
            wedged=[Fault(("server",), stage, "wedge") for stage in SERVER_STAGES],
            load=SERVER_AGAIN,
        ),
    ]  # fmt: skip


def _hang(
    battery: Battery,
    result: Result,
    each: int,
    *,
    stopped: Sequence[tuple[tuple[str, ...], str]],
    wedged: Sequence[Fault],
    load: Load | None = None,
) -> Result:
    """So many of each kind."""
    rng = battery.rng(result.row)
    faults = [Fault(*where, "stop") for where in stopped]
    planned = [f for kind in (faults, list(wedged)) for f in _drawn(battery, rng, kind, each)]
    rng.shuffle(planned)
    with battery.service(*CHUNKED) as service:
        under_load(battery, service, result, planned, load)
    return with_leftovers([(result, service)])[0]


def _drawn(
    battery: Battery, rng: random.Random, faults: Sequence[Fault], number: int
) -> list[Fault]:
    return rng.sample(faults, min(len(faults), battery.count(number)))


def _revived(battery: Battery) -> list[Result]:
    """Two workers of each role and no supervisor: one is stopped longer than the router waits for it,
    and wakes up in the middle of what it was doing."""
    result = Result(
        "F5-late", f"worker stopped for {LONG_S:g} s, given up, and revived: late writes"
    )
    stages = ("prefill", "mid-push", "before Filled", "mid-stream", "first token")
    faults = [Fault((STAGES[stage][1],), stage, "stop", LONG_S, replaced=False) for stage in stages]
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    late = 0.0
    with ByHand({name: CHUNKED for name in names}, keep=battery.kept) as service:
        planned = battery.rng(result.row).sample(
            faults, min(len(faults), battery.count(2, least=2))
        )
        under_load(battery, service, result, planned, Load(deadline_s=180))
        late = service.metric("late_reports")
        lost = service.metric("workers_lost")
    result.notes.append(f"{late:g} late reports counted, {lost:g} workers given up")
    result.require(lost >= len(planned), f"{len(planned)} workers were stopped, {lost:g} given up")
    result.require(late > 0, "no revived worker reported anything late: nothing was tested")
    return with_leftovers([(result, service)])
