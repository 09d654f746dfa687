"""OpenVINO GenAI's continuous batching as an arm of `bench engine` (see lines.py for the protocol)."""

import subprocess
import sys
from pathlib import Path

from lines import serve

FORMATS = {"float32": "fp32", "bfloat16": "fp32", "int8": "int8"}
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}


class OpenVINO:
    def load(self, folder, dtype, threads):
        import openvino
        import openvino_genai

        exported = Path(folder) / f"openvino-{FORMATS[dtype]}"
        if not (exported / "openvino_model.xml").exists():
            export(folder, exported, FORMATS[dtype])
        self.tensor, self.genai = openvino.Tensor, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 64 * 64
        scheduler.enable_prefix_caching = False
        self.pipe = openvino_genai.ContinuousBatchingPipeline(
            str(exported),
            scheduler,
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": PRECISIONS[dtype]},
        )

    def generate(self, prompts, new):
        import numpy

        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        ids = [self.tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        results = self.pipe.generate(ids, [config] * len(ids))
        return [list(result.m_generation_ids[0]) for result in results]

    def prefill(self, prompt):
        self.generate([prompt], 1)


def export(folder, to, weights):
    """A checkpoint folder to OpenVINO's own format, by its own tool, once."""
    tool = Path(sys.executable).parent / "optimum-cli"
    command = [str(tool), "export", "openvino", "-m", str(folder), "--weight-format", weights]
    command += ["--task", "text-generation-with-past", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    serve(OpenVINO())
