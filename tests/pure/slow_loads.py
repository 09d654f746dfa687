"""The slow definition of everything that the router counts as it changes, for comparison.

Every count, order and index of router/loads.py, router/workers.py and router/tries.py is computed here
from the ledger's entries and the registry's members alone, and each placement from all workers.
"""

from collections import Counter
from collections.abc import Iterator

from baton.lifecycle import LIVE, PLACED, State
from router.candidates import decode_choices, prefill_choices
from router.hashes import prefix_hashes
from router.ledger import Entry
from router.placement import PLACE_DECODE, PLACE_PREFILL, DecodeChoice, PrefillChoice
from router.router import Router
from router.workers import DECODE, ENGINE, PREFILL, Member, _transport


def wrong_counts(router: Router) -> Iterator[str]:
    """What differs from its slow definition, in words."""
    ledger, members = router.ledger, router.workers
    loads, isolation = ledger.loads, ledger._isolation
    placed, filling = ledger.in_state(*PLACED), ledger.in_state(State.FILLING)
    everybody = sorted(members, key=lambda member: member.worker)
    decodes = [member for member in everybody if member.hello.role == DECODE]
    prefills = [member for member in everybody if member.hello.role == PREFILL]
    engines = [member for member in everybody if member.hello.role == ENGINE]

    busy = {e.prefill for e in filling} | {e.decode for e in ledger.in_state(State.DECODING)}
    granted = set(router._scheduler._granted)
    promised = [
        e for e in ledger.in_state(State.RESERVED) if e.decision.remote and e.run not in granted
    ]
    given = Counter[str | None]()
    for _, worker, prompt in loads.promises:
        given[worker] += prompt
    givers = set(given)
    clients = {entry.client for entry in ledger.in_state(*LIVE)}
    unproven = {e.id for e in placed if not e.tries.proven}
    used = {e.decode for e in placed} | {e.prefill for e in filling}
    facts: dict[str, tuple[object, object]] = {
        "decode workers by load": (
            list(loads.decodes),
            sorted((len(at(placed, m)), -free(placed, m), m.worker) for m in decodes),
        ),
        "prefill workers by load": (
            list(loads.prefills),
            sorted((tokens(filling, m), 0, m.worker) for m in prefills),
        ),
        "busy workers": (loads.busy, busy),
        "promised prompts": (
            {request: tokens for request, _, tokens in loads.promises},
            {e.id: e.unfilled for e in promised},
        ),
        "promised tokens": (
            sum(loads.promises.total(worker) for worker in givers),
            sum(e.unfilled for e in promised),
        ),
        "prefill workers by what is expected of them": (
            list(loads.expected),
            sorted((tokens(filling, m) + given[m.worker], 0, m.worker) for m in prefills),
        ),
        "workers that soon compute": (set(loads.soon), busy | (givers - {None})),
        "loads kept": (set(loads._loads), used | {m.worker for m in decodes + prefills}),
        "ways that are down": (
            members.ways._down,
            {(prefill.worker, decode) for prefill in prefills for decode in prefill.failed},
        ),
        "clients with requests": (set(ledger._of_client), clients),
        "requests without progress": (set(isolation._unproven), unproven),
        "quarantined requests on workers": (
            set(isolation._quarantined),
            {e.id for e in placed if e.tries.quarantined},
        ),
        "members by role": (
            (members.of(DECODE), members.of(PREFILL), members.of(ENGINE)),
            (tuple(decodes), tuple(prefills), tuple(engines)),
        ),
        "members' Hellos": (members.hellos, tuple(m.hello for m in everybody)),
        "the largest pool": (
            members.largest_pool, max((m.hello.blocks for m in decodes), default=0),
        ),
        "members that leave": (
            {m.worker for m in members.leaving},
            {m.worker for m in everybody if m.leaving and not m.dismissed},
        ),
    }  # fmt: skip
    for worker in {member.worker for member in everybody} | used:
        expected = {e.id for e in placed if e.decode == worker}
        expected |= {e.id for e in filling if e.prefill == worker}
        computed = [e.decode for e in ledger.in_state(State.DECODING)]
        computed += [e.prefill for e in filling]
        facts[f"computed by {worker}"] = (loads.computing(str(worker)), computed.count(worker))
        itself = [e.id for e in ledger.in_state(State.DECODING) if e.decode == worker and fills(e)]
        facts[f"filled by {worker} itself"] = (loads.fills.count(str(worker)), len(itself))
        facts[f"requests on {worker}"] = ({e.id for e in ledger.on_worker(str(worker))}, expected)
    for client in clients:
        own = [e.id for e in ledger.in_state(*LIVE) if e.client == client]
        facts[f"requests of {client}"] = (
            sorted(e.id for e in ledger.of_client(client)),
            sorted(own),
        )
    for decode in decodes:
        able = {(p.worker, p.hello.epoch) for p in prefills if decode.worker in p.attached}
        facts[f"writers of {decode.worker}"] = (set(decode.writers), able)
    for prefill in prefills:
        words = tuple(map(_transport, prefill.attached.values()))
        facts[f"links of {prefill.worker}"] = (prefill.links or words, words)
    for what, (found, right) in facts.items():
        if found != right:
            yield f"{what}: {found}, by the slow definition {right}"
    last = max((member.last_heard for member in everybody), default=0.0)
    if any(member.verdict_at(last) < members._none_silent_before for member in everybody):
        yield "a worker may be silent for too long and is not looked at"


