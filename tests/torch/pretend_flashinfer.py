"""A stand-in for the `flashinfer` package where there is no GPU: its two wrappers as its documentation
describes them (0.7), in plain torch. A wrapper for CUDA graphs reads nothing but the buffers it was
given, as a replayed graph would."""

import math
from typing import Any

import torch

__version__ = "0.pretended"


class BatchDecodeWithPagedKVCacheWrapper:
    """One query token a sequence."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert kv_layout == "NHD"
        assert use_cuda_graph
        assert backend in ("auto", "fa2", "fa3")
        assert paged_kv_indptr_buffer is not None
        assert paged_kv_indices_buffer is not None
        assert paged_kv_last_page_len_buffer is not None
        assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
        self.offsets, self.blocks = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self.last = paged_kv_last_page_len_buffer
        self.options: dict[str, Any] = {}

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        check(indptr, indices, last_page_len, page_size)
        assert len(last_page_len) == len(self.last), "the batch size is fixed"
        assert len(indices) <= len(self.blocks)
        self.offsets.copy_(indptr)
        self.blocks[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.options = options | {"heads": num_qo_heads, "kv_heads": num_kv_heads}
        assert num_qo_heads % num_kv_heads == 0

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        queries = torch.arange(len(self.last) + 1, dtype=torch.int32)
        return attend(q, cache, queries, self.offsets, self.blocks, self.last, self.options)


class BatchPrefillWithPagedKVCacheWrapper:
    """Rows of any length, aligned at their ends."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        assert kv_layout == "NHD"
        self.planned: tuple[torch.Tensor, ...] = ()
        self.options: dict[str, Any] = {}

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        **options: Any,
    ) -> None:
        check(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert qo_indptr.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr)
        assert causal
        self.planned = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.options = options | {"heads": num_qo_heads, "kv_heads": num_kv_heads}

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return attend(q, cache, *self.planned, self.options)


def check(offsets: torch.Tensor, blocks: torch.Tensor, last: torch.Tensor, page_size: int) -> None:
    """What it says of its arguments."""
    assert {each.dtype for each in (offsets, blocks, last)} == {torch.int32}
    assert offsets[0] == 0
    assert offsets[-1] == len(blocks)
    assert (offsets.diff() >= 1).all()
    assert (last >= 1).all()
    assert (last <= page_size).all()


def attend(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    queries: torch.Tensor,
    offsets: torch.Tensor,
    blocks: torch.Tensor,
    last: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Sequence by sequence. window_left: how many keys before its own a query sees, -1 for all."""
    assert q.is_contiguous()
    assert q.shape[1] == options["heads"]
    assert cache[0].shape[2] == options["kv_heads"]
    assert q.dtype == options["q_data_type"]
    size, groups = cache[0].shape[1], options["heads"] // options["kv_heads"]
    cap, window = options["logits_soft_cap"] or 0.0, options["window_left"]
    found = torch.empty_like(q)
    for i in range(len(last)):
        mine = blocks[offsets[i] : offsets[i + 1]].long()
        tokens = (len(mine) - 1) * size + int(last[i])
        keys, values = (
            each[mine].flatten(0, 1)[:tokens].repeat_interleave(groups, 1).transpose(0, 1)
            for each in cache
        )
        rows = q[queries[i] : queries[i + 1]].transpose(0, 1)  # [H, Q, D]
        scores = (rows @ keys.transpose(1, 2)).float() * options["sm_scale"]
        if cap > 0:
            scores = cap * torch.tanh(scores / cap)
        query = torch.arange(tokens - rows.shape[1], tokens)[:, None]
        key = torch.arange(tokens)[None]
        seen = (key <= query) & ((key >= query - window) if window >= 0 else True)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(values.dtype)
        found[queries[i] : queries[i + 1]] = (weights @ values).transpose(0, 1)
    return found
