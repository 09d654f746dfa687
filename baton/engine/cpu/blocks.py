"""Matrices of 4 and 8 bits with a scale for each block of columns, in the order in which kernels read
them (native/blocks.h). A product of such a matrix has the bits of one with its restored() floats.

The kernels and this format are tested; no checkpoint is loaded into them yet (docs/checkpoints.md)."""

from dataclasses import dataclass

import torch

CHANNELS = 64  # of a panel
GRAIN = 8  # columns: of a matrix, and of a block, they are a multiple


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A matrix [rows, columns]. Its integers are int8 from -2^(bits-1) on, or with zeros or minima uint8
    from 0 on. Those of a block of `block` columns in a row, the last one perhaps of fewer, share a scale.

    Scales, and zeros or minima, are float16 or float32 [rows, blocks], all of one dtype. A scale times an
    integer, and times a zero point, must be exact in float32, or there are neither zeros nor minima.
    ValueError for what does not fit together."""

    bits: int  # 4 or 8
    block: int
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        if self.bits not in (4, 8) or columns % GRAIN or self.block % GRAIN or self.block < GRAIN:
            raise ValueError(
                f"columns and blocks are multiples of {GRAIN}, got {columns} in blocks of {self.block}"
            )
        if self.zeros is not None and self.minima is not None:
            raise ValueError("a block has a zero point or a minimum, not both")
        shape = (rows, -(-columns // self.block))
        for each in (self.scales, self.beside):
            if each is not None and (each.shape != shape or each.dtype != self.scales.dtype):
                raise ValueError(f"scales and offsets must be {shape}, got {tuple(each.shape)}")
        if self.scales.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"scales are float16 or float32, got {self.scales.dtype}")

    @property
    def beside(self) -> torch.Tensor | None:
        """Zeros or minima, if there are any."""
        return self.zeros if self.minima is None else self.minima

    @property
    def offset(self) -> str:
        """A name of structures.OFFSETS."""
        return "zeros" if self.zeros is not None else "none" if self.minima is None else "minima"

    def restored(self) -> torch.Tensor:
        """float32 [rows, columns]."""
        index = torch.arange(self.values.shape[1]) // self.block
        scales, numbers = self.scales.float()[:, index], self.values.float()
        if self.minima is not None:
            return numbers * scales + self.minima.float()[:, index]
        if self.zeros is not None:
            numbers = numbers - self.zeros.float()[:, index]
        return numbers * scales

    def packed(self) -> torch.Tensor:
        """uint8 [bytes]: the panels."""
        rows, columns = self.values.shape
        panels = -(-rows // CHANNELS)
        whole = columns // self.block
        values = _padded(self.values.view(torch.uint8), panels)
        sides = [_padded(each, panels) for each in (self.scales, self.beside) if each is not None]
        parts = []
        for first, count, wide in ((0, whole, self.block), (whole, 1, columns % self.block)):
            if not count or not wide:
                continue
            begin = first * self.block
            some = values[:, :, begin : begin + count * wide]  # [panels, 64, columns]
            heads = [
                each[:, :, first : first + count].transpose(1, 2).contiguous().view(torch.uint8)
                for each in sides
            ]
            steps = self._words(some).view(panels, CHANNELS, count, -1, 4).permute(0, 2, 3, 1, 4)
            parts.append(torch.cat([*heads, steps.flatten(2)], -1).flatten(1))
        return torch.cat(parts, 1).flatten()

    def _words(self, values: torch.Tensor) -> torch.Tensor:
        """Bytes of words, the first integer in the lowest bits: [panels, 64, columns * bits / 8]."""
        if self.bits == 8:
            return values.contiguous()
        return values[..., ::2] & 15 | values[..., 1::2] << 4


def _padded(numbers: torch.Tensor, panels: int) -> torch.Tensor:
    """[panels, 64, ...], with zeros where there are fewer rows."""
    more = panels * CHANNELS - len(numbers)
    if more:
        numbers = torch.cat([numbers, numbers.new_zeros(more, *numbers.shape[1:])])
    return numbers.view(panels, CHANNELS, *numbers.shape[1:])
