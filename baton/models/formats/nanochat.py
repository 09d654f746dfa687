"""nanochat's checkpoints: model_NNNNNN.pt with meta_NNNNNN.json, and tokenizer.pkl.

What these files can say changed in January 2026: value embeddings, scaled residuals, sliding windows
and more came in. transformers' NanoChat model is the one from before. A checkpoint that needs any of
the new parts is refused by their names; where their values do nothing, they are left out.

Three numbers stand in nanochat's code and in no file of its: the rope's base 10,000, the logits' cap
15, and a norm's epsilon, which is float32's own. All checkpoints that pass here were made with them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.errors import ModelError
from baton.models.formats.bytelevel import byte_level
from baton.models.formats.checkpoint import (
    Checkpoint,
    Json,
    Load,
    Tensors,
    Vocabulary,
    check_names,
    check_shape,
    count,
    given_vocabulary,
    read_json,
    widest,
)
from baton.models.formats.encoding_file import read_encoding

MODEL_FILE = re.compile(r"model_(\d{6,})\.pt")
COMPILED = "_orig_mod."  # what torch.compile puts before each name
KNOWN = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"}
NEUTRAL = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
OUTER = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
INNER = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PADDED_TO = 64  # newer versions round the embedding's rows up to a multiple of this
BEGINNINGS = ("<|bos|>", "<|endoftext|>")
CHAT_TOKENS = ("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set state = namespace(turns=0, opening='') -%}
{%- for message in messages -%}
  {%- if loop.first and message['role'] == 'system' -%}
    {%- set state.opening = message['content'] + '\\n\\n' -%}
  {%- elif message['role'] != ['user', 'assistant'][state.turns % 2] -%}
    {{- raise_exception('after an optional system message, user and assistant take turns') -}}
  {%- else -%}
    {%- set state.turns = state.turns + 1 -%}
    {{- '<|' + message['role'] + '_start|>' + state.opening + message['content'] -}}
    {{- '<|' + message['role'] + '_end|>' -}}
    {%- set state.opening = '' -%}
  {%- endif -%}
{%- endfor -%}
{%- if state.opening -%}
  {{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of meta_NNNNNN.json that make the architecture."""

    context: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    width: int


def is_nanochat(folder: Path) -> bool:
    """Whether the folder looks like one that nanochat wrote."""
    return any(MODEL_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_nanochat(folder: Path, load: Load, tokenizer: Path | None) -> Checkpoint:
    """The last step's checkpoint. ModelError names what cannot be told in transformers' terms."""
    steps = {
        int(found[1]): path
        for path in folder.iterdir()
        if (found := MODEL_FILE.fullmatch(path.name))
    }
    step, path = max(steps.items())
    meta = path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json")
    shape = _shape(meta)
    tensors = {name.removeprefix(COMPILED): each for name, each in load(path).items()}
    _refuse_what_cannot_be_told(tensors, path)
    _check_tensors(tensors, shape, path)
    vocabulary = _vocabulary(folder, tokenizer)
    if vocabulary.size != shape.vocabulary:
        raise ModelError(
            f"{vocabulary.source} has {vocabulary.size:,} tokens and {meta} says "
            f"{shape.vocabulary:,}: it is another model's tokenizer"
        )
    special = vocabulary.special_ids()
    bos = next((text for text in BEGINNINGS if text in special), None)
    if bos is None:
        raise ModelError(f"{vocabulary.source} has no token {BEGINNINGS[0]}, which begins a text")
    chats = all(text in special for text in CHAT_TOKENS)
    ends = [special[bos], *([special["<|assistant_end|>"]] if chats else [])]
    notes = [f"step {step:,} was taken, the last of {len(steps)}"] if len(steps) > 1 else []
    if vocabulary.source.parent != folder:
        notes.append(f"the tokenizer was read from {vocabulary.source}")
    if not chats:
        notes.append("note: the tokenizer lacks nanochat's chat tokens: there is no chat template")
    if left_out := [name for name in NEUTRAL if name in tensors]:
        notes.append(f"{' and '.join(left_out)} change nothing here and were left out")
    dtype = widest(each for name, each in tensors.items() if name not in NEUTRAL)
    return Checkpoint(
        about=f"nanochat, {path.name}",
        config=_config(shape, special[bos], ends, dtype),
        generation_config={"bos_token_id": special[bos], "eos_token_id": ends},
        tensors=_renamed(tensors, shape),
        vocabulary=vocabulary,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": "<|assistant_end|>" if chats else bos,
            "model_max_length": shape.context,
            "clean_up_tokenization_spaces": False,
        },
        chat_template=CHAT_TEMPLATE if chats else None,
        notes=tuple(notes),
    )


