"""Config: a GGUF file's metadata becomes config.json, and each tensor gets transformers' name.

Three families: llama (Mistral's and many others under this name), qwen2 and qwen3, gemma 1 to 3.
llama.cpp's converter changed some tensors, which is undone when they are read (weights.py):

    HALVES       rows of llama's q and k: it rotates neighbours, transformers halves of a head
    MINUS_ONE    gemma's norms are stored with 1 added

A value or a tensor that is not accounted for is refused by name: it may change what the model computes.
"""

import array
import math
from dataclasses import dataclass
from enum import Enum

from baton.checkpoints.jsonfile import Json
from baton.errors import ModelError
from baton.gguf.header import SIZES, Header, Tensor
from baton.gguf.kinds import what_it_is


class Undo(Enum):
    """What llama.cpp's converter did to a tensor."""

    NOTHING = 0
    HALVES = 1
    MINUS_ONE = 2


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the file, and what it is in transformers."""

    name: str
    tensor: Tensor
    undo: Undo
    head: int  # numbers of a head


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp's name of an architecture maps to transformers'."""

    model_type: str
    architecture: str
    layer: dict[str, str]  # transformers' names by llama.cpp's
    norms: dict[str, str]
    biases: tuple[str, ...] = ()  # tensors of a layer that always have one
    settings: tuple[tuple[str, object], ...] = ()
    halves: bool = False
    minus_one: bool = False


LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ATTENTION = tuple(name for name in LINEAR if name.startswith("attn_"))
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
SILU, GELU = ("hidden_act", "silu"), ("hidden_activation", "gelu_pytorch_tanh")
QKV = ("attn_q", "attn_k", "attn_v")
FAMILIES = {
    "llama": Family(
        "llama", "LlamaForCausalLM", LINEAR, NORMS, settings=(SILU, ("mlp_bias", False)), halves=True
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LINEAR, NORMS, biases=QKV, settings=(SILU,)),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", LINEAR, NORMS | HEAD_NORMS, settings=(SILU,)),
    "gemma": Family(
        "gemma", "GemmaForCausalLM", LINEAR, NORMS,
        settings=(GELU, ("hidden_act", "gelu_pytorch_tanh")), minus_one=True,
    ),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", LINEAR, GEMMA_NORMS, settings=(GELU,), minus_one=True
    ),
    "gemma3": Family(
        "gemma3_text", "Gemma3ForCausalLM", LINEAR, GEMMA_NORMS | HEAD_NORMS, settings=(GELU,),
        minus_one=True,
    ),
}  # fmt: skip

ROPE_FACTORS = "rope_freqs.weight"
COMPUTED = {"rope.freqs"}  # a table in old files
USED = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "attention.sliding_window",
    "attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
IDLE = {"rope.scaling.finetuned", "tensor_data_layout"}
NEUTRAL: dict[str, object] = {
    "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False,
}  # fmt: skip
"""Accepted with these values only, which change nothing."""

LARGEST = 1 << 24  # of a size in the config
NONE = (1 << 32) - 1  # an id that there is not
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<EOT>")
"""Taken where the chat template writes one and the file does not say which token ends a turn."""


@dataclass(frozen=True, slots=True)
class Described:
    """What transformers needs to know of a GGUF model, and its weights."""

    config: Json
    generation: Json
    weights: tuple[Weight, ...]


def describe(header: Header) -> Described:
    """Raises ModelError, in one line, for a model that transformers would compute otherwise."""
    reader = _Reader(header)
    config = reader.config()
    ids = reader.ids()
    config |= {"dtype": _dtype(header), "pad_token_id": None} | ids
    return Described(config, dict(ids), reader.weights(config))


def _dtype(header: Header) -> str:
    """The dtype that rounds no weight, as config.json calls it."""
    names = {SIZES[tensor.kind][0] for tensor in header.tensors.values()}
    return {"F16": "float16", "BF16": "bfloat16"}.get("".join(names), "float32")


