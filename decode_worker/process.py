"""The decode worker's process: creates engine, pool, exports and node, and connects them."""

from pathlib import Path

import torch

from baton.cluster.launch import WorkerOptions, first_epoch, introduce, private_folder, run_worker
from baton.engine.boot import boot
from baton.engine.pool import Beside, pool_blocks, spare_blocks
from baton.errors import InputError
from baton.grammar import Grammars
from baton.kv.transports import TRANSPORTS, check_installed, selects
from baton.model_files import ModelFiles, resolve_model
from baton.parallel.start import boot_worker, with_threads
from baton.transfer.registry import CurveKeys
from baton.transfer.slabs import allocate_slabs
from baton.wire.keys import ClusterKeys
from baton.wire.paces import Paces
from decode_worker.decoding import Decoding
from decode_worker.draft import DraftModel, check_draft
from decode_worker.speculation import PromptLookup, Proposer, Speculation
from decode_worker.worker import DecodeWorker

NGRAM = "ngram"
"""The speculative model that is none: drafts are looked up in the text so far."""


def run(
    options: WorkerOptions,
    *,
    kv_transport: str,
    max_num_seqs: int,
    kv_cache_memory_bytes: int | None,
    run_dir: Path | None,
    kv_host: str | None,
    beside: tuple[int, int],
    prefix_caching: bool,
    speculative_model: str | None,
    num_speculative_tokens: int,
) -> int:
    """Load, join, decode until stopped. Returns the exit code. What needs no weights is checked before
    they are read, which may take minutes: transports, tokenizer, draft model."""
    check_installed(kv_transport)
    options = with_threads(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = private_folder(run_dir or _folder_of(options.router))
    kinds = _kinds(kv_transport, folder, kv_host)
    files = resolve_model(options.model).with_lora(options.lora, options.allow_lora_updates)
    grammars = Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
    draft = _draft_files(speculative_model, files)
    engine = boot_worker(files, options)
    kinds = _kinds(engine.pools.transports(kv_transport), folder, kv_host)
    context = files.context(options.max_model_len)
    proposer = _proposer(speculative_model, draft, options, max_num_seqs * context)
    speculation = Speculation(proposer, num_speculative_tokens, engine.draft_rows)
    share = Beside(*beside) if any(beside) else None
    blocks = engine.pools.blocks(kv_cache_memory_bytes, max_num_seqs * context, share)
    shared = options.tensor_parallel_size > 1 or any(
        each.writes_by_itself for each in TRANSPORTS if selects(kv_transport, each.name)
    )
    slabs = allocate_slabs(engine.layout, blocks, engine.pools.memory, shared=shared, folder=folder)
    keys = _curve_keys(options.keys)
    decoding = Decoding(engine, slabs, kinds=kinds, run_dir=folder, bind_host=kv_host, keys=keys)
    decoding.prepare(max_num_seqs, context)
    hello = introduce(
        options,
        "decode",
        fingerprint=files.fingerprint,
        adapters=files.adapters,
        device=str(engine.device),
        dtype=engine.dtype,
        layout=engine.layout,
        token_s=engine.token_s,
        how=engine.runner.backend,
        blocks=blocks - spare_blocks(engine.device),
        regions=decoding.renew_epoch(first_epoch(options)),
    )
    paces = Paces(engine.pace, torch.get_num_threads() if hello.takes_cores else 0)
    try:
        node = DecodeWorker(
            *(hello, decoding, options.max_num_batched_tokens, speculation, prefix_caching),
            *(grammars, files.vocab_size, paces, files.rope),
        )
        node.load_from(engine.shelf)
        return run_worker(options, node, decoding.wakeups, patience_s=hello.patience_s)
    finally:
        decoding.close()


def _curve_keys(keys: ClusterKeys | None) -> CurveKeys | None:
    return CurveKeys(keys.member_public, keys.member_secret) if keys else None


def _draft_files(name: str | None, target: ModelFiles) -> ModelFiles | None:
    """The files of the draft model, if there is one. Raises ModelError, InputError."""
    if name is None or name == NGRAM:
        return None
    files = resolve_model(name)
    check_draft(files, target)
    return files


def _proposer(
    name: str | None, draft: ModelFiles | None, options: WorkerOptions, tokens: int
) -> Proposer | None:
    """What drafts tokens, if anything does."""
    if draft is not None:
        return _draft_model(draft, options, tokens)
    return PromptLookup() if name == NGRAM else None


def _draft_model(files: ModelFiles, options: WorkerOptions, tokens: int) -> DraftModel:
    """It gets a KV pool of its own for so many `tokens`."""
    engine = boot(files, device=options.device, dtype=options.dtype, block_size=options.block_size)
    blocks = pool_blocks(engine.layout, engine.device, None, tokens)
    draft = DraftModel(
        engine, blocks, context=files.max_positions, chunk=options.max_num_batched_tokens
    )
    draft.prepare(engine.draft_rows or 1)
    return draft


def _kinds(kv_transport: str, folder: Path | None, kv_host: str | None) -> str | list[str]:
    """The transports to offer. Frames need a folder for writers on this host, an address for others."""
    if kv_transport == "auto":
        return "auto"
    given = {"": True, "run_dir": folder, "bind_host": kv_host}
    chosen = [each for each in TRANSPORTS if each.choice == kv_transport]
    kinds = [each.name for each in chosen if given[each.needs] is not None]
    if not kinds:
        here = any(each.needs == "run_dir" for each in chosen)
        instead = "or --run-dir DIR" if here else "to decode workers (it is for several hosts)"
        raise InputError(
            f"--kv-transport {kv_transport} needs a socket: give --kv-host ADDRESS {instead}"
        )
    return kinds


def _folder_of(router: str) -> Path | None:
    """The folder of an ipc router is private and on this host, so our sockets can use it too."""
    return Path(router.removeprefix("ipc://")).parent if router.startswith("ipc://") else None
