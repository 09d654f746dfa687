"""The draw: two exponential races with random numbers that are functions of counters."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sampler.counters import uniforms

BLOCK = 256  # ids that run as one in the first race; changing it changes every draw


def draw(scores: Tensor, seeds: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """One token per row, int64 [rows], with probability softmax(scores): two exponential races.

    If every runner i takes an Exp(1) time divided by its weight, i is first with probability
    weight_i / sum of weights (the Gumbel-max trick without its outer logarithm). First the blocks
    of 256 neighbouring ids race with their summed weights, then the tokens of the winning block:
    the same distribution as one race over the vocabulary for 1/100 of its random numbers.

    Why not the inverse of the cumulative sum: that has a boundary at every token, and all of them
    move when the logits' last bits do (another batch shape, another machine); in a race only the
    leaders can change places. Measured with noise of 1e-5 on 50,257 normal logits of standard
    deviation 2.2: 57 of 9,600 draws changed with the inverse, none with the races.
    """
    vocab = scores.shape[-1]
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    blocks = pad(weights, (0, -vocab % BLOCK)).reshape(len(scores), -(-vocab // BLOCK), BLOCK)
    counter = (seeds[:, None], choices[:, None], positions[:, None])

    lanes = torch.arange(blocks.shape[1], device=scores.device)
    block = _first(blocks.sum(dim=-1), uniforms(*counter, -1 - lanes))  # lanes < 0: blocks
    tokens = block[:, None] * BLOCK + torch.arange(BLOCK, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    return block * BLOCK + _first(blocks[rows, block], uniforms(*counter, tokens))


def draw_from(
    ids: Tensor, scores: Tensor, vocab: int, seeds: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """`draw` where every token but `ids` is -inf; `ids` and their scores: [rows, k]."""
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    counter = (seeds[:, None], choices[:, None], positions[:, None])

    blocks = torch.zeros(len(ids), -(-vocab // BLOCK), dtype=torch.float64, device=ids.device)
    blocks.scatter_add_(1, ids // BLOCK, weights.double())
    lanes = torch.arange(blocks.shape[1], device=ids.device)
    block = _first(blocks, uniforms(*counter, -1 - lanes))[:, None]  # lanes < 0: blocks
    there = torch.where(ids // BLOCK == block, weights, 0.0)
    winner = _first(there, uniforms(*counter, ids))
    return ids.gather(1, winner[:, None])[:, 0]


def _first(weights: Tensor, uniform: Tensor) -> Tensor:
    """Who wins an exponential race: int64 [rows], for weights and uniforms [rows, runners]."""
    return (weights.double() / -uniform.log()).argmax(dim=-1)
