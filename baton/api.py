"""generate(): one prompt, one call, one string. `from baton import generate`.

    >>> generate("demo", "In the future, artificial intelligence will", 40)

Every call starts a cluster (router, prefill worker, decode worker; with `colocated` no prefill worker)
and stops it again, so it takes seconds and loads the model each time. For many prompts use
`python main.py`; for many calls keep a cluster running and use baton.client.blocking.Client.
"""

import secrets
from collections.abc import Sequence

from baton.client.batch import BatchClient, Completion, Failure, Task
from baton.client.blocking import Client
from baton.clock import monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError, InputError, RequestError
from baton.model_files import resolve_model
from baton.params import NOT_STREAMED_S, GenerationParams
from baton.topology import count_gpus, plan_topology
from sampler.params import SamplingParams

INPUT_ERRORS = frozenset({"invalid_request", "context_length_exceeded"})


def generate(
    model_name: str,
    prompt: str,
    max_new_tokens: int,
    device: str = "auto",
    *,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    dtype: str = "auto",
    colocated: bool = False,
    download: bool = False,
) -> str:
    """The continuation of `prompt`, without the prompt, at most `max_new_tokens` long.

    `model_name` is a name of configs/model_paths.yaml, a folder, or a Hugging Face id. `device` is
    where both workers run: auto, cpu, mps, cuda:0, ... `sampling` None is the model's own default
    with seed 0. Raises InputError for invalid arguments, ModelError for the model, and the other
    errors of baton.errors for failures. The processes do not import the calling script, so it needs
    no `if __name__ == "__main__":`.
    """
    if not prompt:
        raise InputError("the prompt is empty; it needs at least one character")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    files = resolve_model(model_name, download=download)
    named = () if device == "auto" else (device,)
    topology = plan_topology(
        () if colocated else named, named, colocated=colocated, gpus=count_gpus()
    )
    options = ClusterOptions(
        model=model_name,
        topology=topology,
        batch_size=1,
        batch_window_ms=0.0,
        dtype=dtype,
    )
    default = SamplingParams.from_generation_config(files.generation_config)
    params = GenerationParams(
        max_new_tokens,
        sampling or default,
        tuple(stop),
        ignore_eos=ignore_eos,
        stream_interval_s=NOT_STREAMED_S,
    )
    with Cluster(options) as cluster:
        client = Client(cluster.address)
        try:
            job = secrets.token_hex(6)
            batch = BatchClient(client, cluster, job=job, limit=1, clock=monotonic)
            return _text(batch, prompt, params)
        finally:
            client.close()


def _text(batch: BatchClient, prompt: str, params: GenerationParams) -> str:
    for _ in batch.await_ready():
        pass
    for event in batch.run([Task(0, prompt)], params):
        if isinstance(event, Completion):
            return event.text
        if isinstance(event, Failure):
            if event.code in INPUT_ERRORS:
                raise RequestError(event.message, code=event.code)
            raise BatonError(f"the request failed ({event.code}): {event.message}")
    raise AssertionError("a task ends with a Completion or a Failure")
