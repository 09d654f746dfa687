"""Why transformers does not load a folder, in terms of its config.json.

transformers looks things up and computes with what config.json says; what it raises then ("integer
division or modulo by zero", "'sillu'") names no entry of it.
"""

from pathlib import Path

from baton.checkpoints.families import text_part
from baton.checkpoints.jsonfile import Json, reason
from baton.errors import ModelError

SIZES = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"),
    *("num_local_experts", "num_experts", "moe_intermediate_size", "num_experts_per_tok"),
    *(
        "n_layer",
        "n_head",
        "n_embd",
        "n_inner",
        "n_positions",
        "num_layers",
        "num_heads",
        "ffn_dim",
    ),
)
"""Entries that are whole numbers above 0 in every family that has them; null is the family's default."""
DTYPES = ("dtype", "torch_dtype")
NAMES_OF_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
LONGEST = 80  # characters shown of a value


def not_loaded(name: str, folder: Path, config: Json, error: Exception) -> ModelError:
    """What to raise for an error of transformers: the entry of `config` it is about, else its words."""
    where = "" if name == str(folder) else f" from {folder}"
    why = wrong_entry(config, error) or reason(error)
    return ModelError(f"{name} cannot be loaded{where}: {why}")


def wrong_entry(config: Json, error: Exception) -> str | None:
    """The entry of a configuration that makes transformers raise this; None if it cannot be told."""
    entries = [entry for part in (config, text_part(config)) for entry in part.items()]
    for key, value in entries:
        if key in SIZES and value is not None and (type(value) is not int or value < 1):
            return f"{_shown(key, value)}, but must be a whole number above 0"
        if key in DTYPES and value is not None and not _names_a_dtype(value):
            return f"{_shown(key, value)}, but must be one of {', '.join(NAMES_OF_DTYPES)}"
    if isinstance(error, KeyError) and error.args:
        for key, value in entries:
            if isinstance(value, str) and value == error.args[0]:
                return f"{_shown(key, value)}, which transformers does not know"
    if isinstance(error, ZeroDivisionError):
        zeros = {key for key, value in entries if type(value) in (int, float) and not value}
        if suspects := sorted(key for key in zeros if not key.endswith(("_id", "drop", "dropout"))):
            return f"{reason(error)}; config.json has 0 for {', '.join(suspects[:5])}"
    return None


def _names_a_dtype(value: object) -> bool:
    """Whether transformers can read it. Those of 8 bits are a checkpoint's, and no family's."""
    return isinstance(value, str) and value.removeprefix("torch.") in NAMES_OF_DTYPES


def _shown(key: str, value: object) -> str:
    text = repr(value)
    return f"{key} in config.json is {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
