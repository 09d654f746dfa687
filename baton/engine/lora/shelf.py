"""LoraShelf: adapters that come and go beside a model that runs. The Shelf of baton/wire/shelf.py.

read    a thread reads the folder and makes the matrices, one adapter after another
add     between two steps: the products take part in forwards, after one that proves them
drop    they do not, and their memory is free
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from baton.adapters.below import read_same
from baton.adapters.changes import Entry
from baton.adapters.files import AdapterFiles
from baton.engine.errors import unexpected
from baton.engine.lora.base import Base
from baton.engine.lora.runner import LoraRunner
from baton.engine.lora.weights import Products, read_products
from baton.errors import BatonError, ModelError, OutOfMemory
from baton.kv.layout import KVLayout
from baton.memory import out_of_memory


class _Reading:
    """An adapter that is being read."""

    def __init__(
        self, runner: LoraRunner, layout: KVLayout, entry: Entry, products: Future[Products]
    ) -> None:
        self._runner, self._layout, self._entry, self._products = runner, layout, entry, products

    @property
    def done(self) -> bool:
        """See Reading."""
        return self._products.done()

    def add(self) -> None:
        """See Reading."""
        adapter = self._entry.adapter
        try:
            products = self._products.result()
            self._runner.add(adapter.digest, products)
            self._runner.prove(self._layout, {adapter.digest: (adapter.name, products)})
        except Exception as error:
            self._runner.remove(adapter.digest)
            if isinstance(error, BatonError):
                raise
            kind = OutOfMemory if out_of_memory(error) else ModelError
            raise kind(f"adapter {adapter.name} cannot be loaded: {unexpected(error)}") from error

    def give_up(self) -> None:
        """See Reading."""
        self._products.cancel()


class LoraShelf:
    """Of one worker."""

    def __init__(
        self,
        runner: LoraRunner,
        base: Base,
        layout: KVLayout,
        *,
        folder: Path | None,
        own: Mapping[str, AdapterFiles],
    ) -> None:
        """`folder`: below it are those that come. `own`: of --lora, by digest, which may come back."""
        self._runner, self._base, self._layout = runner, base, layout
        self._folder, self._own = folder, own
        self._reader = ThreadPoolExecutor(1, "adapters")

    def read(self, entry: Entry) -> _Reading:
        """See Shelf."""
        return _Reading(
            self._runner, self._layout, entry, self._reader.submit(self._products, entry)
        )

    def drop(self, digest: str) -> None:
        """See Shelf."""
        self._runner.remove(digest)

    def _products(self, entry: Entry) -> Products:
        files = self._own.get(entry.adapter.digest)
        if files is None:
            files = read_same(self._folder, entry.adapter, entry.path)
        try:
            return read_products(files, self._base)
        except ModelError as error:  # a client reads it: without the way to the folder
            raise ModelError(str(error).replace(f"{self._folder}/", "")) from error
