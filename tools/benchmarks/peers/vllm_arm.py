"""vLLM's CPU build as an arm of `bench engine` (see lines.py for the protocol)."""

import os

from lines import serve

KV_GB = "2"


class VLLM:
    def load(self, folder, dtype, threads):
        if dtype == "int8":
            raise ValueError("vLLM takes int8 from a quantised checkpoint only, and there is none")
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": KV_GB,
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in this process: it ends with us
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self.params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=folder,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=64,
            max_num_batched_tokens=64 * 64,
            enable_prefix_caching=False,
            seed=0,
        )

    def generate(self, prompts, new):
        params = self.params(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self.llm.generate(asked, params, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    def prefill(self, prompt):
        self.generate([prompt], 1)


if __name__ == "__main__":
    serve(VLLM())
