"""Capture: traces a transformers model's forward once, into a flat graph of aten operations.

The model's code runs over fake tensors (without data), with baton's attention in place of its own.
Token counts are primes that occur in no weight's shape, so lower.py can tell them from the model's
dimensions.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

from baton.engine.attention import AttentionParams
from baton.engine.errors import CompileError
from baton.engine.rotary import VARYING, varying

TOKENS, LOGIT_ROWS = 10007, 10009
"""The number of tokens in the traced forward, and how many of them need logits."""

_library = torch.library.Library("baton", "DEF")
_library.define("attend(Tensor query, Tensor key, Tensor value, int layer) -> Tensor")


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_library.impl("attend", _attended, "Meta")


@dataclass(frozen=True, slots=True)
class Captured:
    """One forward: input_ids, position_ids, logit_rows -> logits, in any float dtype."""

    graph: Graph
    constants: dict[str, torch.Tensor]  # the graph's get_attr targets: weights, buffers
    layer_params: tuple[AttentionParams, ...]  # one per attention layer, in order


class _Attention:
    """An AttentionContext (see attention.py) that puts one operation per layer into the graph."""

    def __init__(self) -> None:
        self.layer_params: list[AttentionParams] = []

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        self.layer_params.append(params)
        attended: torch.Tensor = torch.ops.baton.attend(
            query, key, value, len(self.layer_params) - 1
        )
        return attended


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the stack trace that torch logs for an operation it cannot trace: the CompileError has
    one line of it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def capture(model: PreTrainedModel) -> Captured:
    """Trace a forward that holds for any batch. CompileError if the model's control flow depends on
    computed values, or its rotary frequencies on the length of the sequence."""
    if varying(model):  # a trace would have those of one length, or of the batch's longest sequence
        raise CompileError(VARYING)
    attention = _Attention()

    def forward(
        ids: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        logits: torch.Tensor = model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=logit_rows,
            baton=attention,
        ).logits
        return logits

    if any(TOKENS in each.shape or LOGIT_ROWS in each.shape for each in model.parameters()):
        raise CompileError(f"it has a dimension of {TOKENS} or {LOGIT_ROWS}")
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    trace = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), _quiet():
            module = trace(tokens, tokens.clone(), torch.zeros(LOGIT_ROWS, dtype=torch.long))
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        raise CompileError(f"it cannot be traced: {str(error).strip().splitlines()[0]}") from error
    module.graph.eliminate_dead_code()
    constants = {
        str(node.target): getattr(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    return Captured(module.graph, constants, tuple(attention.layer_params))