def _shape(meta: Path) -> Shape:
    config = read_json(meta, "which says the model's shape").get("model_config")
    if not isinstance(config, dict):
        raise ModelError(f"{meta} has no model_config")
    if unknown := sorted(set(config) - KNOWN):
        raise ModelError(
            f"{meta}: model_config has {', '.join(unknown)[:200]}, which is not known here: this "
            "version of nanochat makes another architecture"
        )
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    shape = Shape(*(count(config, name, meta) for name in names))
    if shape.width % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise ModelError(
            f"{meta}: {shape.width} wide, {shape.heads} heads and {shape.kv_heads} for keys do not "
            "divide into each other"
        )
    pattern = config.get("window_pattern", "L")
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - {"S", "L"}:
        raise ModelError(f"{meta}: window_pattern must consist of S and L, and is {pattern!r}")
    if "S" in pattern.upper()[: shape.layers - 1]:  # the last layer always sees everything
        raise ModelError(
            f"{meta}: window_pattern {pattern[:40]!r} gives layers a sliding window, which "
            "transformers' NanoChat model does not have"
        )
    return shape


def _refuse_what_cannot_be_told(tensors: Tensors, path: Path) -> None:
    inner = re.compile(rf"transformer\.h\.\d+\.({'|'.join(map(re.escape, INNER))})\.weight")
    more = [
        name
        for name in tensors
        if name not in OUTER and name not in NEUTRAL and not inner.fullmatch(name)
    ]
    for name, nothing in NEUTRAL.items():
        if name in tensors and bool((tensors[name] != nothing).any()):
            more.append(name)
    if more:
        parts = sorted(
            {re.sub(r"^transformer\.h\.\d+\.|\.\d+|\.weight$", "", each) for each in more}
        )
        raise ModelError(
            f"{path} needs {', '.join(parts)[:300]}, which transformers' NanoChat model does not "
            "have; nanochat of 2025 makes models that can be converted"
        )


def _check_tensors(tensors: Tensors, shape: Shape, path: Path) -> None:
    if shape.layers > len(tensors):
        raise ModelError(f"{path} does not hold the {shape.layers:,} layers that n_layer says")
    rows = -(-shape.vocabulary // PADDED_TO) * PADDED_TO
    for name in OUTER:
        check_names(tensors, [name], path)
        there = tensors[name].shape[0] if tensors[name].ndim else 0
        wanted = rows if there == rows else shape.vocabulary
        check_shape(name, tensors[name], (wanted, shape.width), path)
    width, inside = shape.width, 4 * shape.width
    keys = shape.kv_heads * width // shape.heads
    shapes = dict(
        zip(
            INNER,
            [(width, width), (keys, width), (keys, width), (width, width), (inside, width),
             (width, inside)],
            strict=True,
        )
    )  # fmt: skip
    wanted_names = {
        f"transformer.h.{layer}.{name}.weight": of
        for layer in range(shape.layers)
        for name, of in shapes.items()
    }
    check_names(tensors, wanted_names, path)
    if beyond := sorted(set(tensors) - set(wanted_names) - set(OUTER) - set(NEUTRAL)):
        raise ModelError(f"{path} has {beyond[0]} beyond the {shape.layers} layers of n_layer")
    for name, of in wanted_names.items():
        check_shape(name, tensors[name], of, path)


def _renamed(tensors: Tensors, shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in OUTER.items():
        yield theirs, tensors[ours][: shape.vocabulary]  # rows beyond are padding
    for layer in range(shape.layers):
        for ours, theirs in INNER.items():
            name = f"model.layers.{layer}.{theirs}.weight"
            yield name, tensors[f"transformer.h.{layer}.{ours}.weight"]


def _config(shape: Shape, bos: int, ends: list[int], dtype: str) -> Json:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "final_logit_softcapping": 15.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": ends,
        "pad_token_id": None,
        "dtype": dtype,
    }


def _vocabulary(folder: Path, given: Path | None) -> Vocabulary:
    """From the file that is named; else from the folder, or from where nanochat keeps it."""
    places = [folder, folder / "tokenizer", folder.absolute().parent.parent / "tokenizer"]
    there = [place / name for place in places for name in ("tokenizer.json", "tokenizer.pkl")]
    path = given or next((each for each in there if each.is_file()), None)
    if path is None:
        raise ModelError(
            f"there is no tokenizer.pkl or tokenizer.json in {folder} or in nanochat's folder "
            "tokenizer: name it with --tokenizer FILE"
        )
    if path.suffix == ".json":
        return given_vocabulary(path)
    encoding = read_encoding(path)
    bos = next((text for text in BEGINNINGS if text in encoding.special), None)
    if bos is None:
        raise ModelError(f"{path} has no token {BEGINNINGS[0]}, which begins a text")
    return byte_level(encoding.ranks, encoding.special, encoding.pattern, bos, path)
