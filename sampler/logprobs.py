"""Log-probabilities of the model itself: taken from the raw logits, before penalties, temperature
and filters (what vLLM calls `raw_logprobs`), in float32."""

import torch
from torch import Tensor


def logprobs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """float32 [rows]: how likely each row's token was.

    logits [rows, vocab], any float type; token_ids int64 [rows].
    """
    return logits.float().log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row, likeliest first.

    Returns values float32 [rows, count] and ids int64 [rows, count]; a token's value has the same
    bits as `logprobs_of` gives for it.
    """
    if not 0 <= count <= logits.shape[-1]:
        raise ValueError(f"count must be in [0, vocab = {logits.shape[-1]}], got {count}")
    values, ids = torch.topk(logits.float().log_softmax(dim=-1), count, dim=-1)
    return values, ids
