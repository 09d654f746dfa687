"""Loop: runs a node in a process: poll, handle, step, send. Only here do socket, clock and node meet.

It also watches processes of this host and notices their end at once (pidfd), even of zombies.
"""

import errno
import logging
import math
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from types import FrameType

import zmq

from baton import failpoint
from baton.clock import Clock, monotonic
from baton.errors import BatonError
from baton.host import process_runs
from baton.memory import out_of_memory
from baton.wire.channel import Channel
from baton.wire.messages import Exited, Message, Terminate, Unreachable
from baton.wire.node import Effect, Node, Stop, To, Watch

LONGEST_WAIT_S = 1.0
MESSAGES_A_TURN, HANDLING_S = 1000, 0.1  # then the node steps, even if more wait
PARENT = "parent"
OWN = "own process"
"""Who sends Terminate to a node."""

logger = logging.getLogger(__name__)


class Watcher:
    """Watches processes for their end."""

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._peers: dict[int, tuple[str, int]] = {}  # pidfd -> peer, pid
        self._without: dict[str, int] = {}  # without pidfd: checked once a turn

    def watch(self, peer: str, pid: int) -> bool:
        """False: the process has ended already."""
        if (peer, pid) in self._peers.values():
            return True
        try:
            descriptor = os.pidfd_open(pid)
        except OverflowError:  # no process has such a number
            return False
        except (OSError, AttributeError) as error:  # AttributeError: not on this system
            if isinstance(error, OSError) and error.errno == errno.ESRCH:
                return False
            self._without[peer] = pid
            return process_runs(pid)
        self._poller.register(descriptor, zmq.POLLIN)
        self._peers[descriptor] = (peer, pid)
        return True

    def gone(self, ready: Iterable[object]) -> list[str]:
        """Peers that have ended since the last call."""
        peers = []
        for descriptor in ready:
            if isinstance(descriptor, int) and descriptor in self._peers:
                self._poller.unregister(descriptor)
                os.close(descriptor)
                peers.append(self._peers.pop(descriptor)[0])
        ended = [peer for peer, pid in self._without.items() if not process_runs(pid)]
        for peer in ended:
            del self._without[peer]
        return peers + ended


