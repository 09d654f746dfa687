"""On Ray: the Placer of baton/cluster/fleet.py. An actor owns a process; Ray chooses the node, and starts
the actor again, there or elsewhere, when it or its node has died.

Only `serve --cluster ray` imports ray, an optional dependency (docs/dependencies.md).
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from baton.cluster.fleet import Lost, Needs
from baton.cluster.owner import Look, Order, Owner
from baton.errors import InputError
from baton.package import IN_CHECKOUT, ROOT
from baton.wire.messages import ClusterInfo

STOP_S = 5.0  # for owners to end their processes and remove their files
INSTALL = "pip install 'ray>=2.60'"


class OwnerActor(Owner):
    """An Owner as an actor. Its name stands before each line that it prints."""

    def __init__(self, order: Order) -> None:
        ray = _ray()
        # Ray sets it to the CPUs of the actor, 1; the router hands out the cores of a node.
        os.environ.pop("OMP_NUM_THREADS", None)
        super().__init__(
            order, ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
        )

    def __repr__(self) -> str:
        return self._order.name


@dataclass(slots=True)
class _Placed:
    order: Order
    needs: Needs
    actor: Any
    asked: Any = None  # of a Look that has not been answered


class RayPlacer:
    """A context manager; at its end the actors are gone."""

    def __init__(self, address: str | None) -> None:
        """`address`: of the Ray cluster, as ray.init() takes it; None: the one of this machine. Raises
        InputError if ray is not installed, or there is no such cluster."""
        self._ray = _ray()
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}} if IN_CHECKOUT else None
        try:
            self._ray.init(
                address=address or "auto", runtime_env=environment, logging_level="error"
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster at {address or 'this machine'} ({_first_line(error)}): start one with "
                "`ray start --head`, or name another with --ray-address"
            ) from None
        self.host: str = self._ray.util.get_node_ip_address()
        self._node = self._ray.get_runtime_context().get_node_id()
        self._placed: dict[str, _Placed] = {}

    @property
    def gpus(self) -> int:
        """GPUs of the whole cluster."""
        return int(self._ray.cluster_resources().get("GPU", 0))

    def place(self, order: Order, needs: Needs) -> None:
        self._placed[order.name] = _Placed(order, needs, self._actor(order, needs))

    def _actor(self, order: Order, needs: Needs) -> Any:
        strategy: Any = "SPREAD"
        if needs.here:
            strategies = self._ray.util.scheduling_strategies
            strategy = strategies.NodeAffinitySchedulingStrategy(self._node, soft=False)
        actor = self._ray.remote(OwnerActor).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=-1,
            scheduling_strategy=strategy,
        )
        return actor.remote(order)

    def ask(self, name: str, info: ClusterInfo | None) -> None:
        placed = self._placed[name]
        if placed.asked is None:
            placed.asked = placed.actor.look.remote(info)

    def answers(self) -> Sequence[tuple[str, Look | Lost]]:
        waiting = {each.asked: name for name, each in self._placed.items() if each.asked}
        if not waiting:
            return []
        ready, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        found = []
        for reference in ready:
            name = waiting[reference]
            self._placed[name].asked = None
            found.append((name, self._answer(reference)))
        return found

    def _answer(self, reference: Any) -> Look | Lost:
        errors = self._ray.exceptions
        try:
            look: Look = self._ray.get(reference)
            return look
        except errors.ActorUnavailableError:
            return Lost("its owner or its node is gone", placed_again=True)
        except errors.RayError as error:  # not restarted: its constructor failed, or look() did
            return Lost(_first_line(error), placed_again=False)

    def leave(self, name: str) -> None:
        self._placed[name].actor.leave.remote()

    def move(self, name: str) -> None:
        placed = self._placed[name]
        self._ray.kill(placed.actor, no_restart=True)
        self.place(placed.order, placed.needs)

    def remove(self, names: Sequence[str]) -> None:
        gone = [self._placed.pop(name) for name in names]
        stopping = [each.actor.stop.remote() for each in gone]
        if stopping:
            self._ray.wait(stopping, num_returns=len(stopping), timeout=STOP_S)
        for each in gone:
            self._ray.kill(each.actor, no_restart=True)

    def draining(self) -> frozenset[str]:
        """Ray has no public call for this; its own libraries ask the same way."""
        state = import_module("ray._private.state").state
        return frozenset(state.get_draining_nodes())

    def __enter__(self) -> "RayPlacer":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.remove(list(self._placed))
        finally:
            self._ray.shutdown()


def free_port(host: str) -> int:
    """A port of this address that nobody listens on now."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.util.scheduling_strategies")
    except ImportError as error:
        raise InputError(f"--cluster ray needs the package ray: {INSTALL} ({error})") from None
    return ray


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
