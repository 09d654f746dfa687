"""Pooled: the hidden states of a prompt's tokens as one vector of length 1, chunk by chunk."""

import torch

from baton.errors import TransferError


class Pooled:
    """`pooling`: the mean of all tokens, or the last one (baton/params.py). Sums are kept in float64, so
    chunks of other sizes change the last bit of few numbers, if any."""

    def __init__(self, pooling: str) -> None:
        self._pooling = pooling
        self._sum: torch.Tensor | None = None

    def add(self, hidden: torch.Tensor) -> None:
        """The next tokens'. [tokens, width]"""
        new = hidden.double()
        new = new.sum(0) if self._pooling == "mean" else new[-1]
        keeps = self._pooling == "mean" and self._sum is not None
        self._sum = self._sum + new if keeps and self._sum is not None else new

    @property
    def vector(self) -> bytes:
        """float32. The length of a mean does not matter, so the sum is not divided. Raises TransferError
        if the numbers are not finite."""
        assert self._sum is not None
        if not self._sum.isfinite().all():
            raise TransferError("the hidden states of the prompt are not finite numbers")
        length = self._sum.norm().clamp_min(torch.finfo(torch.float32).tiny)
        return (self._sum / length).float().cpu().numpy().tobytes()
