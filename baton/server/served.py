"""ServedModels: what a request's `model` may be: a name of the model, or of an adapter of the cluster."""

from collections.abc import Sequence

from baton.adapters.identity import Adapter, clash
from baton.client.aio import RouterClient
from baton.server.api_error import ApiError


class ServedModels:
    """The router tells of the adapters. While none answers, the last that were told of count."""

    def __init__(self, own: Sequence[str], router: RouterClient) -> None:
        self.own = tuple(own)
        self._router = router
        self._told: tuple[Adapter, ...] | None = None

    @property
    def told(self) -> bool:
        """Whether a router has told of its adapters, perhaps that there are none."""
        return self._current() is not None

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those of the cluster."""
        return self._current() or ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that a request can ask for."""
        return (*self.own, *(each.name for each in self.adapters))

    @property
    def clash(self) -> str:
        """Why a request's name could mean two things; empty if none can."""
        both = next((each.name for each in self.adapters if each.name in self.own), "")
        return both and clash(both)

    def adapter(self, model: str | None) -> str:
        """The digest of the adapter that this name stands for; empty: the model itself. ApiError for an
        unknown name."""
        if model is None or model in self.own:
            return ""
        for each in self.adapters:
            if each.name == model:
                return each.digest
        raise ApiError.unknown_model(model, self.names)

    def _current(self) -> tuple[Adapter, ...] | None:
        if (info := self._router.info) is not None:
            self._told = info.adapters
        return self._told
