"""What a GGUF file holds that is no language model read here, by llama.cpp's name of its kind."""

STATE = "which keeps a running state"
KINDS = {
    "a model's part for images or sound, which serves no text alone": "clip mmproj",
    "an encoder, which continues no text": """
        bert modern-bert neo-bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 eurobert
        gemma-embedding t5encoder llama-embed""",
    "an encoder-decoder": "t5",
    "a model for speech": "whisper wavtokenizer-dec parler-tts",
    "a model that makes images": "flux sd1 sd2 sd3 sdxl aura cosmos hidream ltxv wan qwen_image lumina2",
    f"a language model {STATE}": """
        mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 granitehybrid lfm2 lfm2moe nemotron_h
        nemotron_h_moe plamo2 plamo3 qwen3next kimi-linear""",
    "a LoRA adapter, to be merged into its base model": "adapter",
    "an importance matrix for quantization": "imatrix",
}
WHAT = {name: what for what, names in KINDS.items() for name in names.split()}


def what_it_is(name: str) -> str:
    """ ", " and what a file is whose architecture or type has this name; "" if that is unknown."""
    return f", {WHAT[name]}" if name in WHAT else ""
