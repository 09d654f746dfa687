"""Embeddings: /v1/embeddings, OpenAI's API over a causal model.

    input -> CompletionRequest (checks, limits, quotas) -> Submits with `pooling` -> Finished.embedding

An embedding is the model's last hidden state, after the final norm, pooled over the prompt's tokens and
of length 1. Prefill workers compute it: the router schedules it like a fill, and nothing is generated.
https://platform.openai.com/docs/api-reference/embeddings
"""

import base64
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from baton.errors import RequestError
from baton.server import bodies
from baton.server.api_error import ApiError
from baton.server.asking import Asker, translated
from baton.server.fields import LEAVE_OUT, Fields, Refusals
from baton.server.pieces import renamed
from baton.server.schema import (
    LONGEST_TIMEOUT_S,
    Bool,
    CompletionRequest,
    Int,
    Number,
    Prompt,
    Text,
)
from baton.server.shapes import Choice, CompletionShape
from baton.server.sse import json_of
from baton.server.stream import PreparedRequest
from baton.text import Tokenizer

EMBEDDINGS: Refusals = {
    "dimensions": ((), "the model has one size"), "messages": ((), "use input"),
    "truncate_prompt_tokens": ((), "send a shorter input"), "normalize": ((True,), LEAVE_OUT),
    "embed_dtype": (("float32",), LEAVE_OUT), "softmax": ((), LEAVE_OUT), "activation": ((), LEAVE_OUT),
    "input_type": ((), "write it into input"), "prompt": ((), "use input"),
    "lora_path": ((), LEAVE_OUT), "image": ((), "only text is taken"),
}  # fmt: skip
NAMES = {"prompt": "input", "max_tokens": "input"}
"""What a completion's fields are called here. One generated token must fit beside the input."""


class EmbeddingRequest(Fields):
    """/v1/embeddings."""

    unsupported: ClassVar[Refusals] = EMBEDDINGS

    model: Text | None = Field(None, max_length=256, description="One of /v1/models.")
    input: Prompt = Field(description="A text, texts, token ids, or lists of token ids.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: of little-endian float32."
    )
    pooling: Literal["mean", "last"] | None = Field(
        None, description="Of the tokens' hidden states; without it that of --embedding-pooling."
    )
    add_special_tokens: Bool = True
    priority: Int = Field(0, ge=-(2**31), lt=2**31)
    timeout: Number | None = Field(None, gt=0, le=LONGEST_TIMEOUT_S)
    user: Text | None = None

    def completion(self) -> dict[str, Any]:
        """A completion of the same prompts."""
        same = ("model", "add_special_tokens", "priority", "timeout")
        found = {name: value for name in same if (value := getattr(self, name)) is not None}
        return found | {"prompt": self.input, "max_tokens": 1, "temperature": 0}


class EmbeddingShape(CompletionShape):
    """A completion of which the embeddings are shown, and no text."""

    def __init__(self, head: dict[str, Any], tokenizer: Tokenizer, *, as_base64: bool) -> None:
        super().__init__(head, tokenizer)
        self._as_base64 = as_base64

    def whole(self, choices: Sequence[Choice], usage_: dict[str, Any]) -> bytes:
        """The response as one JSON object."""
        listed = ",".join([self._shown(choice) for choice in choices])
        model, tokens = json_of(self._head["model"]), usage_["prompt_tokens"]
        usage = json_of({"prompt_tokens": tokens, "total_tokens": tokens})
        text = f'{{"object":"list","data":[{listed}],"model":{model},"usage":{usage}}}'
        return text.encode()

    def _shown(self, choice: Choice) -> str:
        if self._as_base64:
            shown = f'"{base64.b64encode(choice.embedding).decode()}"'
        else:  # so many digits tell every float32 from all others
            shown = f"[{','.join([f'{each:.9g}' for each in array('f', choice.embedding)])}]"
        return f'{{"object":"embedding","index":{choice.index},"embedding":{shown}}}'


def add_embeddings(app: FastAPI, asker: Asker) -> dict[str, Any]:
    """Returns what FastPath calls for each path."""
    service = asker.service

    @app.post(bodies.Path.EMBEDDINGS, tags=["openai"])
    async def embeddings(request: Request, payload: EmbeddingRequest) -> Response:
        """Embed one or several texts, given as text or token ids."""
        head = {"model": payload.model or service.names[0]}
        shape = EmbeddingShape(
            head, service.tokenizer, as_base64=payload.encoding_format == "base64"
        )

        def embedding(prepared: PreparedRequest) -> PreparedRequest:
            pooling = payload.pooling or service.settings.pooling
            return replace(prepared, shape=shape, pooling=pooling)

        try:
            completion = await translated(CompletionRequest, payload.completion(), request)
            begun = await asker.begin(request, completion, embedding)
            content = await begun.stream.whole(request.receive)
        except (ApiError, RequestError) as error:
            raise renamed(error, NAMES) from error
        return Response(content, headers=begun.headers, media_type="application/json")

    return {bodies.Path.EMBEDDINGS: (EmbeddingRequest, embeddings)}
