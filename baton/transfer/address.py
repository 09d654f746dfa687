"""Address: reading a region's address, which came in a message, with its types checked. And what
"the same host" means."""

from collections.abc import Mapping

from baton.errors import TransferError
from baton.host import host_id
from baton.kv.layout import KVLayout
from baton.kv.region import Region


class Address:
    """The address of one region."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._fields: Mapping[str, object] = region.address

    def text(self, name: str) -> str:
        """A string."""
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise self._bad(name)
        return value

    def number(self, name: str) -> int:
        """An integer, not negative."""
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._bad(name)
        return value

    def data(self, name: str) -> bytes:
        """Bytes."""
        value = self._fields.get(name)
        if not isinstance(value, bytes):
            raise self._bad(name)
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of integers."""
        value = self._fields.get(name)
        if not isinstance(value, list | tuple) or not all(isinstance(v, int) for v in value):
            raise self._bad(name)
        return list(value)

    def datas(self, name: str) -> list[bytes]:
        """A list of bytes."""
        value = self._fields.get(name)
        if not isinstance(value, list | tuple) or not all(isinstance(v, bytes) for v in value):
            raise self._bad(name)
        return list(value)

    def check_layout(self, layout: KVLayout) -> None:
        """Blocks of another layout are another model's."""
        if self._region.layout != layout.fingerprint:
            raise TransferError(
                f"the pool's KV layout is {self._region.layout}, this worker's {layout.fingerprint}"
            )

    def check_host(self) -> None:
        """Memory is shared within one host only."""
        if self.text("host") != host_id():
            raise TransferError("the pool is on another host (or in another process namespace)")

    def _bad(self, name: str) -> TransferError:
        return TransferError(f"the {self._region.transport} address has no proper {name!r}")
