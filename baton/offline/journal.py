"""Journal: OUTPUT.part, the answers of an unfinished job, each on disk as soon as it is complete.

    {"journal": 1, "fingerprint": "9f...", "prompts": 8}<TAB>crc32
    {"index": 3, "text": ..., "token_ids": [...], ...}<TAB>crc32
    ...                                               one line per answer, fsync'ed

The fingerprint covers all that the answers depend on (model, prompts, sampling, length, stop
strings, dtype) and nothing else: not the format, the batch size or the topology. A line with a wrong
checksum is ignored; an incomplete last line is cut off. One job at a time holds the file (flock), and a
job that ends without an answer leaves no file.
"""

import fcntl
import json
import os
import shutil
import stat
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from hashlib import sha256
from pathlib import Path

from baton.client.batch import Completion
from baton.errors import InputError, OutputError
from baton.offline.interrupts import held_back
from baton.offline.outputs import cannot_write, reason, sync_folder, timings_of
from baton.wire.records import Timings

VERSION = 1


def fingerprint(facts: Mapping[str, object]) -> str:
    """A hash of everything the answers depend on."""
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """The answers so far. `notice`: what the file held at the start, for the user; empty if nothing."""

    def __init__(self, path: Path, *, fingerprint: str, prompts: int) -> None:
        """Lock the file, and read it if it is of the same job.

        Raises InputError if it cannot be written or another job holds it.
        """
        self.path = path
        self.answers: dict[int, Completion] = {}
        self.notice = ""
        self._prompts = prompts
        self._file = _locked(path)
        try:
            self._resume(fingerprint)
        except OSError as error:
            self.close()
            raise InputError(f"cannot write {path}: {reason(error)}") from error

    def add(self, answer: Completion) -> None:
        """Once this returns, the answer survives any crash. OutputError if it cannot be written."""
        entry = {
            "index": answer.index,
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "timings": timings_of(answer),
        }
        with held_back():  # an interrupt between file and memory would leave the two different
            try:
                self._append(entry)
            except OSError as error:
                raise OutputError(cannot_write(self.path, error, self.saved)) from error
            self.answers[answer.index] = answer

    @property
    def saved(self) -> str:
        """What is on disk, for the messages about an interrupted job."""
        if not self.answers:
            return "nothing was finished yet"
        return f"{len(self.answers):,} of {self._prompts:,} answers are safe in {self.path}"

    def close(self) -> None:
        """Unlock the file, and remove it if it holds no answer. May be called after remove()."""
        if not self.answers:
            self.remove()
        elif self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Remove the file, as when the output is in place. May be called again."""
        if self._file < 0:
            return
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    def _resume(self, fingerprint: str) -> None:
        data = _read_all(self._file)
        whole = data[: data.rfind(b"\n") + 1]
        head, *lines = [_verified(line) for line in whole.split(b"\n")[:-1]] or [None]
        known = (head or {}).get("fingerprint") == fingerprint
        known = known and (head or {}).get("journal") == VERSION
        found = [answer for line in lines if (answer := _answer(line, self._prompts))]
        if known:
            self.answers = {answer.index: answer for answer in found}
            self.notice = self._what_was_found(len(lines) - len(found), torn=len(whole) < len(data))
            os.ftruncate(self._file, len(whole))
            os.lseek(self._file, 0, os.SEEK_END)
            return
        if found:
            kept = self.path.with_name(f"{self.path.name.removesuffix('.part')}.old.part")
            shutil.copyfile(self.path, kept)
            self.notice = (
                f"{self.path} holds {len(found):,} answers of another job (other model, prompts or "
                f"settings): starting afresh; they are kept in {kept}"
            )
        elif data:
            self.notice = f"{self.path} held nothing of use: starting afresh"
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._append({"journal": VERSION, "fingerprint": fingerprint, "prompts": self._prompts})
        sync_folder(self.path.parent)

    def _what_was_found(self, damaged: int, *, torn: bool) -> str:
        notes = []
        if self.answers:
            notes.append(f"resuming: {len(self.answers):,} of {self._prompts:,} done")
        if bad := damaged + torn:
            notes.append(f"{bad} damaged {'line' if bad == 1 else 'lines'} of {self.path} dropped")
        return "; ".join(notes)

    def _append(self, entry: Mapping[str, object]) -> None:
        body = json.dumps(entry, ensure_ascii=False).encode()
        line = memoryview(body + f"\t{zlib.crc32(body):08x}\n".encode())
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)


def _locked(path: Path) -> int:
    """The file, open and locked. The job that held it may have removed it meanwhile: then retry."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {path}: {reason(error)}") from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise InputError(f"{path} is not an ordinary file: move it away")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise InputError(
                f"another run is writing {path.name.removesuffix('.part')} right now: wait for it, "
                "or give this one another -o"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)


def _read_all(file: int) -> bytes:
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _verified(line: bytes) -> dict[str, object] | None:
    body, _, checksum = line.rpartition(b"\t")
    if checksum != f"{zlib.crc32(body):08x}".encode():
        return None
    try:
        entry = json.loads(body)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _answer(entry: Mapping[str, object] | None, prompts: int) -> Completion | None:
    match entry:
        case {
            "index": int(index),
            "text": str(text),
            "token_ids": list(ids),
            "finish_reason": str(finish_reason),
            "timings": dict(timings),
        } if 0 <= index < prompts:
            known = {each.name for each in fields(Timings)}
            return Completion(
                *(index, text, tuple(ids), finish_reason),
                prompt_tokens=timings.get("prompt_tokens", 0),
                tokenize_s=timings.get("tokenize_s", 0.0),
                timings=Timings(**{name: timings[name] for name in known & timings.keys()}),
            )
    return None
