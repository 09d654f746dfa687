"""Pre-tokenizers: how a byte-level tokenizer splits text into words before it merges bytes.

A GGUF file has only a name for it, `tokenizer.ggml.pre`; what the name means is in llama.cpp's code. The
patterns here are those of the models' own tokenizer.json. A name that is not here is refused: with
another split the tokens would be wrong.
"""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+SHORT|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*SHORT"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = WORDS.replace("SHORT", "").replace("DIGITS", r"\p{N}")
GPT_4O = WORDS.replace("SHORT", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", r"\p{N}{1,3}")
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Each pattern splits what the ones before it left whole. Then, with `gpt2`, GPT-2's own does."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    whole_words: bool = False  # a word that is a token is not put together from merges
    begins: bool = (
        False  # texts begin with the beginning-of-text token, unless the file says otherwise
    )

    def json(self) -> Json:
        """The section `pre_tokenizer` of tokenizer.json."""
        steps: list[Json] = [
            {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in self.patterns
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        return {"type": "Sequence", "pretokenizers": [*steps, level | {"use_regex": self.gpt2}]}


GPT2 = PreTokenizer(gpt2=True)
DIGITS = PreTokenizer((r"\p{N}",), gpt2=True)
LLAMA = PreTokenizer((LLAMA3,), whole_words=True, begins=True)
PLAIN_LLAMA, QWEN = PreTokenizer((LLAMA3,)), PreTokenizer((QWEN2,))
KINDS = {
    "": GPT2,  # none given: as transformers reads it
    "default": GPT2,
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling", "gigachat",
         "a.x-4.0", "mellum"), GPT2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), LLAMA
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PLAIN_LLAMA),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open",
         "grok-2"), QWEN,
    ),
    "tekken": PreTokenizer((TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie"), PreTokenizer((GPT_4O,))),
    "seed-coder": PreTokenizer((SEED_CODER,)),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "deepseek-v3": PreTokenizer(DEEPSEEK_V3),
}  # fmt: skip
