"""nanochat's checkpoints: model_NNNNNN.pt with meta_NNNNNN.json, and tokenizer.pkl.

nanochat's architecture grew in January 2026: value embeddings, scaled residuals, sliding windows and
more. transformers' NanoChat model is the earlier one. A checkpoint that needs a new part is an error,
which names the part. Parts whose values have no effect are left out.

Three numbers are in nanochat's code and in none of its files: the rope's base 10,000, the logits' cap
15, and the epsilon of norms, float32's own. All checkpoints that are accepted were made with them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from baton.checkpoints.tokenizer_json import Vocabulary
from baton.errors import ModelError
from baton.models.formats.bytelevel import byte_level
from baton.models.formats.checkpoint import (
    Checkpoint,
    Load,
    Shape,
    Tensors,
    check_shape,
    count,
    given_vocabulary,
    read_json,
    transformers_names,
    widest,
)
from baton.models.formats.encoding_file import read_encoding

MODEL_FILE = re.compile(r"model_(\d{6,})\.pt")
COMPILED = "_orig_mod."  # torch.compile's prefix of each name
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


def is_nanochat(folder: Path) -> bool:
    """Whether the folder looks like one that nanochat wrote."""
    return any(MODEL_FILE.fullmatch(path.name) for path in folder.iterdir())


def read_nanochat(folder: Path, load: Load, tokenizer: Path | None) -> Checkpoint:
    """The last step's checkpoint. Raises ModelError naming what transformers cannot represent."""
    steps = {
        int(found[1]): path
        for path in folder.iterdir()
        if (found := MODEL_FILE.fullmatch(path.name))
    }
    step, path = max(steps.items())
    meta = path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json")
    shape, rows, context = _sizes(meta)
    tensors = {name.removeprefix(COMPILED): each for name, each in load(path).items()}
    _check_parts(tensors, path)
    names = transformers_names(
        tensors, path, once=OUTER, layer="transformer.h", in_layer=INNER, layers=shape.layers
    )
    _check_tensors(tensors, names, shape, rows, path)
    vocabulary = _vocabulary(folder, tokenizer)
    if vocabulary.size != rows:
        raise ModelError(
            f"{vocabulary.source} has {vocabulary.size:,} tokens and {meta} says {rows:,}: it is "
            "another model's tokenizer"
        )
    special = vocabulary.special_ids()
    bos = next((text for text in BEGINNINGS if text in special), None)
    if bos is None:
        raise ModelError(
            f"{vocabulary.source} has no token {BEGINNINGS[0]}, which begins every text"
        )
    chats = all(text in special for text in CHAT_TOKENS)
    notes = [f"step {step:,} was taken, the last of {len(steps)}"] if len(steps) > 1 else []
    if vocabulary.source.parent != folder:
        notes.append(f"the tokenizer was read from {vocabulary.source}")
    if not chats:
        notes.append("note: the tokenizer lacks nanochat's chat tokens: there is no chat template")
    if left_out := [name for name in NEUTRAL if name in tensors]:
        notes.append(f"{' and '.join(left_out)} have no effect here and were left out")
    return Checkpoint(
        about=f"nanochat, {path.name}",
        config=shape.config(rows)
        | {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "max_position_embeddings": context,
            "hidden_act": "relu2",
            "rms_norm_eps": torch.finfo(torch.float32).eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "final_logit_softcapping": 15.0,
            "tie_word_embeddings": False,
            "dtype": widest(tensors[name] for name in names),
        },
        tensors=(  # rows of the embedding beyond the vocabulary are padding
            (theirs, tensors[ours][:rows] if ours in OUTER else tensors[ours])
            for ours, theirs in names.items()
        ),
        vocabulary=vocabulary,
        bos=bos,
        eos=CHAT_TOKENS[-1] if chats else bos,
        ends=(bos, CHAT_TOKENS[-1]) if chats else (bos,),
        chat_template=CHAT_TEMPLATE if chats else None,
        notes=tuple(notes),
    )


def _sizes(meta: Path) -> tuple[Shape, int, int]:
    """The shape, the vocabulary's size and the context length."""
    config = read_json(meta, "which says the model's shape").get("model_config")
    if not isinstance(config, dict):
        raise ModelError(f"{meta} has no model_config")
    if unknown := sorted(set(config) - KNOWN):
        raise ModelError(
            f"{meta}: model_config has {', '.join(unknown)[:200]}, which is not known here: this "
            "version of nanochat makes another architecture"
        )
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    context, rows, layers, heads, kv_heads, width = (count(config, name, meta) for name in names)
    shape = Shape(width, layers, heads, kv_heads, inside=4 * width)
    shape.check(meta)
    pattern = config.get("window_pattern", "L")
    if not isinstance(pattern, str) or not pattern or set(pattern.upper()) - {"S", "L"}:
        raise ModelError(f"{meta}: window_pattern must consist of S and L, got {pattern!r}")
    if "S" in pattern.upper()[: layers - 1]:  # the last layer always attends to everything
        raise ModelError(
            f"{meta}: window_pattern {pattern[:40]!r} gives layers a sliding window, which "
            "transformers' NanoChat model does not have"
        )
    return shape, rows, context


def _check_parts(tensors: Tensors, path: Path) -> None:
    """Raises ModelError for tensors that transformers' architecture does not have."""
    inner = re.compile(rf"transformer\.h\.\d+\.({'|'.join(map(re.escape, INNER))})\.weight")
    more = [
        name
        for name in tensors
        if name not in OUTER and name not in NEUTRAL and not inner.fullmatch(name)
    ]
    for name, neutral in NEUTRAL.items():
        if name in tensors and bool((tensors[name] != neutral).any()):
            more.append(name)
    if more:
        parts = sorted(
            {re.sub(r"^transformer\.h\.\d+\.|\.\d+|\.weight$", "", each) for each in more}
        )
        raise ModelError(
            f"{path} needs {', '.join(parts)[:300]}, which transformers' NanoChat model does not "
            "have; nanochat of 2025 makes models that can be converted"
        )


def _check_tensors(
    tensors: Tensors, names: Mapping[str, str], shape: Shape, rows: int, path: Path
) -> None:
    if beyond := sorted(set(tensors) - set(names) - set(NEUTRAL)):
        raise ModelError(f"{path} has {beyond[0]} beyond the {shape.layers} layers of n_layer")
    padded = -(-rows // PADDED_TO) * PADDED_TO
    for name, theirs in names.items():
        tensor = tensors[name]
        padding = name in OUTER and tensor.shape[:1] == (padded,)
        check_shape(name, tensor, shape.of(theirs, padded if padding else rows), path)


def _vocabulary(folder: Path, given: Path | None) -> Vocabulary:
    """From `given`, the folder, or the folder where nanochat keeps it."""
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
