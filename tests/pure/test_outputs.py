"""The output file: exactly these bytes, complete or not at all."""

import json
import os
import subprocess
import sys

import pytest

from baton.client.batch import Completion
from baton.errors import InputError, OutputError
from baton.offline.outputs import check_apart, checked_target, rendered, write_whole
from baton.wire.records import Timings

PROMPTS = ["One day", "Zwei »龍«"]
ANSWERS = {
    1: Completion(1, " kam\nsie.", (7, 8), "stop", timings=Timings(total_s=0.5)),
    0: Completion(0, " it rained", (1, 2, 3), "length", timings=Timings(total_s=0.25)),
}


def written(kind, *, timings=False):
    return "".join(rendered(PROMPTS, ANSWERS, kind, timings=timings))


def test_txt_has_heading_prompt_continuation_and_a_blank_line_in_the_order_of_the_prompts():
    assert written("txt") == (
        "=== 1/2 ===\nOne day\n it rained\n\n=== 2/2 ===\nZwei »龍«\n kam\nsie.\n\n"
    )


def test_jsonl_has_one_object_a_line_and_no_timings():
    lines = written("jsonl").splitlines()
    assert lines[1] == (
        '{"index": 1, "prompt": "Zwei »龍«", "text": " kam\\nsie.", "token_ids": [7, 8], '
        '"finish_reason": "stop"}'
    )
    assert [json.loads(line)["index"] for line in lines] == [0, 1]


def test_timings_come_when_asked_for():
    timings = json.loads(written("jsonl", timings=True).splitlines()[0])["timings"]
    assert list(timings)[:2] == ["prompt_tokens", "tokenize_s"]
    assert timings["total_s"] == 0.25


def test_writing_puts_the_whole_file_in_place_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    target.chmod(0o640)
    write_whole(target, iter(["new", "er\n"]), saved="s")
    assert target.read_bytes() == b"newer\n"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")

    def parts():
        yield "new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError) as caught:
        write_whole(target, parts(), saved="2 of 2 answers are safe in out.txt.part")
    assert str(caught.value) == (
        f"cannot write {target}: no space left on device. 2 of 2 answers are safe in "
        "out.txt.part; free some space and run the same command again."
    )
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.txt"]


LIMITED = """
import resource, sys
from pathlib import Path
from baton.offline.outputs import write_whole
from baton.wire.records import Timings
from baton.wire.records import Timings
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    write_whole(Path(sys.argv[1]), ("x" * 1000 for _ in range(1000)), saved="s")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as on Linux")
def test_a_full_disk_leaves_no_file_at_all(tmp_path):
    target = tmp_path / "out.txt"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(target)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"OutputError cannot write {target}: file too large. s; free")
    assert os.listdir(tmp_path) == []


def test_a_file_left_by_a_killed_run_is_no_obstacle(tmp_path):
    (tmp_path / "out.txt.new.part").write_text("half")
    write_whole(tmp_path / "out.txt", iter(["whole"]), saved="s")
    assert os.listdir(tmp_path) == ["out.txt"]


def test_a_good_target_is_itself_and_a_link_is_what_it_points_to(tmp_path):
    assert checked_target(tmp_path / "new.txt") == tmp_path / "new.txt"
    (tmp_path / "real.txt").write_text("")
    (tmp_path / "link").symlink_to("real.txt")
    assert checked_target(tmp_path / "link") == tmp_path / "real.txt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a folder: name a file in it"),
        ("no/test.txt", r"there is no folder .*no; make it"),
        ("file/test.txt", "there is no folder|not a directory"),
        ("null", "is a device or a pipe"),
    ],
)
def test_a_bad_target_is_refused_before_any_work(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(InputError, match=message):
        checked_target(tmp_path / name if name else tmp_path)


def test_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(InputError, match="file name too long"):
        checked_target(tmp_path / ("x" * 300))


def test_a_read_only_file_is_refused(tmp_path, monkeypatch):
    target = tmp_path / "out.txt"
    target.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root all is writable
    with pytest.raises(InputError, match="read-only"):
        checked_target(target)


@pytest.mark.parametrize(
    ("output", "trace", "said"),
    [
        ("prompts.txt", None, "-o {}/prompts.txt would replace the prompts"),
        ("./sub/../prompts.txt", None, "would replace the prompts"),
        ("link", None, "-o {}/link would replace the prompts"),
        ("hard", None, "-o {}/hard would replace the prompts"),
        ("part", None, "-o {}/part would replace the prompts"),
        ("out", "prompts.txt", "--trace-file {}/prompts.txt would replace the prompts"),
        ("out", "link", "--trace-file {}/link would replace the prompts"),
        ("out", "out", "--trace-file {}/out and -o {}/out are one file"),
        ("out", "out.part", "are one file"),
        ("./out", "sub/../out", "are one file"),
    ],
)
def test_what_is_read_is_not_written(tmp_path, output, trace, said):
    (tmp_path / "sub").mkdir()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In the future")
    (tmp_path / "link").symlink_to(prompts)
    os.link(prompts, tmp_path / "hard")
    (tmp_path / "part.part").symlink_to(prompts)
    with pytest.raises(InputError) as refused:
        check_apart(prompts, tmp_path / output, tmp_path / trace if trace else None)
    assert said.format(tmp_path, tmp_path) in str(refused.value)
    check_apart(prompts, tmp_path / "answers.txt", tmp_path / "trace.json")
