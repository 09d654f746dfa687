"""FairQueue: whose request is placed next. Hierarchical start-time fair queueing. Pure.

    tenants                 share the cluster equally: API keys, or client addresses
      priorities            the lowest of a tenant's numbers goes first, at no other tenant's cost
        groups              share their tenant's part equally: HTTP requests with several prompts
          requests          first come, first served

Shares are measured in tokens. Each tenant has a start tag: the virtual time at which its next request
begins. The smallest tag is served, the clock moves there, and the tenant's tag grows by the request's
cost. Who comes new starts at the clock: before everybody who has just been served, but with no credit for
the time it was away. Groups inside a tenant take turns by the same rule. With one tenant and one group,
such as an offline job, the order is first come, first served. A request's cost is an estimate when it is
placed; at its end the difference is charged or given back.

Between two tenants that both wait, the served cost differs by at most one request, however many each
sends.

Goyal, Vin, Cheng: Start-time Fair Queueing (1996).
"""

from collections import OrderedDict

from router.priority import PriorityQueue

SPARE = 64
"""Members that are away may be remembered in any case, before those of no consequence are dropped."""


class Turns:
    """Members that take turns, each for its share. Only those that have joined wait."""

    def __init__(self) -> None:
        self._clock = 0.0  # virtual time, in tokens: the start tag served last
        self._tags = PriorityQueue()  # of waiting members
        self._away: dict[str, float] = {}  # tags of members that left before the clock reached them
        self._sweep_at = SPARE

    def join(self, name: str) -> None:
        """A member waits from now on. Does nothing if it does already."""
        if name not in self._tags:
            self._tags.put(name, max(self._clock, self._away.pop(name, 0.0)))

    def first(self) -> str | None:
        """Whose turn it is."""
        found = self._tags.first()
        return found[0] if found else None

    def serve(self, name: str, cost: int) -> None:
        """A waiting member got its turn."""
        tag = self._tags.priority(name)
        self._clock = max(self._clock, tag)
        self._tags.put(name, tag + cost)

    def settle(self, name: str, cost: int) -> None:
        """A member, waiting or not, was served so many tokens more than it was charged for; fewer if
        negative. While nobody waits there is nothing to share."""
        if name in self._tags:
            self._tags.put(name, max(self._clock, self._tags.priority(name) + cost))
        elif len(self._tags):
            self._put_away(name, self._away.pop(name, self._clock) + cost)

    def leave(self, name: str) -> None:
        """A waiting member has nothing that waits. What it was served counts until the clock passes its
        tag, or until nobody waits: leaving and coming back is no advantage."""
        tag = self._tags.priority(name)
        self._tags.remove(name)
        if not len(self._tags):
            self._away.clear()
            self._clock = 0.0
        else:
            self._put_away(name, tag)

    def _put_away(self, name: str, tag: float) -> None:
        if tag > self._clock:
            self._away[name] = tag
        if len(self._away) > self._sweep_at:
            self._away = {n: at for n, at in self._away.items() if at > self._clock}
            self._sweep_at = 2 * len(self._away) + SPARE


class Level:
    """The waiting requests of a tenant that have one priority, by group."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.groups: dict[str, OrderedDict[str, int]] = {}  # costs by name, in order of arrival


class Tenant:
    """The waiting requests of a tenant, by priority."""

    def __init__(self) -> None:
        self.levels: dict[int, Level] = {}
        self._order = PriorityQueue()

    def level(self, priority: int) -> Level:
        """Of this priority, made if it is not there."""
        if priority not in self.levels:
            self.levels[priority] = Level()
            self._order.put(str(priority), priority)
        return self.levels[priority]

    def first(self) -> Level:
        """Whose turn it is."""
        found = self._order.first()
        assert found is not None
        return self.levels[int(found[0])]

    def drop(self, priority: int) -> None:
        """A level with nothing that waits."""
        del self.levels[priority]
        self._order.remove(str(priority))


class FairQueue:
    """Requests by name. Every operation takes O(log n) on average."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._tenants: dict[str, Tenant] = {}
        self._places: dict[str, tuple[str, int, str]] = {}  # tenant, priority, group by request

    def add(
        self,
        name: str,
        tenant: str,
        group: str,
        cost: int,
        priority: int = 0,
        *,
        back: bool = False,
    ) -> None:
        """A request waits. `cost` is in tokens, at least 1. The name must be new. `back`: it was here
        before, and comes first in its group."""
        assert name not in self._places
        self._places[name] = (tenant, priority, group)
        here = self._tenants.setdefault(tenant, Tenant()).level(priority)
        here.groups.setdefault(group, OrderedDict())[name] = cost
        if back:
            here.groups[group].move_to_end(name, last=False)
        here.turns.join(group)
        self._turns.join(tenant)

    def first(self) -> str | None:
        """The request to place next."""
        tenant = self._turns.first()
        if tenant is None:
            return None
        here = self._tenants[tenant].first()
        group = here.turns.first()
        assert group is not None
        return next(iter(here.groups[group]))

    def serve(self, name: str) -> None:
        """This request is placed: its tenant and group are charged."""
        tenant, priority, group = self._places[name]
        here = self._tenants[tenant].levels[priority]
        cost = here.groups[group][name]
        self._turns.serve(tenant, cost)
        here.turns.serve(group, cost)
        self.remove(name)

    def remove(self, name: str) -> None:
        """This request does not wait any more; nobody is charged."""
        tenant, priority, group = self._places.pop(name)
        levels = self._tenants[tenant]
        here = levels.levels[priority]
        del here.groups[group][name]
        if not here.groups[group]:
            del here.groups[group]
            here.turns.leave(group)
        if not here.groups:
            levels.drop(priority)
        if not levels.levels:
            del self._tenants[tenant]
            self._turns.leave(tenant)

    def settle(self, tenant: str, group: str, cost: int, priority: int = 0) -> None:
        """A request that was placed has ended, and took so many tokens more than its cost; fewer if
        negative."""
        self._turns.settle(tenant, cost)
        if tenant in self._tenants and priority in self._tenants[tenant].levels:
            self._tenants[tenant].levels[priority].turns.settle(group, cost)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)
