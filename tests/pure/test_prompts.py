"""Prompt files: what is read from them, and what is said of a bad one."""

import pytest

from baton.errors import InputError
from prompts import PROMPTS, check_prompts, read_prompts


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_the_samples_are_the_eight_of_the_mission():
    assert len(check_prompts(PROMPTS)) == 8
    assert PROMPTS[0] == "In the future, artificial intelligence will"
    assert PROMPTS[7] == "In an ancient castle, there is a hidden"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_has_one_prompt_a_line_and_blank_lines_do_not_count(tmp_path, ending, bom):
    text = ending.join(["", "one", "   ", " two ", "drei ß 龍", ""])
    assert read_prompts(write(tmp_path, "p.txt", bom + text.encode())) == [
        "one",
        " two ",
        "drei ß 龍",
    ]


def test_only_a_newline_ends_a_line(tmp_path):
    text = "a\x0bb\x0cc\x85d\u2028e\nf"
    assert read_prompts(write(tmp_path, "p.txt", text)) == ["a\x0bb\x0cc\x85d\u2028e", "f"]


def test_jsonl_takes_objects_and_bare_strings(tmp_path):
    lines = '{"prompt": "one\\ntwo", "id": 7}\n\n"three"\n'
    assert read_prompts(write(tmp_path, "p.JSONL", lines)) == ["one\ntwo", "three"]


BAD = {
    "empty.txt": (b"", r"empty\.txt holds no prompt"),
    "blank.txt": (b"\n  \n", r"blank\.txt holds no prompt"),
    "latin.txt": (b"good\nna\xefve\n", r"latin\.txt, line 2: byte 7 \(0xef\) is not UTF-8; save"),
    "bom.txt": (b"\xef\xbb\xbfab\xff", r"line 1: byte 5 \(0xff\)"),
    "utf16.txt": ("hi\n".encode("utf-16"), r"line 1: byte 0 \(0xff\) is not UTF-8"),
    "a.json": (b"[]", r"a\.json: a \.json file is one document"),
    "syntax.jsonl": (b'"a"\n{"prompt": \n', r"syntax\.jsonl, line 2 is not JSON \(Expecting value"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl, line 1 is not JSON"),
    "missing.jsonl": (b'{"text": "a"}', r'line 1 has no "prompt" \(it has text\)'),
    "bare.jsonl": (b"{}", r'line 1 has no "prompt" \(it has nothing\)'),
    "none.jsonl": (b'"a"\n{"prompt": ""}', r"line 2: the prompt is empty"),
    "number.jsonl": (b"12", r"line 1: a prompt must be a string, got int"),
    "list.jsonl": (b'{"prompt": ["a"]}', r"line 1: a prompt must be a string, got list"),
    "half.jsonl": (b'"a\\ud800b"', r"character 2 of the prompt is half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_line_and_the_way_out(tmp_path, name):
    data, message = BAD[name]
    path = write(tmp_path, name, data)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match=r"there is no prompt file .*gone"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(InputError, match=r"cannot read the prompt file .*Not a directory"):
        read_prompts(write(tmp_path, "file", "a") / "below.txt")


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ([], "PROMPTS must be a list"),
        ("one long string", "PROMPTS must be a list"),
        (["a", ""], "prompt 2: the prompt is empty"),
        (["a", None], "prompt 2: a prompt must be a string"),
    ],
)
def test_edited_samples_are_checked_too(edited, message):
    with pytest.raises(InputError, match=message):
        check_prompts(edited)
