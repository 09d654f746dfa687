"""F5: processes that stop and go on, or that hang. What a revived worker still writes harms nobody."""

from tools.faults.battery import Battery, Result
from tools.faults.by_hand import ByHand
from tools.faults.rows_kill import CHUNKED, SERVER_AGAIN, with_leftovers
from tools.faults.stage import RANDOM, STAGES, Fault, Load, each_stage, under_load

SHORT_S, SHORT_TIMES = 0.7, 3  # a pause that nobody needs to notice; so often at each stage
LONG_S = 16.0  # longer than a worker's patience: it is given up
VICTIMS = ("prefill-0", "decode-0", "router", "server")


def f5(battery: Battery) -> list[Result]:
    """Pauses, hangs, and workers that come back from the dead."""
    return [
        *_pauses(battery),
        *_frozen(battery),
        *_hangs(battery),
        *_stuck(battery),
        *_revived(battery),
    ]


def _pauses(battery: Battery) -> list[Result]:
    result = Result("F5-pause", f"SIGSTOP for {SHORT_S:g} s of each process, at every stage")
    rng = battery.rng(result.row)
    faults = each_stage(
        VICTIMS, SHORT_TIMES, rng, action="stop", resume_s=SHORT_S, replaced=False
    )  # fmt: skip
    with battery.service(*CHUNKED) as service:
        under_load(battery, service, result, faults[: battery.count(len(faults), least=4)])
    return with_leftovers([(result, service)])


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
    result = Result("F5-hang", "worker stopped for good, or its loop wedged: killed and replaced")
    faults = [
        Fault(("prefill-0",), "prefill", "wedge"),
        Fault(("decode-0",), "mid-stream", "wedge"),
        Fault(("prefill-0",), "mid-push", "stop"),
        Fault(("decode-0",), "first token", "stop"),
        Fault(("decode-0",), "reserve", "wedge"),
    ]
    with battery.service(*CHUNKED) as service:
        under_load(battery, service, result, faults[: battery.count(len(faults), least=2)])
    return with_leftovers([(result, service)])


def _stuck(battery: Battery) -> list[Result]:
    """Clients of a server that was killed ask again; those of a router notice nothing but time."""
    router = Result("F5-router", "router stopped for good, or its loop wedged: killed and replaced")
    at_router = [
        Fault(("router",), "mid-stream", "stop"),
        Fault(("router",), "queue", "wedge"),
        Fault(("router",), "queue", "wedge", site="received.Filled"),
        Fault(("router",), "before Filled", "stop"),
        Fault(("router",), "queue", "wedge", site="received.Decoded"),
    ]
    server = Result("F5-server", "HTTP server likewise (clients ask again)")
    at_server = [
        Fault(("server",), "mid-stream", "stop"),
        Fault(("server",), "chunk", "wedge"),
        Fault(("server",), "accepted", "wedge"),
        Fault(("server",), "queue", "stop"),
    ]
    pairs = []
    for result, faults, load in ((router, at_router, None), (server, at_server, SERVER_AGAIN)):
        with battery.service(*CHUNKED) as service:
            planned = faults[: battery.count(len(faults), least=2)]
            under_load(battery, service, result, planned, load)
        pairs.append((result, service))
    return with_leftovers(pairs)


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
        planned = faults[: battery.count(len(faults), least=2)]
        under_load(battery, service, result, planned, Load(deadline_s=180))
        late = service.metric("late_reports")
        lost = service.metric("workers_lost")
    result.notes.append(f"{late:g} late reports counted, {lost:g} workers given up")
    result.require(lost >= len(planned), f"{len(planned)} workers were stopped, {lost:g} given up")
    return with_leftovers([(result, service)])