class Loop:
    """Runs one node on one channel until it stops."""

    def __init__(
        self,
        node: Node,
        channel: Channel,
        *,
        parent: int | None = None,
        clock: Clock = monotonic,
        wakeups: Callable[[], Sequence[zmq.Socket[bytes]]] = tuple,
        drain_s: float | None = None,
        beat: Callable[[], None] | None = None,
    ) -> None:
        """`wakeups`: other sockets that wake the loop; the node's step reads them. `drain_s`: how long
        the node may go on after SIGTERM; None: it is not asked. `beat` is called each turn, so once
        in LONGEST_WAIT_S or more often."""
        self._node = node
        self._channel = channel
        self._clock = clock
        self._poller = zmq.Poller()
        self._poller.register(channel.socket, zmq.POLLIN)
        self._watcher = Watcher(self._poller)
        self._wakeups = wakeups
        self._waking: list[zmq.Socket[bytes]] = []
        self._rest: list[tuple[str, list[Message]]] = []  # arrived, not handled yet
        self._again = False  # a peer was found gone after the step: the node steps again at once
        self._drain_s = drain_s
        self._beat = beat
        self._woken = -1  # readable after a signal
        self._signals = 0  # SIGTERMs so far
        self._deadline = math.inf  # of a node that was told to end
        self._stop: Stop | None = None
        if parent is not None and not self._watcher.watch(PARENT, parent):
            self._stop = Stop(0, "")

    def run(self) -> int:
        """Exit code of the process. SIGTERM ends it with 0: the node is told (Terminate) and may go on
        for `drain_s`; a second SIGTERM ends it at once, as does the first without `drain_s`."""
        signal.signal(signal.SIGTERM, self._terminate)
        waker, woken = socket.socketpair()  # lets a signal end a poll
        waker.setblocking(False)
        self._woken = woken.fileno()
        self._poller.register(self._woken, zmq.POLLIN)
        wakeup_before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        try:
            while self._stop is None:
                self._turn()
        except BatonError as error:
            self._stop = Stop(error.exit_code, str(error))
        except KeyboardInterrupt:
            self._stop = Stop(130, "interrupted")
        except Exception as error:
            logger.exception("unexpected error, the process ends")
            bug = "memory ran out" if out_of_memory(error) else "a bug: see the lines above"
            self._stop = Stop(1, bug)
        finally:
            signal.set_wakeup_fd(wakeup_before)
            waker.close()
            woken.close()
        if self._stop.why:
            print(f"error: {self._stop.why}", file=sys.stderr, flush=True)
        return self._stop.exit_code

    def _turn(self) -> None:
        if self._beat is not None:
            self._beat()
        self._register_wakeups()
        self._tell_to_end()
        if self._stop is not None:
            return
        now = self._clock()
        wait = 0.0 if self._rest or self._again else min(self._node.due(now), LONGEST_WAIT_S)
        self._again = False
        wait = min(wait, max(0.0, self._deadline - now))
        ready = [where for where, _ in self._poller.poll(math.ceil(wait * 1000))]
        if self._woken in ready:
            os.read(self._woken, 4096)  # else it would wake every poll from now on
        self._handle_what_came()
        for peer in self._watcher.gone(ready):
            if peer == PARENT:
                self._stop = Stop(0, "")
                return
            self._carry_out(self._node.handle(peer, Exited(peer), self._clock()))
        self._carry_out(self._node.step(self._clock()))

    def _tell_to_end(self) -> None:
        """After the first SIGTERM, once; and end it when its time is over."""
        now = self._clock()
        if self._signals and self._drain_s is not None and self._deadline == math.inf:
            self._deadline = now + self._drain_s
            self._carry_out(self._node.handle(OWN, Terminate(self._drain_s), now))
        if now >= self._deadline:
            logger.warning("did not end within %g s of SIGTERM, ends now", self._drain_s)
            self._stop = Stop(0, "")

    def _handle_what_came(self) -> None:
        """Messages that arrived together are answered together."""
        began = self._clock()
        rest, self._rest = self._rest, []
        for sender, messages in islice(chain(rest, self._channel.receive()), MESSAGES_A_TURN):
            effects: list[Effect] = []
            left, late = deque(messages), False
            failpoint.messages("received", messages)
            while left and not late:
                effects += self._node.handle(sender, left.popleft(), now := self._clock())
                late = now - began >= HANDLING_S
            self._carry_out(effects)
            if late:
                self._rest = [(sender, list(left))] if left else []
                break

    def _register_wakeups(self) -> None:
        """Called every turn: a worker's sockets change when it exports its pool again."""
        sockets = list(self._wakeups())
        if sockets != self._waking:
            for old in self._waking:
                self._poller.unregister(old)
            for new in sockets:
                self._poller.register(new, zmq.POLLIN)
            self._waking = sockets

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Send to each peer in order, as one message. Effects of failed sends come after all others."""
        while effects:
            outgoing: dict[str, list[Message]] = {}
            for effect in effects:
                if isinstance(effect, To):
                    outgoing.setdefault(effect.peer, []).append(effect.message)
            gone: list[Exited | Unreachable] = []
            for peer, messages in outgoing.items():
                failpoint.messages("sending", messages)
                if not self._channel.send(peer, *messages):
                    names = ", ".join(type(message).__name__ for message in messages)
                    logger.info("cannot reach %s to send %s", peer, names)
                    gone.append(Unreachable(peer))
            for effect in effects:
                if isinstance(effect, Watch) and not self._watcher.watch(effect.peer, effect.pid):
                    gone.append(Exited(effect.peer))
                elif isinstance(effect, Stop):
                    self._stop = effect
            effects = [
                e for each in gone for e in self._node.handle(each.peer, each, self._clock())
            ]
            self._again |= bool(gone)

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        """Only takes note: the node may be in the middle of a step."""
        self._signals += 1
        if self._signals > 1 or not self._drain_s:
            self._stop = Stop(0, "")
