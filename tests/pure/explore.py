"""Explorer: every interleaving of a small cluster up to a depth, over the production nodes.

    python -m tests.pure.explore --depth 24 --faults 2

A *world* is a router, its workers and a client, the messages in flight (first in, first out for each
ordered pair of processes), and the contents of the pools. At every point each of these may come next:

* the first message of any pair arrives;
* any node does a step;
* a fault, while any are left (FAULTS). A stalled process needs no fault: it is one whose messages and
  steps come late;
* time passes, if nothing else can happen.

Breadth first, so a violation comes with its shortest trace. The invariants are checked after every
action (`_check`), and from every world the cluster is run to rest without more faults (`_drain`): each
request must have ended once with the tokens of an undisturbed run, and every block must be free.

What keeps it small:

* Worlds are equal if all that decides their future is equal, whatever led to them.
* A transition of a node depends on the node, the message, the time and the pool it sees. So it is
  computed once and looked up afterwards (`_run`): most worlds are combinations of known nodes.
* What the router sends to the client is delivered at once. This hides nothing from the cluster: the
  client acts only by messages to the router, and these may be delayed by any time.
"""

import argparse
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from baton.params import Limits
from baton.wire import messages as msg
from baton.wire.codec import decode, encode
from baton.wire.node import ROUTER, Stop, To, Watch
from decode_worker.speculation import Speculation
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.admission import Served
from router.affinity import Affinity
from router.batching import Rules
from router.router import Identity, Router
from tests.pure.explored import (
    BLOCK,
    Client,
    Filler,
    Pool,
    Reader,
    Surroundings,
    Violation,
    Write,
    content,
    value_of,
    with_model,
)
from tests.pure.town import EOS, GREEDY, VOCABULARY, PretendTokenizer, calm_answer
from tests.pure.worlds import (
    FAULTS,
    SETTINGS,
    Action,
    Draft,
    Facts,
    Interned,
    Report,
    Setting,
    Transition,
    World,
    facts_of,
)

CLIENT, KERNEL = "client", "kernel"
LONG = 1e6  # seconds: past every timeout
REST_ACTIONS, REST_S = 1000, 10.0  # limits of a drain: it waits for no lease, which lasts 60 s
TRACED = 60  # actions of a drain that are printed


