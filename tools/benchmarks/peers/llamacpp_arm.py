"""llama.cpp as an arm of `bench engine` (see lines.py for the protocol), through its C functions: the
prompts are the sequences of one llama_batch, and every step is one llama_decode for all of them."""

import json
from pathlib import Path

from lines import serve

WEIGHTS = {
    "float32": "F32",
    "bfloat16": "BF16",
    "int8": "Q8_0",
}  # q8_0: weight and activation blocks


class LlamaCpp:
    def load(self, folder, dtype, threads):
        import llama_cpp

        self.lib, self.threads, self.context = llama_cpp, threads, None
        file = Path(folder) / f"llamacpp-{WEIGHTS[dtype]}.gguf"
        if not file.exists():
            convert(Path(folder), file, WEIGHTS[dtype])
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.cache = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        self.shape = (0, 0)

    def room(self, sequences, length):
        """An empty context of exactly this many sequences: it keeps the same room for each."""
        length = -(-length // 256) * 256  # it would round up itself
        if self.shape != (sequences, length):
            if self.context:
                self.lib.llama_free(self.context)
            params = self.lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = sequences * length, sequences
            params.n_batch = params.n_ctx
            params.n_threads = params.n_threads_batch = self.threads
            params.type_k = params.type_v = self.cache
            self.context = self.lib.llama_init_from_model(self.model, params)
            if not self.context:
                raise RuntimeError(f"llama.cpp gives no context of {params.n_ctx} tokens")
            self.shape = (sequences, length)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def step(self, tokens, at):
        """Every sequence's next tokens, which begin at `at`, in one call; the greedy token of each."""
        import numpy

        batch = self.lib.llama_batch_init(sum(map(len, tokens)), 0, 1)
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                n = batch.n_tokens
                batch.token[n], batch.pos[n] = token, at + offset
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = offset == len(ids) - 1
                batch.n_tokens += 1
        code = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode answers {code}")
        rows = self.lib.llama_get_logits(self.context)
        return numpy.ctypeslib.as_array(rows, (len(tokens), self.words)).argmax(axis=1).tolist()

    def generate(self, prompts, new):
        self.room(len(prompts), len(prompts[0]) + new)
        answers = [[token] for token in self.step(prompts, 0)]
        for at in range(len(prompts[0]), len(prompts[0]) + new - 1):
            last = [answer[-1:] for answer in answers]
            for answer, token in zip(answers, self.step(last, at), strict=True):
                answer.append(token)
        return answers

    def prefill(self, prompt):
        self.generate([prompt], 1)


def convert(folder, to, kind):
    """A checkpoint folder to one GGUF file, once: the names are gguf's own table, and there is no
    tokenizer in it."""
    import gguf
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    gpt2 = arch == "gpt2"
    layers = config["n_layer"] if gpt2 else config["num_hidden_layers"]
    writer = gguf.GGUFWriter(to.with_suffix(".part"), arch)
    writer.add_block_count(layers)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    if gpt2:
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    conv1d = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2 keeps these transposed
    for name, array in load_file(folder / "model.safetensors").items():
        plain = array.T.copy() if gpt2 and name.endswith(conv1d) else array
        exact = plain.ndim == 1 or name.endswith("wpe.weight")  # llama.cpp wants these in float32
        to_kind = gguf.GGMLQuantizationType["F32" if exact else kind]
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(there, quantize(plain, to_kind), raw_dtype=to_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    to.with_suffix(".part").rename(to)


if __name__ == "__main__":
    serve(LlamaCpp())
