"""`python main.py run-batch IN OUT`: answer a file of requests in OpenAI's batch format.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": ..., ...}}
    -> {"id": "...", "custom_id": "a", "error": null,
        "response": {"status_code": 200, "request_id": "...", "body": {...}}}

The requests go through an HTTP server started for them, and an answer is that server's response, errors
included. Journaled and resumed like the offline job. Format: https://platform.openai.com/docs/guides/batch
"""

import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from baton.adapters.files import resolve_adapters
from baton.client.batch import Completion
from baton.client.http import HttpClient, error_message
from baton.cluster.options import ClusterOptions
from baton.cluster.serving import serving_cluster
from baton.errors import BatonError, InputError
from baton.offline.interrupts import Interrupted
from baton.offline.journal import Journal, fingerprint
from baton.offline.outputs import checked_target, write_whole
from baton.offline.progress import Progress

URLS = ("/v1/completions", "/v1/chat/completions")
TRIES = 5
RETRY_S = 1.0  # before the second try; doubled for each further one
LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the input."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


def read_items(file: Path) -> list[Item]:
    """Raises InputError naming the invalid line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    items = [_item(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"{file} holds no requests: write one JSON object per line")
    seen: set[str] = set()
    for item in items:
        if item.custom_id in seen:
            raise InputError(f"{file}: custom_id {item.custom_id!r} occurs twice: make each unique")
        seen.add(item.custom_id)
    return items


def _item(file: Path, number: int, line: str) -> Item:
    where = f"{file}, line {number}"
    try:
        found = json.loads(line) if len(line) <= LINE_BYTES else None
    except ValueError as error:
        raise InputError(f"{where}: this is not JSON: {error}") from error
    match found:
        case {"custom_id": str(name), "method": "POST", "url": str(url), "body": dict(body)}:
            if url not in URLS:
                raise InputError(f"{where}: url must be {' or '.join(URLS)}, got {url[:80]!r}")
            if body.get("stream"):
                raise InputError(f"{where}: a batch cannot stream: leave stream out")
            return Item(name, url, body)
    raise InputError(
        f'{where}: a request is {{"custom_id": "...", "method": "POST", "url": "...", '
        f'"body": {{...}}}} of at most {LINE_BYTES:,} bytes'
    )


def facts_of(options: ClusterOptions, source: Path) -> dict[str, object]:
    """What the answers depend on: a journal of other facts is not resumed. Raises ModelError for an
    adapter that cannot be served."""
    facts: dict[str, object] = {
        "input": sha256(source.read_bytes()).hexdigest(),
        "model": options.model,
        "dtype": options.dtype,
    }
    if adapters := resolve_adapters(options.lora, options.model):
        facts["lora"] = [[each.adapter.name, each.adapter.digest] for each in adapters]
    return facts


def run_batch(options: ClusterOptions, source: Path, out: Path, progress: Progress) -> None:
    """Raises a BatonError, or Interrupted."""
    items = read_items(source)
    target = checked_target(out)
    facts = fingerprint(facts_of(options, source))
    journal = Journal(
        target.with_name(f"{target.name}.part"), fingerprint=facts, prompts=len(items)
    )
    try:
        if journal.notice:
            progress.say(journal.notice)
        if len(journal.answers) < len(items):
            _work(options, items, journal, progress)
        lines = (journal.answers[index].text + "\n" for index in range(len(items)))
        write_whole(target, lines, saved=journal.saved)
        journal.remove()
    except Interrupted as interrupt:
        raise Interrupted(
            f"{journal.saved}; run the same command again to do the rest"
        ) from interrupt
    finally:
        journal.close()
    progress.say(f"{len(items):,} answers are in {out}")


def _work(options: ClusterOptions, items: list[Item], journal: Journal, progress: Progress) -> None:
    todo = [index for index in range(len(items)) if index not in journal.answers]
    with serving_cluster(options, limit=options.batch_size, say=progress.say) as serving:
        progress.begin(total=len(items), done=len(journal.answers))
        pool = ThreadPoolExecutor(options.batch_size)
        try:
            waiting: dict[Future[str], int] = {
                pool.submit(_answer, serving.http, items[index]): index for index in todo
            }
            while waiting:
                done, _ = wait(waiting, timeout=0.05, return_when=FIRST_COMPLETED)
                for future in done:
                    index = waiting.pop(future)
                    journal.add(Completion(index, future.result(), (), "stop"))
                    progress.answer(retries=0)
                serving.supervise()
        finally:
            progress.end()
            pool.shutdown(wait=False, cancel_futures=True)


def _answer(client: HttpClient, item: Item) -> str:
    """The output line. Retries while the server is overloaded or not ready."""
    for attempt in range(TRIES):
        last = attempt == TRIES - 1
        try:
            reply = client.ask(item.url, item.body)
        except (OSError, ValueError) as error:
            if last:
                raise BatonError(f"the server does not answer {item.custom_id}: {error}") from error
        else:
            if reply.status not in (429, 503) or last:
                break
        time.sleep(RETRY_S * 2**attempt)
    if reply.status >= 500:
        raise BatonError(
            f"{item.custom_id} failed with status {reply.status}: {error_message(reply.body)}"
        )
    line = {
        "id": f"batch_req_{secrets.token_hex(8)}",
        "custom_id": item.custom_id,
        "response": {
            "status_code": reply.status,
            "request_id": reply.request_id,
            "body": reply.body,
        },
        "error": None,
    }
    return json.dumps(line, ensure_ascii=False)