class _Reader:
    """Reads one header; every method names the file in its errors."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._path = header.path
        self._values = header.values
        named = self._values.get("general.architecture")
        self._named = named if isinstance(named, str) else ""
        kind = self._values.get("general.type", "model")
        if kind != "model":
            kind = str(kind)[:40]
            called = f"its general.type is {kind!r}{what_it_is(kind)}"
            raise self._refused(f"holds no model: {called}; use the file with the model")
        family = FAMILIES.get(self._named)
        if family is None:
            called = f"has the architecture {self._named[:80]!r}{what_it_is(self._named)}"
            called = called if self._named else "names no architecture"
            read = ", ".join(FAMILIES)
            raise self._refused(
                f"{called}, and is not read: {read} are; use one of these, or a model in safetensors"
            )
        self._family = family

    def _refused(self, why: str) -> ModelError:
        return ModelError(f"{self._path} {why}")

    # ---- values

    def _get(self, name: str) -> object:
        return self._values.get(f"{self._named}.{name}")

    def _count(self, name: str, default: int | None = None) -> int:
        found = self._get(name)
        if isinstance(found, list) and found and len(set(found)) == 1:
            found = found[0]  # one for each layer
        if found is None and default is not None:
            return default
        if isinstance(found, bool) or not isinstance(found, int) or not 0 < found <= LARGEST:
            raise self._refused(f"has {self._named}.{name} {str(found)[:40]}: a count is needed")
        return found

    def _float(self, name: str, default: float | None = None) -> float:
        found = self._get(name)
        if found is None and default is not None:
            return default
        if isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < math.inf:
            return float(found)
        raise self._refused(f"has {self._named}.{name} {str(found)[:40]}: a number is needed")

    def _check_values(self) -> None:
        prefix = f"{self._named}."
        own = {key.removeprefix(prefix) for key in self._values if key.startswith(prefix)}
        for name in sorted(own):
            if name in NEUTRAL:
                if self._get(name) != NEUTRAL[name]:
                    raise self._refused(
                        f"has {prefix}{name} {str(self._get(name))[:40]}: such a model is not read"
                    )
            elif name not in USED | IDLE:
                raise self._refused(f"has {prefix}{name[:80]}, which is not known here")

    def ids(self) -> Json:
        """bos_token_id and eos_token_id: the end of a text, of a turn, and of a message."""
        found = self._token_id("bos_token_id")
        ends = [self._token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        if ends[1] is None:
            ends[1] = self._turn_end()
        some = list(dict.fromkeys(each for each in ends if each is not None))
        return {"bos_token_id": found, "eos_token_id": some or None}

    def _turn_end(self) -> int | None:
        tokens = self._values.get("tokenizer.ggml.tokens")
        template = self._values.get("tokenizer.chat_template")
        if not isinstance(tokens, list) or not isinstance(template, str):
            return None
        found = [text for text in TURN_ENDS if text in template and text in tokens]
        return tokens.index(found[0]) if found else None  # type: ignore[arg-type]

    def _token_id(self, name: str) -> int | None:
        tokens = self._values.get("tokenizer.ggml.tokens")
        found = self._values.get(f"tokenizer.ggml.{name}")
        if found is None or found == NONE or found == -1:
            return None
        size = len(tokens) if isinstance(tokens, list) else 0
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < size:
            raise self._refused(f"has tokenizer.ggml.{name} {str(found)[:40]} of {size:,} tokens")
        return found

    # ---- config.json

    def config(self) -> Json:
        self._check_values()
        family = self._family
        heads = self._count("attention.head_count")
        config: Json = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": self._shape("token_embd.weight")[0],
            "hidden_size": self._count("embedding_length"),
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": self._head(heads),
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self._header.tensors,
            "rope_parameters": self._rope(),
        }
        if self._named != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in self._header.tensors
        tokens = self._values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > config["vocab_size"]:
            raise self._refused(
                f"has {len(tokens):,} tokens and embeddings for {config['vocab_size']:,}"
            )
        return config | dict(family.settings) | self._windows(config)

    def _layers(self) -> int:
        layers = self._count("block_count")
        if layers > len(self._header.tensors):  # first: a number from a file must not fill memory
            raise self._refused(f"does not hold the {layers:,} layers of {self._named}.block_count")
        return layers

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._header.tensors:
            raise self._refused(f"lacks the tensor {name}")
        return self._header.tensors[name].shape

    def _head(self, heads: int) -> int:
        """Numbers of a head. All of them are rotated, here and in transformers."""
        rows = self._shape("blk.0.attn_q.weight")[0]
        head = rows // heads
        if rows % heads or head % 2:
            raise self._refused(
                f"has {heads} heads, which do not divide {rows} rows of queries evenly"
            )
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if self._count(name, head) != head:
                raise self._refused(
                    f"has {self._named}.{name} {self._get(name)} and heads of {head}: such a model is "
                    "not read"
                )
        return head

    def _rope(self) -> Json:
        theta = self._float("rope.freq_base", 10000.0)
        rope = {"rope_theta": theta} | self._scaling(theta)
        if self._named == "gemma3":
            near = {
                "rope_type": "default",
                "rope_theta": self._float("rope.freq_base_swa", 10000.0),
            }
            return {"full_attention": rope, "sliding_attention": near}
        return rope

    def _scaling(self, theta: float) -> Json:
        """How the rotary embedding reaches beyond the length of the training."""
        kind = self._get("rope.scaling.type")
        if kind in (None, "none") and self._get("rope.scale_linear") is not None:
            kind = "linear"
        if ROPE_FACTORS in self._header.tensors:
            if kind not in (None, "none") or self._named == "gemma3":
                raise self._refused(f"has {ROPE_FACTORS} and rope.scaling.type {kind!r} at once")
            return self._llama3(theta)
        if kind in (None, "none"):
            return {"rope_type": "default"}
        if kind == "linear":
            factor = self._float("rope.scaling.factor", self._float("rope.scale_linear", 1.0))
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn" and self._named != "gemma3":
            return {
                "rope_type": "yarn",
                "factor": self._float("rope.scaling.factor"),
                "original_max_position_embeddings": self._count(
                    "rope.scaling.original_context_length"
                ),
            }
        raise self._refused(f"has rope.scaling.type {str(kind)[:40]!r}, which is not read")

    def _llama3(self, theta: float) -> Json:
        """LLaMA 3.1's scaling. The file has divisors of the frequencies, transformers the four numbers
        behind them, of which three never varied."""
        tensor = self._header.tensors[ROPE_FACTORS]
        divisors = read_floats(tensor)
        factor = round(max(divisors), 3)
        rope = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = llama3_divisors(theta, len(divisors), factor)
        if not all(
            math.isclose(a, b, rel_tol=1e-4) for a, b in zip(divisors, expected, strict=True)
        ):
            raise self._refused(f"has divisors in {ROPE_FACTORS} that are not LLaMA 3.1's")
        return rope

    def _windows(self, config: Json) -> Json:
        """What only gemma has: layers that see a window, and a limit on scores and logits."""
        named, layers = self._named, int(config["num_hidden_layers"])
        if named not in ("gemma2", "gemma3"):
            limits = [name for name in sorted(USED) if "sliding" in name or "softcapping" in name]
            if there := [name for name in limits if self._get(name) is not None]:
                raise self._refused(f"has {named}.{there[0]}: such a model is not read")
            return {}
        every = 2 if named == "gemma2" else 6
        pattern = self._get("attention.sliding_window_pattern")
        near = [bool((layer + 1) % every) for layer in range(layers)]
        if pattern is not None and pattern not in (every, near):
            raise self._refused(
                f"has another {named}.attention.sliding_window_pattern than {every}"
            )
        largest = (named, layers) in (("gemma2", 46), ("gemma3", 62))  # the 27B models
        scale = int(config["hidden_size"]) // int(config["num_attention_heads"])
        scores = 50.0 if named == "gemma2" else None
        logits = 30.0 if named == "gemma2" else None
        return {
            "sliding_window": self._count("attention.sliding_window", 4096),
            "layer_types": ["sliding_attention" if each else "full_attention" for each in near],
            "query_pre_attn_scalar": scale
            if largest
            else 256,  # in no file: llama.cpp's code has it
            "attn_logit_softcapping": self._limit("attn_logit_softcapping", scores),
            "final_logit_softcapping": self._limit("final_logit_softcapping", logits),
        }

    def _limit(self, name: str, default: float | None) -> float | None:
        return default if self._get(name) is None else self._float(name)

    # ---- tensors

    def weights(self, config: Json) -> tuple[Weight, ...]:
        """Every tensor with its name, in the file's order. ModelError for one that is missing, has the
        wrong shape, or has no place in the model."""
        expected = self._expected(config)
        found = self._header.tensors
        if missing := sorted(set(expected) - set(found)):
            raise self._refused(f"lacks {_some(missing)}; fetch it again")
        if more := sorted(set(found) - set(expected) - COMPUTED - {ROPE_FACTORS}):
            raise self._refused(
                f"holds {_some(more)}, which {self._family.architecture} does not have"
            )
        weights = []
        for name, tensor in found.items():
            if name not in expected:
                continue
            theirs, shape = expected[name]
            if tensor.shape != shape:
                raise self._refused(
                    f"has {name} of the shape {list(tensor.shape)}, its sizes need {list(shape)}"
                )
            weights.append(Weight(theirs, tensor, self._undo(name), int(config["head_dim"])))
        return tuple(weights)

    def _expected(self, config: Json) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that the model must have, by llama.cpp's name."""
        width, inside = int(config["hidden_size"]), int(config["intermediate_size"])
        head = int(config["head_dim"])
        queries = int(config["num_attention_heads"]) * head
        keys = int(config["num_key_value_heads"]) * head
        rows = (int(config["vocab_size"]), width)
        shapes = {
            "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
            "attn_output": (width, queries), "ffn_gate": (inside, width), "ffn_up": (inside, width),
            "ffn_down": (width, inside), "attn_q_norm": (head,), "attn_k_norm": (head,),
        }  # fmt: skip
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "token_embd.weight": ("model.embed_tokens.weight", rows),
            "output_norm.weight": ("model.norm.weight", (width,)),
        }
        if not config["tie_word_embeddings"]:
            expected["output.weight"] = ("lm_head.weight", rows)
        family = self._family
        biased = ATTENTION if config.get("attention_bias") else family.biases
        for layer in range(int(config["num_hidden_layers"])):
            for own, theirs in (family.layer | family.norms).items():
                name, place = f"blk.{layer}.{own}", f"model.layers.{layer}.{theirs}"
                shape = shapes.get(own, (width,))
                expected[f"{name}.weight"] = (f"{place}.weight", shape)
                if own in biased:
                    expected[f"{name}.bias"] = (f"{place}.bias", shape[:1])
        return expected

    def _undo(self, name: str) -> Undo:
        own = name.split(".")[-2]
        if self._family.minus_one and own.endswith("norm"):
            return Undo.MINUS_ONE
        if self._family.halves and own in ("attn_q", "attn_k"):
            return Undo.HALVES
        return Undo.NOTHING


def llama3_divisors(theta: float, count: int, factor: float) -> list[float]:
    """By what LLaMA 3.1 divides each frequency: 1 for short waves, `factor` for long ones."""
    divisors = []
    for index in range(count):
        wave = 2 * math.pi * theta ** (index / count)
        smooth = min(max((8192 / wave - 1) / (4 - 1), 0), 1)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def read_floats(tensor: Tensor) -> list[float]:
    """The numbers of a small tensor in float32."""
    if SIZES[tensor.kind][0] != "F32" or tensor.nbytes > 1 << 16:
        raise ModelError(f"{tensor.path}: {tensor.name} must be a short list in F32")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return list(array.array("f", file.read(tensor.nbytes)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
