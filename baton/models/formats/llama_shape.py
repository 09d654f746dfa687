"""params.json: the shape of a LLaMA, and so the shape of each of its tensors."""

from dataclasses import dataclass
from pathlib import Path

from baton.errors import ModelError
from baton.models.formats.checkpoint import count, number, read_json

RUN_TIME = {"max_batch_size", "max_seq_len"}  # how much the original program sets aside
KNOWN = RUN_TIME | {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """What params.json says, and what follows from it."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inside: int  # of the feed-forward part
    eps: float
    theta: float | None
    scaled_rope: bool
    rows: int | None  # of the vocabulary, where it says

    def of(self, name: str, rows: int) -> tuple[int, ...]:
        """The shape of a whole tensor; `rows` are the vocabulary's."""
        keys = self.width // self.heads * self.kv_heads
        for ending, shape in {
            "wk.weight": (keys, self.width),
            "wv.weight": (keys, self.width),
            "wq.weight": (self.width, self.width),
            "wo.weight": (self.width, self.width),
            "w1.weight": (self.inside, self.width),
            "w2.weight": (self.width, self.inside),
            "w3.weight": (self.inside, self.width),
            "norm.weight": (self.width,),
        }.items():
            if name.endswith(ending):
                return shape
        return (rows, self.width)


def read_shape(path: Path) -> Shape:
    """From params.json. ModelError names a field that this converter does not know."""
    params = read_json(path, "which says the model's shape")
    if unknown := sorted(set(params) - KNOWN):
        raise ModelError(
            f"{path} has {', '.join(unknown)[:200]}, which is not known here: only LLaMA 1, 2, 3, "
            "3.1, 3.2 (text) and 3.3 are converted, not quantized"
        )
    width, layers, heads, multiple = (
        count(params, name, path) for name in ("dim", "n_layers", "n_heads", "multiple_of")
    )
    kv_heads = heads if params.get("n_kv_heads") is None else count(params, "n_kv_heads", path)
    if width % (2 * heads) or heads % kv_heads:
        raise ModelError(
            f"{path}: {width} wide, {heads} heads and {kv_heads} for keys do not divide into each "
            "other"
        )
    inside = 8 * width // 3
    if params.get("ffn_dim_multiplier") is not None:
        inside = int(number(params, "ffn_dim_multiplier", path) * inside)
    inside = -(-inside // multiple) * multiple
    theta = None if params.get("rope_theta") is None else number(params, "rope_theta", path)
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ModelError(f"{path}: use_scaled_rope must be true or false, and is {scaled!r}")
    eps = number(params, "norm_eps", path)
    asked = params.get("vocab_size", -1)  # -1: as many as the tokenizer has
    rows = None if asked == -1 else count(params, "vocab_size", path)
    return Shape(width, layers, heads, kv_heads, inside, eps, theta, scaled, rows)