def wrong_choices(router: Router, now: float) -> Iterator[str]:
    """Placements that the policies would not choose among all workers, in words."""
    ledger, scheduler = router.ledger, router._scheduler
    placed, filling = ledger.in_state(*PLACED), ledger.in_state(State.FILLING)
    for entry in ledger.in_state(State.QUEUED)[:4]:
        able = scheduler._able(entry, now)
        hashes = prefix_hashes(entry, router.workers.block_size, router._served.rope)[1:]
        shares = scheduler._affinity.shares(hashes)
        everybody = [
            DecodeChoice(
                m.worker,
                free(placed, m),
                len(at(placed, m)),
                scheduler._affinity.there(hashes, m.worker) / max(1, len(hashes)),
            )
            for m in router.workers.of(DECODE)
            if able(m.worker) is not None
        ]
        for blocks in (1, 3, 6):
            few = decode_choices(ledger.loads, able, blocks=blocks, cached=shares)
            if PLACE_DECODE(few, blocks) != PLACE_DECODE(everybody, blocks):
                yield f"{entry.id} with {blocks} blocks: of {few}, of all {everybody}"
    for entry in ledger.in_state(State.RESERVED):
        assert entry.decode is not None
        able = scheduler._reach.fillers(entry, now)
        fills = [
            PrefillChoice(m.worker, tokens(filling, m), m.attached.keys())
            for m in router.workers.of(PREFILL)
            if able(m.worker) is not None
        ]
        first = prefill_choices(ledger.loads.prefills, able)
        if PLACE_PREFILL(first, entry.decode) != PLACE_PREFILL(fills, entry.decode):
            yield f"{entry.id}: of {first}, of all {fills}"


def at(placed: list[Entry], member: Member) -> list[Entry]:
    """The requests on a decode worker."""
    return [entry for entry in placed if entry.decode == member.worker]


def fills(entry: Entry) -> bool:
    """Its decode worker fills it by itself, or has not said that it is done."""
    local = entry.grant is not None and entry.receipt is None and entry.length == entry.began
    return local and entry.unfilled > 0


def free(placed: list[Entry], member: Member) -> int:
    """Its free blocks, less one for each request there: it will grow soon."""
    size = member.hello.block_size
    held = [-(-max(e.reserved, e.length) // size) + 1 for e in at(placed, member)]
    return member.hello.blocks - sum(held)


def tokens(filling: list[Entry], member: Member) -> int:
    """Tokens still to be computed on a prefill worker."""
    return sum(entry.left for entry in filling if entry.prefill == member.worker)
