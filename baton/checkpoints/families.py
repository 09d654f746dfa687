"""Which architectures are served, and what the others are. The tables of the installed transformers are
read as text, because importing it takes seconds.

A family is a model_type of config.json; as in transformers it decides, and not the name of the class.
"""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import prod
from pathlib import Path

from baton.checkpoints.jsonfile import Json
from baton.errors import ModelError

# Families that transformers loads but that would be served wrongly or not at all. All others must pass
# the self-test when they are loaded (baton/engine/selftest.py).
TWO_WAY = "it is not a decoder-only language model"
ENCODER_DECODER = f"{TWO_WAY} but an encoder-decoder"
ENCODER = f"{TWO_WAY} but an encoder, which continues no text"
VISION = f"{TWO_WAY} but one that also takes images or sound"
ANOTHER = "use a causal language model of another family"
FAMILIES_BY_REASON = {
    "its attention cannot be pointed at a paged KV pool": """
        bloom codegen cpmant ctrl falcon gpt_neo gpt_neox_japanese gptj mpt openai-gpt reformer
        xglm xlm xlnet""",
    "it keeps a running state beside, or instead of, keys and values": """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe
        lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text
        qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2""",
    "its attention is of another kind": """
        axk2 blt deepseek_v32 diffllama glm_moe_dsa hrm_text llama4_text phimoe""",
    ENCODER: """
        bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
        roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""",
    ENCODER_DECODER: """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet
        t5 trocr whisper""",
    VISION: "fuyu git got_ocr2 llama4 mllama phi4_multimodal",
    f"{TWO_WAY} but one for sound": "moshi musicgen musicgen_melody",
}
REFUSED = {
    family: why for why, families in FAMILIES_BY_REASON.items() for family in families.split()
}
# transformers' other tables, by what their families are.
TABLES = (
    ("SEQ_TO_SEQ_CAUSAL_LM", ENCODER_DECODER),
    ("IMAGE_TEXT_TO_TEXT", VISION),
    ("MULTIMODAL_LM", VISION),
    ("MASKED_LM", ENCODER),
    ("TEXT_ENCODING", ENCODER),
)
SENSES = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "speech_config")
OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)[A-Z]\w+$")
TASKS = {
    "SequenceClassification": "a classifier or reward model",
    "TokenClassification": "a classifier of tokens",
    "QuestionAnswering": "a model that finds answers in a text",
    "MultipleChoice": "a model that chooses among answers",
    "MaskedLM": "an encoder",
}
INTEGER = re.compile(r"\d[\d_]*")


def architecture_of(name: str, config: Json) -> str:
    """The class that transformers would load. ModelError, in one line, if it is not served."""
    listed = config.get("architectures")
    named = [each for each in listed if isinstance(each, str)] if isinstance(listed, list) else []
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise ModelError(_without_family(name, config, named))
    causal = _table("CAUSAL_LM")
    known = causal.get(family, "")
    says = named[0] if named else known or f"a model of the family {family}"
    if why := _why_not(config, family, says):
        raise ModelError(f"{name} is {says}, which cannot be served: {why}; {ANOTHER}")
    if "auto_map" in config and not is_known(family):
        raise ModelError(
            f"{name} needs Python code from its own folder (auto_map in config.json): such code is "
            "never run here; use a model that transformers knows by itself"
        )
    if not is_known(family):
        raise ModelError(
            f"{name} is of the family {family[:80]!r} (model_type in config.json), which transformers "
            f"{installed()} does not know: update transformers if the model is newer, or use another"
        )
    if causal and not known:
        raise ModelError(
            f"{name} is not a causal language model: config.json names {says}, and transformers has "
            f"none for {family}, only other kinds of model"
        )
    if named and (task := OTHER_TASK.search(says)):
        kind = TASKS.get(task[0].removeprefix("For"), "made for another task")
        raise ModelError(
            f"{name} is not a causal language model: it is {says}, {kind}; use the model it was made from"
        )
    return says if named else known


def _why_not(config: Json, family: str, says: str) -> str | None:
    """Why a family, or this one model of it, cannot be served."""
    if family in REFUSED:
        return REFUSED[family]
    if config.get("is_encoder_decoder") is True:
        return ENCODER_DECODER
    causal = _table("CAUSAL_LM").get(family)
    if causal is not None and not causal.endswith("ForConditionalGeneration"):
        return VISION if any(config.get(each) for each in SENSES) else None
    return next((why for table, why in TABLES if family in _table(table)), None)


def _without_family(name: str, config: Json, named: list[str]) -> str:
    if part := config.get("_class_name"):
        return (
            f"{name} is {str(part)[:80]}, a part of a diffusion pipeline, which makes images: use a "
            "language model"
        )
    if "pretrained_cfg" in config:
        return f"{name} is {str(config.get('architecture'))[:80]} of timm, a model for images"
    families = [family for family, each in _table("CAUSAL_LM").items() if each in named[:1]]
    alike = [each for each in families if named[0].lower().startswith(re.sub(r"[-_]", "", each))]
    way_out = "it is not a model of transformers"
    if families:
        way_out = f'add "model_type": "{(alike or families)[0]}", the family of {named[0]}'
    return f"{name}: config.json has no model_type, which says the architecture: {way_out}"


def text_part(config: Json) -> Json:
    """The part of config.json that describes the language model: text_config, or all of it."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


# ---- what the installed transformers knows


def installed() -> str:
    """Its version."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "(not installed)"


def is_known(family: str) -> bool:
    """Whether it has this family; True if its tables cannot be read, then loading the model tells."""
    text = _source("auto/auto_mappings.py") + _source("auto/configuration_auto.py")
    return not text or f'"{family}"' in text


def default_of(family: str, *names: str) -> int | None:
    """The number that it takes where config.json lacks all of these names."""
    own = [path for path in _configurations(family) if f'model_type = "{family}"' in path]
    for text in own:
        begin = text.index(f'model_type = "{family}"')
        body = re.split(r"^(?:class|@)", text[begin:], maxsplit=1, flags=re.MULTILINE)[0]
        for name in names:
            found = re.search(rf"^    {name}\s*:\s*int\b[^=\n]*=\s*([^#\n]+)", body, re.MULTILINE)
            numbers = INTEGER.findall(found[1]) if found else []
            if numbers:
                return prod(int(each) for each in numbers)
    return None


def _configurations(family: str) -> list[str]:
    """The source of the modules that may describe a family's configuration."""
    stem = family.replace("-", "_")
    folders = dict.fromkeys((stem, stem.removesuffix("_text"), stem.removesuffix("_model")))
    return [_source(f"{each}/configuration_{each}.py") for each in folders]


@cache
def _table(name: str) -> dict[str, str]:
    """Family and class of one table of transformers' modeling_auto.py; empty if it is not there."""
    text = _source("auto/modeling_auto.py")
    begin = f"MODEL_FOR_{name}_MAPPING_NAMES = OrderedDict("
    if begin not in text:
        return {}
    body = text[text.index(begin) :].partition("\n)")[0]
    return dict(re.findall(r'\(\s*"([\w.-]+)",\s*"(\w+)",?\s*\)', body))


@cache
def _source(path: str) -> str:
    """A file of transformers/models; empty if there is none."""
    spec = find_spec("transformers")
    for place in (spec.submodule_search_locations if spec else None) or []:
        file = Path(place) / "models" / path
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""
