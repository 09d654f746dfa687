"""The output file: its two formats, and how it appears: complete, or not at all.

txt, for reading: for each prompt, in the order of the prompts,

    === 1/8 ===
    <the prompt>
    <the continuation, exactly as generated: it usually begins with a space>
    <a blank line>

jsonl, for programs: one object a line, in the order of the prompts, UTF-8:
`index` (from 0), `prompt`, `text`, `token_ids`, `finish_reason`, and `timings` only when asked for,
so that files of two runs compare byte for byte.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from baton.client.batch import Completion
from baton.errors import InputError, OutputError
from baton.wire.records import Timings


def timings_of(answer: Completion) -> dict[str, float]:
    """The timings of the journal and the jsonl; empty if nothing was measured."""
    if answer.timings == Timings():
        return {}
    return {
        "prompt_tokens": answer.prompt_tokens,
        "tokenize_s": answer.tokenize_s,
        **asdict(answer.timings),
    }


def rendered(
    prompts: Sequence[str], answers: Mapping[int, Completion], kind: str, *, timings: bool
) -> Iterator[str]:
    """The file's text, prompt by prompt. Every prompt needs its answer."""
    for index, prompt in enumerate(prompts):
        answer = answers[index]
        if kind == "txt":
            yield f"=== {index + 1}/{len(prompts)} ===\n{prompt}\n{answer.text}\n\n"
            continue
        line: dict[str, object] = {
            "index": index,
            "prompt": prompt,
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "finish_reason": answer.finish_reason,
        }
        if timings:
            line["timings"] = timings_of(answer)
        yield json.dumps(line, ensure_ascii=False) + "\n"


def checked_target(path: Path) -> Path:
    """The file that will be replaced: `path`, or the target of a symbolic link. Raises InputError if it
    evidently cannot be written."""
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        mode = target.stat().st_mode if target.exists() else None
    except OSError as error:
        raise InputError(f"cannot write -o {path}: {reason(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise InputError(f"-o {path} is a folder: name a file in it, such as {path / 'test.txt'}")
    if mode is not None and not stat.S_ISREG(mode):
        raise InputError(f"-o {path} is a device or a pipe: the output must be an ordinary file")
    if not target.parent.is_dir():
        raise InputError(
            f"-o {path}: there is no folder {target.parent}; make it, or choose another"
        )
    if mode is not None and not os.access(target, os.W_OK):
        raise InputError(f"-o {path} is read-only: chmod u+w it, or choose another name")
    return target


def check_apart(prompts: Path, output: Path, trace: Path | None) -> None:
    """Each file of a job is another one. Raises InputError: what a job writes replaces what was there, so
    the prompts would be gone."""
    output_part = Path(f"{output}.part")
    for option, path, written in (
        ("-o", output, output),
        ("-o", output, output_part),
        ("--trace-file", trace, trace),
    ):
        if path is None or written is None:
            continue
        if _same(written, prompts):
            way_out = "choose another name for the output"
            raise InputError(f"{option} {path} would replace the prompts in {prompts}: {way_out}")
    if trace is not None and (_same(trace, output) or _same(trace, output_part)):
        raise InputError(f"--trace-file {trace} and -o {output} are one file: choose another name")


def _same(one: Path, other: Path) -> bool:
    """Are they one file, whatever links lead to it?"""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)
    except OSError:  # one of them is not there
        return False


def write_whole(target: Path, parts: Iterator[str], *, saved: str) -> None:
    """Replace the file atomically. OutputError if that fails, with `saved`: which answers are safe."""
    beside = target.with_name(f"{target.name}.new.part")
    try:
        beside.unlink(missing_ok=True)
        with beside.open("x", encoding="utf-8", newline="\n") as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        sync_folder(target.parent)
    except OSError as error:
        raise OutputError(cannot_write(target, error, saved)) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the folder itself, so that a new or renamed file survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some file systems
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError, saved: str) -> str:
    """The message for a write that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    way_out = "free some space" if full else "fix that"
    return (
        f"cannot write {path}: {reason(error)}. {saved}; {way_out} and run the same command again."
    )


def reason(error: OSError) -> str:
    """The system's message in lower case: no space left on device."""
    words = error.strerror or str(error)
    return words[:1].lower() + words[1:]
