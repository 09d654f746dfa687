"""The engine worker's process: upstream and node put together. No torch, no weights."""

import logging
import os
import threading
from pathlib import Path

from baton.cluster.launch import WorkerOptions, first_epoch, run_worker
from baton.errors import InputError
from baton.host import host_id, process_age_s
from baton.log import NOTICE
from baton.model_files import resolve_model
from baton.text import Tokenizer
from baton.wire.messages import PROTOCOL, Hello
from decode_worker.upstream.dialects import DIALECTS
from decode_worker.upstream.http import Address, HttpUpstream
from decode_worker.upstream.node import EngineWorker
from decode_worker.upstream.options import EngineOptions
from decode_worker.upstream.survey import SAMPLE, Expected, Survey, Unfit, Unready
from decode_worker.upstream.texts import Texts

PATIENCE_S = 10.0
"""The node never computes: its steps take microseconds."""
AFFINITY_BLOCK = 16
"""Tokens by which the router tells prompts with an equal beginning: these go to one upstream."""
AGAIN_S = 1.0

logger = logging.getLogger(__name__)


def run(options: WorkerOptions, engine: EngineOptions) -> int:
    """Look at the upstream, join, pass requests on until stopped. Returns the exit code."""
    address, key = Address.parse(engine.upstream), _key(engine.key_file)
    files = resolve_model(options.model)
    tokenizer = Tokenizer(files.tokenizer_file)
    ids = tuple(tokenizer.encode(SAMPLE, special=False))
    expected = Expected(
        engine.kind,
        engine.model,
        files.context(options.max_model_len),
        files.vocab_size,
        ids,
        len(Texts(tokenizer).first),
    )
    http = HttpUpstream(address, expected, key=key, silence_s=engine.timeout_s)
    try:
        found = _await(http, address.url)
        texts = _texts(found, tokenizer, address.url)
        slots = min(engine.max_num_seqs, found.slots or engine.max_num_seqs)
        hello = _introduce(options, address.url, found, files.fingerprint, slots)
        node = EngineWorker(hello, http, address.url, found, files.vocab_size, texts)
        return run_worker(options, node, http.wakeups)
    finally:
        http.shut()


def _await(http: HttpUpstream, url: str) -> Survey:
    """Until the upstream serves. Raises Unfit."""
    said = ""
    while True:
        try:
            return http.survey()
        except Unfit as error:
            raise InputError(f"{url}: {error}") from error
        except Unready as error:
            if str(error) != said:
                said = str(error)
                NOTICE.warning("waiting for the upstream %s: %s", url, said)
        threading.Event().wait(AGAIN_S)


def _texts(found: Survey, tokenizer: Tokenizer, url: str) -> Texts | None:
    """For a server of text. Raises InputError if --model's tokens cannot say every text."""
    if not DIALECTS[found.dialect].text:
        return None
    texts = Texts(tokenizer, found.adds)
    if not texts.lossless(SAMPLE):
        raise InputError(
            f"{url} returns text without token ids, and the tokenizer of --model loses a part of a text "
            "(case, spaces): its answers cannot be passed on"
        )
    NOTICE.warning(
        "%s returns text without token ids: its answers are tokenized here, and an answer that is "
        "resumed is generated again from its prompt (docs/engines.md)",
        url,
    )
    return texts


def _introduce(
    options: WorkerOptions, url: str, found: Survey, fingerprint: str, slots: int
) -> Hello:
    title = DIALECTS[found.dialect].title
    return Hello(
        role="engine",
        worker=options.name,
        epoch=first_epoch(options),
        protocol=PROTOCOL,
        host=host_id(),
        pid=os.getpid(),
        device=url,
        model=fingerprint,
        dtype="upstream",
        layout=f"engine/{found.dialect}",
        block_size=AFFINITY_BLOCK,
        block_bytes=1,
        blocks=slots,
        regions=(),
        patience_s=PATIENCE_S,
        load_s=max(0.0, process_age_s() - options.idle),
        how=f"{title}, model {found.model[:200]}",
    )


def _key(file: Path | None) -> str:
    """The first line of the file."""
    if file is None:
        return ""
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--upstream-key-file {file} cannot be read: {error}") from error
    if len(lines) != 1 or not (lines[0].isascii() and lines[0].isprintable()):
        raise InputError(f"--upstream-key-file {file} must hold one key, and nothing else")
    return lines[0]
