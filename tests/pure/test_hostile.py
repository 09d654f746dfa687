"""Sound messages with false contents, from strangers, clients and members, on top of a running town.

Each field holds a value that occurs in the system (another's run, grant, epoch, worker), or any other
that its type allows. No node may fail, and whatever is not on the forger goes on as if nothing happened.
"""

import random
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ProtocolError, RequestError
from baton.wire import messages as msg
from baton.wire.codec import decode, decode_malformed, encode
from baton.wire.node import ROUTER, Stop, To
from decode_worker.worker import DecodeWorker
from router.batching import Rules
from tests.pure.town import Town, calm_answer

KINDS = {kind: get_type_hints(kind) for kind in get_args(msg.Message) if kind not in msg.LOCAL}
FROM_WORKERS = (
    msg.Hello, msg.Leaving, msg.Heartbeat, msg.Attached, msg.AttachFailed, msg.Reserved, msg.Deferred,
    msg.Preempted, msg.Outgrown, msg.Expired, msg.ChunkFilled, msg.Filled, msg.FillFailed, msg.Released,
    msg.FillRefused, msg.Decoded, msg.PromptLogprobs, msg.PoolStats, msg.RunFailed,
)  # fmt: skip
FROM_CLIENTS = (msg.Submit, msg.Abort, msg.GetClusterInfo, msg.Observe, msg.Supervised)
FROM_ROUTER = (
    msg.Welcome, msg.Reset, msg.Attach, msg.Detach, msg.WriterJoined, msg.WriterClear, msg.Reserve,
    msg.Renew, msg.Fill, msg.Drop, msg.Start, msg.Cores, msg.Cancel, msg.Released, msg.Heartbeat,
    msg.Dismissed,
)  # fmt: skip
ORDERS = (msg.Reserve, msg.Fill, msg.Start)
ALIKE = {"writer": "worker", "peer": "worker", "tokens": "position", "blocks": "prefix"}
NUMBERS = (0, 1, 2, 3, 7, 64, 512, -1, 2**16, 2**31 - 1, 2**31, 2**53, 2**63 - 1, -(2**63))
REALS = (0.0, 1.0, -1.0, 0.5, 1e-9, 60.0, 1e9, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "r0",
    "r0#0",
    "router",
    "client",
    "decode-0",
    "prefill",
    "shm",
    "frames",
    "\0",
    "é" * 9,
)


class Forge:
    """Makes messages out of what it has seen."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self._seen: dict[str, list[Any]] = defaultdict(list)
        self._messages: dict[type, list[Any]] = defaultdict(list)

    def overhear(self, message: msg.Message) -> None:
        self._messages[type(message)].append(message)
        self.look_at(message)

    def look_at(self, thing: Any) -> None:
        """Remember each field's value by the field's name, at any depth."""
        for field in fields(thing):
            value = getattr(thing, field.name)
            known = self._seen[ALIKE.get(field.name, field.name)]
            if value not in known[-60:]:
                known.append(value)
            for each in value if isinstance(value, tuple) else (value,):
                if is_dataclass(each):
                    self.look_at(each)

    def message(self, kinds: Iterable[type]) -> Any:
        """A message of one of these kinds that its own class accepts."""
        while True:
            try:
                return self._built(self.dice.choice(tuple(kinds)))
            except (ValueError, RequestError):  # against a rule of its class
                continue

    def _built(self, kind: type) -> Any:
        if self._messages[kind] and self.dice.random() < 0.5:
            return self._changed(self.dice.choice(self._messages[kind][-6:]))
        hints = get_type_hints(kind)
        return kind(**{f.name: self._field(f.name, hints[f.name]) for f in fields(kind)})

    def _field(self, name: str, hint: Any) -> Any:
        known = [each for each in self._seen[ALIKE.get(name, name)][-60:] if fits(each, hint)]
        if not known or (self.dice.random() < 0.25 and name != "prompt"):  # words here are numbers
            return self._any(hint)
        value = self.dice.choice(known)
        return self._changed(value) if is_dataclass(value) else value

    def changed(self, thing: Any) -> Any:
        """The same with one field changed, or as it is."""
        while True:
            try:
                return self._changed(thing)
            except (ValueError, RequestError):  # against a rule of its class
                continue

    def _changed(self, thing: Any) -> Any:
        if not fields(thing) or self.dice.random() < 0.2:
            return thing
        name = self.dice.choice(fields(thing)).name
        value = getattr(thing, name)
        if is_dataclass(value):
            value = self._changed(value)
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            value = (*value[:-1], self._changed(value[-1]))
        else:
            value = self._field(name, get_type_hints(type(thing))[name])
        return replace(thing, **{name: value})

    def _any(self, hint: Any) -> Any:
        if isinstance(hint, type) and is_dataclass(hint):
            return self._built(hint)
        origin, dice = get_origin(hint), self.dice
        if origin in (types.UnionType, Union):
            return self._any(dice.choice(get_args(hint)))
        if origin is tuple:
            item, *rest = get_args(hint)
            if rest != [...]:
                return tuple(map(self._any, (item, *rest)))
            return tuple(self._any(item) for _ in range(dice.randint(0, 3)))
        if origin is Mapping or hint is dict:
            return {}
        simple = {
            int: NUMBERS,
            float: REALS,
            str: TEXTS,
            bytes: (b"", b"x" * 16),
            bool: (True, False),
        }
        return dice.choice(simple[hint]) if hint in simple else None


def fits(value: Any, hint: Any) -> bool:
    """Whether a field of this type can hold the value, as far as its outermost type says."""
    arms = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    return type(value) in [get_origin(arm) or arm for arm in arms]


def arrived(message: Any) -> msg.Message | None:
    """What the receiver's node gets of it; None: nothing, the codec has refused it."""
    try:
        data = encode(message)
    except (ProtocolError, OverflowError):  # longer than the limit, or than msgpack's integers
        return None
    try:
        return decode(data)
    except ProtocolError as error:
        return decode_malformed(data, error)


