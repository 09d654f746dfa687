"""Journal: an answer that was added outlives everything; one that was not never happened."""

import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.client.batch import Completion
from baton.errors import InputError, OutputError
from baton.offline.journal import Journal, fingerprint
from baton.wire.records import Timings

SAME = fingerprint({"model": "m", "prompts": ["a", "b", "c"]})


def answer(index, text="text\n龍"):
    return Completion(index, text, (1, 2, 3), "length", timings=Timings(total_s=0.5, retries=1))


def opened(tmp_path, mark=SAME):
    return Journal(tmp_path / "out.txt.part", fingerprint=mark, prompts=3)


def filled(tmp_path, *indices):
    journal = opened(tmp_path)
    for index in indices:
        journal.add(answer(index))
    journal.close()
    return journal.path


def test_what_was_added_is_there_again(tmp_path):
    filled(tmp_path, 0, 2)
    journal = opened(tmp_path)
    assert journal.answers == {0: answer(0), 2: answer(2)}
    assert journal.notice == "resuming: 2 of 3 done"
    journal.close()


def test_a_resumed_journal_goes_on(tmp_path):
    filled(tmp_path, 0)
    filled(tmp_path, 1)
    journal = opened(tmp_path)
    assert journal.answers.keys() == {0, 1}
    journal.close()


def test_a_journal_without_an_answer_leaves_nothing_behind(tmp_path):
    opened(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_journal_says_nothing(tmp_path):
    journal = opened(tmp_path)
    assert journal.notice == ""
    journal.close()


def test_a_removed_journal_is_gone(tmp_path):
    journal = opened(tmp_path)
    journal.add(answer(0))
    journal.remove()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_torn_end_costs_at_most_the_line_it_tore(tmp_path_factory, cut):
    tmp_path = tmp_path_factory.mktemp("torn")
    path = filled(tmp_path, 0, 1, 2)
    data = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == 10]
    kept = max(0, len(data) - cut)
    path.write_bytes(data[:kept])
    journal = opened(tmp_path)
    whole = sum(end <= kept for end in ends)
    assert journal.answers.keys() == set(range(max(0, whole - 1)))
    journal.add(answer(1, "again"))
    journal.close()
    journal = opened(tmp_path)
    assert journal.answers[1] == answer(1, "again")
    journal.close()


@settings(max_examples=100, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_an_answer(tmp_path_factory, where, bit):
    tmp_path = tmp_path_factory.mktemp("flipped")
    path = filled(tmp_path, 0, 1, 2)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(data)
    journal = opened(tmp_path)
    assert all(journal.answers[index] == answer(index) for index in journal.answers)
    assert len(journal.answers) in (0, 1, 2)
    journal.close()


def test_a_damaged_line_is_told(tmp_path):
    path = filled(tmp_path, 0, 1)
    path.write_bytes(path.read_bytes().replace(b'"index": 1', b'"index": 2'))
    journal = opened(tmp_path)
    assert journal.notice == f"resuming: 1 of 3 done; 1 damaged line of {path} dropped"
    journal.close()


def test_another_job_starts_afresh_and_keeps_what_the_old_one_had(tmp_path):
    old = filled(tmp_path, 0, 1).read_bytes()
    journal = opened(tmp_path, fingerprint({"model": "other"}))
    assert journal.answers == {}
    assert "2 answers of another job" in journal.notice
    assert "starting afresh" in journal.notice
    assert (tmp_path / "out.txt.old.part").read_bytes() == old
    journal.close()


def test_rubbish_starts_afresh(tmp_path):
    (tmp_path / "out.txt.part").write_bytes(b"rubbish\n\x00\xff")
    journal = opened(tmp_path)
    assert journal.answers == {}
    assert "nothing of use" in journal.notice
    journal.close()


@pytest.mark.parametrize("index", [-1, 3])
def test_an_answer_to_no_prompt_is_not_believed(tmp_path, index):
    filled(tmp_path, index)
    journal = opened(tmp_path)
    assert journal.answers == {}
    journal.close()


def test_two_jobs_never_share_a_journal(tmp_path):
    journal = opened(tmp_path)
    with pytest.raises(InputError, match=r"another run is writing out\.txt right now"):
        opened(tmp_path)
    journal.close()
    opened(tmp_path).close()


def test_a_folder_that_is_not_there_is_a_mistake_in_the_input(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*no such file"):
        Journal(tmp_path / "no" / "x.part", fingerprint=SAME, prompts=1)


def test_a_device_is_no_journal(tmp_path):
    (tmp_path / "out.txt.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match="not an ordinary file"):
        opened(tmp_path)


FULL = """
import resource, sys
from pathlib import Path
from tests.pure.test_journal import answer, opened
journal = opened(Path(sys.argv[1]))
journal.add(answer(0))
size = journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    journal.add(answer(1))
except Exception as error:
    print(type(error).__name__, error.exit_code, error)
journal.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits as on Linux")
def test_a_full_disk_costs_the_answer_that_did_not_fit_and_no_other(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    path = tmp_path / "out.txt.part"
    assert done.stdout == (
        f"OutputError 5 cannot write {path}: file too large. 1 of 3 answers are safe in {path}; "
        "free some space and run the same command again.\n"
    )
    assert done.stderr == ""
    journal = opened(tmp_path)
    assert journal.answers == {0: answer(0)}
    journal.close()


def test_a_device_that_fails_is_told_in_one_line(tmp_path):
    journal = opened(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file)
    os.close(full)
    with pytest.raises(OutputError, match=r"no space left on device\. nothing was finished yet"):
        journal.add(answer(0))
    assert journal.answers == {}
    journal.close()


def test_no_descriptor_is_left_behind(tmp_path):
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else soft
    journal = opened(tmp_path)
    for _ in range(3):
        with pytest.raises(InputError):
            opened(tmp_path)
    journal.close()
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else soft
    assert after == before


def test_the_fingerprint_is_a_function_of_the_facts_alone():
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": (2, 3), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
