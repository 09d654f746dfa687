"""The prefill worker's process: engine, links and node put together."""

import torch

from baton.cluster.launch import WorkerOptions, introduce, run_worker
from baton.kv.transports import check_installed
from baton.model_files import resolve_model
from baton.parallel.start import boot_worker, with_threads
from baton.transfer.registry import CurveKeys
from baton.wire.paces import Paces
from prefill_worker.filling import Filling
from prefill_worker.worker import PrefillWorker


def run(
    options: WorkerOptions,
    *,
    kv_transport: str,
    prefix_caching: bool,
    prefill_cache_memory_bytes: int | None,
) -> int:
    """Load, join, fill until stopped. Returns the exit code."""
    check_installed(kv_transport)
    options = with_threads(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    files = resolve_model(options.model).with_lora(options.lora, options.allow_lora_updates)
    engine = boot_worker(files, options, decodes=False)
    context = files.context(options.max_model_len)
    keys = options.keys
    filling = Filling(
        engine,
        writer=options.name,
        transport=engine.pools.transports(kv_transport),
        scratch_tokens=max(context, 2 * options.max_num_batched_tokens),
        keys=CurveKeys(keys.member_public, keys.member_secret) if keys else None,
        cache_bytes=prefill_cache_memory_bytes if prefix_caching else 0,
    )
    hello = introduce(
        options,
        "prefill",
        fingerprint=files.fingerprint,
        adapters=files.adapters,
        device=str(engine.device),
        dtype=engine.dtype,
        layout=engine.layout,
        token_s=engine.token_s,
        how=engine.runner.backend,
    )
    node = PrefillWorker(
        hello,
        filling,
        token_budget=options.max_num_batched_tokens,
        vocabulary=files.vocab_size,
        paces=Paces(engine.pace, torch.get_num_threads() if hello.takes_cores else 0),
    )
    node.load_from(engine.shelf)
    try:
        return run_worker(options, node, patience_s=hello.patience_s)
    finally:
        filling.close()