class Hostile(Town):
    """A town in which somebody sends forged messages between those that are delivered."""

    def __init__(self, dice: random.Random, forged: int) -> None:
        self.dice = dice
        self.forge = Forge(dice)
        self.left, self.arrived = forged, 0
        self.forgers: list[tuple[str, str, tuple[type, ...]]] = []  # sender, receiver, kinds
        self.served: set[str] = set()  # requests of which a forger got an order
        rules = Rules(batch_size=32, window_s=0.0, token_budget=64)
        super().__init__(prefills=2, decodes=2, blocks=24, rules=rules, prefill_budget=5)
        self.before = self._between
        self.prompts = {f"r{i}": (range(10 * i + 1, 10 * i + 3 + i), 2 + i % 4) for i in range(8)}

    def send(self, sender: str, effects: Iterable[object]) -> None:
        effects = list(effects)
        forgers = {forger for forger, _, _ in self.forgers}
        for effect in effects:
            if (
                isinstance(effect, To)
                and effect.peer in forgers
                and isinstance(effect.message, ORDERS)
            ):
                order = effect.message
                run = order.grant.run if isinstance(order, msg.Fill) else order.run
                self.served.add(run.rpartition("#")[0])
        stopped = any(isinstance(effect, Stop) for effect in effects)
        super().send(sender, [effect for effect in effects if not isinstance(effect, Stop)])
        if stopped:  # refused for what was said in its name
            assert sender in forgers, f"{sender} was made to stop"
            self.kill(sender)

    def _between(self, sender: str, receiver: str, message: msg.Message) -> None:
        self.forge.overhear(message)
        for forger, to, kinds in self.forgers:
            due = (forger, to) == (sender, receiver) and type(message) in kinds
            if self.left and due and self.dice.random() < 0.5:  # the truth comes after it
                self._inject(forger, to, self.forge.changed(message), at_once=True)
        while self.left and self.forgers and self.dice.random() < 0.3:
            forger, to, kinds = self.dice.choice(self.forgers)
            self._inject(forger, to, self.forge.message(kinds))

    def _inject(self, forger: str, to: str, message: Any, *, at_once: bool = False) -> None:
        """As it comes off the wire: what the codec refuses does not arrive."""
        self.left -= 1
        arriving = arrived(message)
        if arriving is None or to not in self.nodes or self._joins(forger, arriving):
            return
        self.arrived += 1
        if at_once:
            self.send(to, self.nodes[to].handle(forger, arriving, self.now))
        else:
            self.mail[forger, to].append(arriving)

    def _joins(self, forger: str, message: msg.Message) -> bool:
        """A stranger that is let in is a worker, if a lazy one."""
        hello = isinstance(message, msg.Hello) and forger not in self.nodes
        return hello and self.router.workers.rejection(forger, message) is None

    def live(self) -> None:
        """All have joined when the requests come; forging begins with them."""
        forgers, self.forgers = self.forgers, []
        self.run(lambda: self.router.info(self.now).ready and not self.deliver_one())
        for _ in range(5):
            self.turn()
        self.forgers = forgers
        for name, (prompt, length) in self.prompts.items():
            self.submit(name, prompt, length)

    def check(self) -> None:
        for node in self.nodes.values():
            if isinstance(node, DecodeWorker):
                node.table.check()
        for name, outcome in self.outcomes.items():
            if name in self.prompts:
                assert len(outcome.ends) <= 1, f"{name} ended {outcome.ends}"

    def run_through(self, spared: Callable[[str], bool]) -> None:
        """Until every request that should be spared has ended as it would have."""
        self.live()

        def over() -> bool:
            self.check()
            return all(self.outcomes[name].ends for name in self.prompts if spared(name))

        self.run(over)
        for name, (prompt, length) in self.prompts.items():
            if spared(name):
                tokens, reason = calm_answer(prompt, length)
                assert (self.outcomes[name].tokens, self.outcomes[name].ends) == (tokens, [reason])


DICE = st.builds(random.Random, st.integers(0, 2**32))


@settings(max_examples=25)
@given(dice=DICE)
def test_strangers_and_other_clients_harm_nobody(dice: random.Random) -> None:
    town = Hostile(dice, forged=dice.randint(1, 150))
    town.forgers = [
        ("rival", ROUTER, FROM_CLIENTS),
        ("rival", ROUTER, tuple(KINDS)),
        ("stranger", ROUTER, FROM_WORKERS),
        ("decode-9.9", ROUTER, FROM_WORKERS),
    ]
    town.run_through(lambda name: True)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@settings(max_examples=25)
@given(dice=DICE)
def test_a_member_that_lies_harms_only_what_it_serves(role: str, dice: random.Random) -> None:
    town = Hostile(dice, forged=dice.randint(1, 150))
    (forger, _) = town.workers(role)
    town.forgers = [(forger, ROUTER, FROM_WORKERS), (forger, ROUTER, tuple(KINDS))]
    town.run_through(lambda name: name not in town.served)


@settings(max_examples=25)
@given(dice=DICE)
def test_whatever_a_router_orders_no_worker_fails(dice: random.Random) -> None:
    """Orders are obeyed, so requests may fail; blocks still have one owner each, and nothing raises."""
    town = Hostile(dice, forged=dice.randint(1, 150))
    town.forgers = [(ROUTER, worker, FROM_ROUTER) for worker in town.workers()]
    town.live()
    for _ in range(60):
        town.turn()
        town.check()
