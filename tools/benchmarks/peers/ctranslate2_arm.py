"""CTranslate2 as an arm of `bench engine` (see lines.py for the protocol).

Its own converter wants torch, transformers and a tokenizer with as many tokens as the embedding has
rows; the random checkpoints have none. So the model file is put together here, by CTranslate2's own
specification classes, from the checkpoint's arrays; token number 7 is called "t7".
"""

import json
from pathlib import Path

from lines import serve


class CTranslate2:
    def load(self, folder, dtype, threads):
        import ctranslate2

        can = sorted(ctranslate2.get_supported_compute_types("cpu"))
        if dtype not in can:
            raise ValueError(f"CTranslate2 has no {dtype} on this CPU, only {', '.join(can)}")
        converted = Path(folder) / "ctranslate2"
        if not converted.exists():
            convert(Path(folder), converted)
        self.generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts, new):
        results = self.generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            beam_size=1,
            max_length=new,
            min_length=new,  # EOS is not taken before that
            include_prompt_in_result=False,  # the prompt in one forward, not token by token
        )
        return [result.sequences_ids[0] for result in results]

    def prefill(self, prompt):
        self.generate([prompt], 1)


def convert(folder, to):
    """A checkpoint folder to CTranslate2's own format, once."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    spec = {"gpt2": gpt2, "qwen2": qwen2}[config["model_type"]](config, weights)
    spec.decoder.scale_embeddings = False
    spec.register_vocabulary([f"t{number}" for number in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = f"t{config['eos_token_id']}"
    spec.config.unk_token = "t0"
    spec.validate()
    spec.optimize(quantization="float32")
    half = to.with_suffix(".part")
    half.mkdir(exist_ok=True)
    spec.save(str(half))
    half.rename(to)


def put(spec, weights, name, transposed=False):
    """A linear or a norm, with its bias where it has one."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if hasattr(spec, "gamma"):
        spec.gamma = weight
        if bias is not None:
            spec.beta = bias
        return
    spec.weight = weight.T.copy() if transposed else weight
    if bias is not None:
        spec.bias = bias


def gpt2(config, weights):
    from ctranslate2.specs import TransformerDecoderModelSpec
    from ctranslate2.specs.common_spec import Activation

    spec = TransformerDecoderModelSpec.from_config(
        config["n_layer"], config["n_head"], activation=Activation.GELUTanh
    )
    whole = spec.decoder
    whole.embeddings.weight = whole.projection.weight = weights["transformer.wte.weight"]
    whole.position_encodings.encodings = weights["transformer.wpe.weight"]
    put(whole.layer_norm, weights, "transformer.ln_f")
    for number, layer in enumerate(whole.layer):
        at = f"transformer.h.{number}"
        put(layer.self_attention.layer_norm, weights, f"{at}.ln_1")
        put(layer.self_attention.linear[0], weights, f"{at}.attn.c_attn", transposed=True)
        put(layer.self_attention.linear[1], weights, f"{at}.attn.c_proj", transposed=True)
        put(layer.ffn.layer_norm, weights, f"{at}.ln_2")
        put(layer.ffn.linear_0, weights, f"{at}.mlp.c_fc", transposed=True)
        put(layer.ffn.linear_1, weights, f"{at}.mlp.c_proj", transposed=True)
    return spec


def qwen2(config, weights):
    import numpy
    from ctranslate2.specs import TransformerDecoderModelSpec
    from ctranslate2.specs.common_spec import Activation

    spec = TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        config["num_attention_heads"],
        activation=Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,  # all of a head
        rotary_interleave=False,
        rotary_base=config["rope_parameters"]["rope_theta"],
        num_heads_kv=config["num_key_value_heads"],
    )
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    whole = spec.decoder
    whole.embeddings.weight = whole.projection.weight = weights["model.embed_tokens.weight"]
    put(whole.layer_norm, weights, "model.norm")
    for number, layer in enumerate(whole.layer):
        at = f"model.layers.{number}"
        put(layer.self_attention.layer_norm, weights, f"{at}.input_layernorm")
        for part in ("weight", "bias"):
            three = [weights[f"{at}.self_attn.{each}_proj.{part}"] for each in "qkv"]
            setattr(layer.self_attention.linear[0], part, numpy.concatenate(three))
        put(layer.self_attention.linear[1], weights, f"{at}.self_attn.o_proj")
        put(layer.ffn.layer_norm, weights, f"{at}.post_attention_layernorm")
        put(layer.ffn.linear_0, weights, f"{at}.mlp.gate_proj")
        put(layer.ffn.linear_0_noact, weights, f"{at}.mlp.up_proj")
        put(layer.ffn.linear_1, weights, f"{at}.mlp.down_proj")
    return spec


if __name__ == "__main__":
    serve(CTranslate2())