class Explorer:
    """Explores one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._nodes, self._pools, self._messages = Interned(), Interned(), Interned()
        self._known: dict[Any, Transition] = {}
        self._waits: dict[tuple[int, float], float] = {}
        self._checked: set[tuple[int, ...]] = set()
        self._calm: set[World] = set()  # from which the cluster comes to rest as it should
        self._prompts = {f"r{index}": each for index, each in enumerate(setting.prompts)}
        self.answers = {name: calm_answer(*each) for name, each in self._prompts.items()}

    def run(self, depth: int) -> Report:
        """Every world that `depth` actions can reach."""
        start = self._start()
        came: dict[World, tuple[World, Action] | None] = {start: None}
        level, reached, world, path = [start], 0, start, list[Action]()
        try:
            self._drain(start, path)
            while level and reached < depth:
                following: list[World] = []
                for world in level:
                    path = []
                    for action in list(self._actions(world)):
                        path = [action]
                        new = self._apply(world, action)
                        if new in came:
                            continue
                        came[new] = (world, action)
                        following.append(new)
                        self._check(new)
                        self._drain(new, path)
                level, reached = following, reached + 1
        except Violation as violation:
            trace = tuple(self._trace(came, world, path))
            return self._report(came, reached + 1, level, str(violation), trace)
        return self._report(came, reached, level)

    def _report(self, came: Any, depth: int, level: list[World], *found: Any) -> Report:
        return Report(len(came), len(self._nodes.values), depth, not level, *found)

    # ---- the beginning

    def _start(self) -> World:
        """All workers have joined, and the client has submitted its requests."""
        draft = Draft(World((), (), (), frozenset(), 0, 0, 0.0))
        self._boot_router(draft)
        for index in range(self.setting.prefills):
            self._boot_worker(draft, "prefill", index)
        for index in range(self.setting.decodes):
            self._boot_worker(draft, "decode", index)
        world = draft.world()
        while (action := self._next(world)) is not None:
            world = self._apply(world, action)
        draft = Draft(world)
        draft.nodes[CLIENT] = self._node(Client(self._prompts))
        self._carry_out(draft, CLIENT, self._run(draft, CLIENT, "step"))
        draft.faults = self.setting.faults
        return draft.world()

    def _boot_router(self, draft: Draft) -> None:
        draft.boots += 1
        served = Served("pretend", "pretend", Limits(512, VOCABULARY), (EOS,), GREEDY)
        rules = Rules(batch_size=4, window_s=0.0, token_budget=64)
        identity = Identity(f"router/{draft.boots}", "here", 1)
        router = Router(identity, served, PretendTokenizer(), rules, float)
        scheduler = router._scheduler
        scheduler._affinity = scheduler._engines._affinity = Affinity(slots=64)  # copied each time
        scheduler._kept._affinity = Affinity(slots=64)
        draft.nodes[ROUTER] = self._node(router)

    def _boot_worker(self, draft: Draft, role: str, index: int) -> None:
        draft.boots += 1
        name, blocks = f"{role}-{index}.{draft.boots}", self.setting.blocks
        hello = msg.Hello(
            role, name, f"{name}/0", msg.PROTOCOL, "here", 1000 + draft.boots, "pretend", "pretend",
            "float32", "layout", BLOCK, BLOCK * 8, blocks if role == "decode" else 0, (), 0.0, 0.0,
        )  # fmt: skip
        if role == "decode":
            draft.pools[name] = self._pool(Pool())
            draft.nodes[name] = self._node(DecodeWorker(hello, Reader(), 16, Speculation(None)))
        else:
            budget = self.setting.prefill_budget
            draft.nodes[name] = self._node(PrefillWorker(hello, Filler(), token_budget=budget))

    # ---- actions

    def _actions(self, world: World) -> Iterator[Action]:
        calm = list(self._possible(world))
        if not calm and not self._at_rest(world):
            calm = [("tick",)]
        yield from calm
        if world.faults and not self._at_rest(world):
            for kind in self.setting.kinds:
                yield from self._faults(world, kind)

    def _possible(self, world: World) -> Iterator[Action]:
        for pair, _ in world.mail:
            yield ("deliver", *pair)
        for name, number in world.nodes:
            new = self._run(world, name, "step")
            pool = dict(world.pools).get(name)
            if new.node != number or new.effects or new.writes or new.pool != pool:
                yield ("step", name)

    def _faults(self, world: World, kind: str) -> Iterator[Action]:
        nodes, mail, pools = dict(world.nodes), dict(world.mail), dict(world.pools)
        facts = {name: self._facts(number) for name, number in nodes.items()}
        workers = [name for name in nodes if name not in (ROUTER, CLIENT)]
        match kind:
            case "kill":
                for name in workers:
                    sent = len(mail.get((name, ROUTER), ()))
                    yield from (("kill", name, arrive) for arrive in range(sent + 1))
            case "restart":
                yield from (("restart", arrives) for arrives in (True, False))
            case "give_up":
                yield from (("give_up", name) for name in facts[ROUTER].members)
            case "doubt":
                yield from ((kind, name) for name in workers if facts[name].joined)
            case "cut":
                joined = [name for name in workers if facts[name].joined]
                yield from ((kind, n, True) for n in joined if (ROUTER, n) in mail)
                yield from ((kind, n, False) for n in joined)
            case "abort":
                yield from (("abort", request) for request in facts[CLIENT].abortable)
            case "expire":
                yield from (("expire", name) for name in workers if facts[name].unstarted)
            case "damage":
                for name in pools:
                    for grant in facts[name].unstarted:
                        pool = self._pools.values[pools[name]]
                        if grant.blocks and pool.stamps.get(grant.blocks[0]) == grant.generation:
                            yield ("damage", name, grant.blocks[0])

    def _apply(self, world: World, action: Action) -> World:
        draft = Draft(world)
        if action[0] in FAULTS:
            draft.faults -= 1
        match action:
            case ("deliver", sender, receiver):
                message = draft.mail[sender, receiver].pop(0)
                order = self._run(draft, receiver, "handle", sender, message)
                self._carry_out(draft, receiver, order)
            case ("step", name):
                self._carry_out(draft, name, self._run(draft, name, "step"))
            case ("tick",):
                wait = min(self._wait(number, draft.now) for number in draft.nodes.values())
                draft.now = round(draft.now + max(wait, 0.001), 6)
            case ("kill", name, arrive):
                self._kill(draft, name)
                del draft.mail.setdefault((name, ROUTER), [])[arrive:]
                role, index = name.split(".")[0].split("-")
                self._boot_worker(draft, role, int(index))
            case ("restart", arrives):
                self._kill(draft, ROUTER)
                if not arrives:
                    draft.mail = {p: q for p, q in draft.mail.items() if p[0] != ROUTER}
                draft.send(KERNEL, CLIENT, self._message(msg.Unreachable(ROUTER)))
                self._boot_router(draft)
            case ("cut", name, arrives):
                draft.mail.pop((name, ROUTER), None)
                kept = draft.mail.pop((ROUTER, name), [])
                cut = self._message(msg.Unreachable(ROUTER))  # known before anything newer arrives
                draft.mail[ROUTER, name] = [cut, *kept] if arrives else [cut]
            case ("give_up", name):
                self._carry_out(draft, ROUTER, self._run(draft, ROUTER, "give_up", name))
            case ("abort", name):
                self._carry_out(draft, CLIENT, self._run(draft, CLIENT, "abort", name))
            case ("doubt" | "expire" as kind, name):
                self._carry_out(draft, name, self._run(draft, name, kind))
            case ("damage", name, block):
                pool = self._pools.values[draft.pools[name]].copy()
                pool.stamps[block] = pool.cells[block, 0] = -1
                draft.pools[name] = self._pool(pool)
        return draft.world()

    def _kill(self, draft: Draft, name: str) -> None:
        """What it had sent arrives, what was sent to it does not."""
        del draft.nodes[name]
        draft.pools.pop(name, None)
        draft.mail = {pair: queue for pair, queue in draft.mail.items() if pair[1] != name}
        for peer, watcher in sorted(draft.watching):
            if peer == name and watcher in draft.nodes:
                draft.send(KERNEL, watcher, self._message(msg.Exited(name)))
        draft.watching = {pair for pair in draft.watching if name not in pair}

    def _carry_out(self, draft: Draft, name: str, new: Transition) -> None:
        draft.nodes[name] = new.node
        if new.pool is not None:
            draft.pools[name] = new.pool
        for write in new.writes:
            self._write(draft, name, write)
        for peer, message in new.effects:
            if message is None:
                if peer in draft.nodes:
                    draft.watching.add((peer, name))
                else:
                    draft.send(KERNEL, name, self._message(msg.Exited(peer)))
            elif peer == CLIENT:
                self._carry_out(draft, peer, self._run(draft, peer, "handle", name, message))
            elif peer in draft.nodes:
                draft.send(name, peer, message)

    def _write(self, draft: Draft, writer: str, write: Write) -> None:
        """Into shared memory: nothing but the protocol stands in its way."""
        grant, worker = write.grant, write.grant.worker
        if worker not in draft.pools:
            return
        last = write.start + len(write.token_ids)
        touched = {grant.table[place // BLOCK] for place in range(write.start, last)}
        writable = self._facts(draft.nodes[worker]).writable
        for block in touched | set(write.stamped):
            if grant.run not in writable.get(block, ()):
                raise Violation(f"{writer} wrote for {grant.run} into block {block} of {worker}")
        pool = self._pools.values[draft.pools[worker]].copy()
        for place, token in enumerate(write.token_ids, write.start):
            pool.cells[grant.table[place // BLOCK], place % BLOCK] = token
        pool.stamps.update(dict.fromkeys(write.stamped, grant.generation))
        draft.pools[worker] = self._pool(pool)

    # ---- transitions

    def _run(self, world: World | Draft, name: str, kind: str, *about: Any) -> Transition:
        nodes, pools = dict(world.nodes), dict(world.pools)
        number, pool = nodes[name], pools.get(name)
        key = (number, pool, tuple(sorted(pools)), world.now, kind, *about)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._compute(number, pool, frozenset(pools), key[3:])
        return known

    def _compute(
        self, number: int, pool: int | None, pools: frozenset[str], event: tuple[Any, ...]
    ) -> Transition:
        now, kind, *about = event
        node = pickle.loads(self._facts(number).blob)
        around = Surroundings(pools)
        if pool is not None:
            around.pool = self._pools.values[pool].copy()
        with_model(node, around)
        try:
            effects = self._effects(node, kind, about, now)
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"{type(node).__name__}: {type(error).__name__}: {error}") from error
        with_model(node, Surroundings())
        sent: list[tuple[str, int | None]] = []
        for effect in effects:
            match effect:
                case To(peer, message):
                    sent.append((peer, self._message(message)))
                case Watch(peer, _):
                    sent.append((peer, None))
                case Stop(_, why):
                    raise Violation(f"{type(node).__name__} stopped: {why}")
        new_pool = None if around.pool is None else self._pool(around.pool)
        return Transition(self._node(node), new_pool, tuple(sent), tuple(around.writes))

    def _effects(self, node: Any, kind: str, about: list[Any], now: float) -> list[Any]:
        match kind:
            case "handle":
                return list(node.handle(about[0], self._messages.values[about[1]], now))
            case "step":
                return list(node.step(now))
            case "give_up":  # silent for longer than its longest step
                node.workers.get(about[0]).last_heard = now - LONG
                node.workers._none_silent_before = now
            case "doubt":  # silent for longer than a router can be
                node._membership._router_heard = now - LONG
            case "abort":
                return list(node.abort(about[0], now))
            case "expire":
                for held in node.table._held.values():
                    held.lease_until = held.lease_until and now
        return list(node.step(now))

    def _wait(self, number: int, now: float) -> float:
        if (number, now) not in self._waits:
            self._waits[number, now] = pickle.loads(self._facts(number).blob).due(now)
        return self._waits[number, now]

    # ---- interning

    def _message(self, message: msg.Message) -> int:
        """As bytes, and back: what arrives has passed the codec."""
        if isinstance(message, msg.LOCAL):
            key: Any = message
        elif isinstance(message, msg.Heartbeat):
            key = encode(replace(message, steps=0, work=None))
        else:
            key = encode(message)
        number = self._messages.known(key)
        if number is not None:
            return number
        return self._messages.add(key, decode(key) if isinstance(key, bytes) else key)

    def _pool(self, pool: Pool) -> int:
        known = self._pools.known(key := pool.frozen())
        return self._pools.add(key, pool) if known is None else known

    def _node(self, node: Any) -> int:
        key = value_of(node)
        number = self._nodes.known(key)
        if number is None:
            number = self._nodes.add(key, facts_of(node, self.answers))
        return number

    def _facts(self, number: int) -> Facts:
        facts: Facts = self._nodes.values[number]
        return facts

    # ---- checks

    def _check(self, world: World) -> None:
        """What concerns more than one node."""
        nodes, pools = dict(world.nodes), dict(world.pools)
        for owner, pool in pools.items():
            self._check_pool(owner, nodes[owner], pool)
            for name, number in world.nodes:
                if self._facts(number).jobs:
                    self._check_writer(name, number, owner, nodes[owner])

    def _check_pool(self, owner: str, number: int, pool: int) -> None:
        """What a run has computed, or was told is filled, stands in its blocks."""
        if (number, pool) in self._checked:
            return
        self._checked.add((number, pool))
        for table, tokens in self._facts(number).runs:
            found = tuple(content(self._pools.values[pool], table, p) for p in range(len(tokens)))
            if found != tokens:
                raise Violation(f"{owner} decodes {tokens} and its blocks hold {found}")

    def _check_writer(self, writer: str, jobs: int, owner: str, number: int) -> None:
        """What a prefill worker may write at its next step is nobody else's."""
        if (jobs, number, -1) in self._checked:
            return
        self._checked.add((jobs, number, -1))
        writable = self._facts(number).writable
        for grant in self._facts(jobs).jobs:
            for block in grant.blocks:
                if grant.worker == owner and grant.run not in writable.get(block, ()):
                    raise Violation(
                        f"{writer} may write for {grant.run} into block {block} of {owner}, which "
                        "is neither granted to this run nor in quarantine for it"
                    )

    # ---- coming to rest

    def _at_rest(self, world: World) -> bool:
        return not world.mail and all(self._facts(number).resting for _, number in world.nodes)

    def _next(self, world: World) -> Action | None:
        """What happens next without faults, in one particular order; None: no more."""
        action = next(self._possible(world), None)
        if action is None and not self._at_rest(world):
            return ("tick",)
        return action

    def _drain(self, world: World, path: list[Action]) -> None:
        """Every request ends, and every block is free. What happens is added to the path."""
        passed: list[World] = []
        until = world.now + REST_S
        while world not in self._calm:
            passed.append(world)
            action = self._next(world)
            if action is None:
                break
            if len(passed) > REST_ACTIONS or world.now > until:
                raise Violation(f"it does not come to rest: {self._restless(world)}")
            path.append(action)
            world = self._apply(world, action)
            self._check(world)
        self._calm.update(passed)

    def _restless(self, world: World) -> str:
        unsettled = [name for name, number in world.nodes if not self._facts(number).resting]
        failures = self._facts(dict(world.nodes)[CLIENT]).failures
        return "; ".join([*failures, f"something is left at {', '.join(unsettled) or 'no node'}"])

    # ---- traces

    def _trace(self, came: dict[World, Any], world: World, path: list[Action]) -> Iterator[str]:
        """The actions that led to the world, and those of the path from it."""
        earlier: list[tuple[World, Action]] = []
        step = came[world]
        while step is not None:
            earlier.append(step)
            step = came[step[0]]
        for before, action in reversed(earlier):
            yield self._told(before, action)
        for index, action in enumerate(path[:TRACED], 1):
            yield self._told(world, action)
            if index < len(path):
                world = self._apply(world, action)
        if len(path) > TRACED:
            yield f"and {len(path) - TRACED} more without a fault"

    def _told(self, world: World, action: Action) -> str:
        if action[0] != "deliver":
            return " ".join(map(str, action))
        sender, receiver = action[1:]
        message = self._messages.values[dict(world.mail)[sender, receiver][0]]
        return f"{sender} -> {receiver}: {str(message)[:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depth", type=int, default=20, help="actions of a path (20)")
    parser.add_argument("--faults", type=int, default=1, help="faults of a path at most (1)")
    parser.add_argument("--setting", choices=SETTINGS, help="one of the settings (all)")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), help="faults")
    options = parser.parse_args()
    for name in [options.setting] if options.setting else SETTINGS:
        began = time.monotonic()
        setting = replace(SETTINGS[name], faults=options.faults, kinds=tuple(options.kinds))
        report = Explorer(setting).run(options.depth)
        print(f"{name}: {report} ({time.monotonic() - began:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
