"""Adapters that come and go: /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them.

    body -> the folder is read and hashed here -> LoadAdapter -> the router -> every worker
                                                                 router/catalog.py decides

Off without --allow-lora-updates FOLDER: whoever can use the API can then change which adapters there are,
and name folders below FOLDER, but no others (baton/adapters/below.py).
https://docs.vllm.ai/en/latest/features/lora/
"""

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from baton.adapters.below import FLAG, NoAdapter, path_below, read_below
from baton.adapters.files import LONGEST_NAME
from baton.adapters.identity import Adapter
from baton.errors import InputError, ModelError
from baton.server import bodies
from baton.server.api_error import ApiError, from_failed
from baton.server.fields import LEAVE_OUT, Fields, Refusals
from baton.server.schema import Bool, Text
from baton.server.service import GenerationService
from baton.wire.messages import LoadAdapter, UnloadAdapter

LOADING: Refusals = {
    "is_3d_lora_weight": ((False,), "adapters of experts are not served"),
    "base_model_name": ((), LEAVE_OUT), "lora_int_id": ((), LEAVE_OUT), "pinned": ((False,), LEAVE_OUT),
}  # fmt: skip
UNLOADING: Refusals = {"lora_int_id": ((), "give its lora_name")}
PLACE = "lora_path"

logger = logging.getLogger(__name__)


class LoadRequest(Fields):
    """/v1/load_lora_adapter."""

    unsupported: ClassVar[Refusals] = LOADING

    lora_name: Text = Field(min_length=1, max_length=LONGEST_NAME, description="Its `model`.")
    lora_path: Text = Field(description=f"Its folder, below that of {FLAG}.")
    load_inplace: Bool = Field(False, description="In the place of one that has this name.")


class UnloadRequest(Fields):
    """/v1/unload_lora_adapter."""

    unsupported: ClassVar[Refusals] = UNLOADING

    lora_name: Text = Field(min_length=1, max_length=LONGEST_NAME)


class Adapters:
    """Loads one after another: reading a folder takes time and memory bandwidth."""

    def __init__(self, service: GenerationService, root: Path) -> None:
        self._service, self._root = service, root
        self._turn = asyncio.Lock()

    async def load(self, asked: LoadRequest) -> str:
        """Returns what to say. Raises ApiError."""
        name = _printable(asked.lora_name)
        if name in self._service.names:
            text = f"{name[:80]!r} is a name of the model: give the adapter another one"
            raise ApiError.bad_request(text, "lora_name")
        async with self._turn:
            path, adapter = await asyncio.to_thread(self._read, name, asked.lora_path)
            request = LoadAdapter(_request(), adapter, path, asked.load_inplace)
            await self._change(request, PLACE)
        logger.info("adapter %r is loaded from %s", name, path)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, asked: UnloadRequest) -> str:
        """Returns what to say. Raises ApiError."""
        name = _printable(asked.lora_name)
        await self._change(UnloadAdapter(_request(), name), "lora_name")
        logger.info("adapter %r is unloaded", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _read(self, name: str, given: str) -> tuple[str, Adapter]:
        try:
            path = path_below(self._root, given)
            return path, read_below(self._root, name, path).adapter
        except NoAdapter as error:
            raise ApiError(
                404, str(error), "not_found_error", param=PLACE, code="not_found"
            ) from error
        except (InputError, ModelError) as error:
            raise ApiError.bad_request(str(error), PLACE) from error

    async def _change(self, asked: LoadAdapter | UnloadAdapter, param: str) -> None:
        answer = await self._service.router.change(asked)
        if answer.code:
            raise from_failed(answer.code, answer.why, param)


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ApiError.bad_request("lora_name must have printable characters", "lora_name")
    return name


def _request() -> str:
    return f"adapter-{secrets.token_hex(8)}"


def add_adapters(app: FastAPI, service: GenerationService) -> dict[str, Any]:
    """Returns what FastPath calls for each path; without the option the paths are not there."""
    root = service.settings.allow_lora_updates
    if root is None:
        return {}
    adapters = Adapters(service, root)

    @app.post(bodies.Path.LOAD_ADAPTER, tags=["adapters"], response_class=PlainTextResponse)
    async def load_lora_adapter(request: Request, payload: LoadRequest) -> Response:
        """Load an adapter on all workers, and offer it as a `model`."""
        return PlainTextResponse(await adapters.load(payload))

    @app.post(bodies.Path.UNLOAD_ADAPTER, tags=["adapters"], response_class=PlainTextResponse)
    async def unload_lora_adapter(request: Request, payload: UnloadRequest) -> Response:
        """Offer an adapter no more. Requests that run with it end as usual."""
        return PlainTextResponse(await adapters.unload(payload))

    return {
        bodies.Path.LOAD_ADAPTER: (LoadRequest, load_lora_adapter),
        bodies.Path.UNLOAD_ADAPTER: (UnloadRequest, unload_lora_adapter),
    }
