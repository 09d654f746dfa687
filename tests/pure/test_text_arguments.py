"""Arguments of the command line are bytes. A text must be UTF-8; the name of a file may be anything."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from baton.cli import main
from baton.errors import ModelError, RequestError
from baton.model_files import resolve_model
from baton.params import GenerationParams
from baton.text import Tokenizer
from prompts import read_prompts

DEMO = Path(__file__).resolve().parents[2] / "baton" / "models" / "demo"
LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("infer", "--prompt", LATIN), "'--prompt'"),
        (("--stop", "fine", "--stop", LATIN), "'--stop'"),
        (("serve", "--served-model-name", LATIN), "'--served-model-name'"),
        (("chat", LATIN), "'[MESSAGE]'"),
    ],
)
def test_a_text_that_is_not_utf8_is_one_line(arguments, name, capsys, monkeypatch):
    monkeypatch.setattr(main, "turned_into_exceptions", nullcontext)
    assert main.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: Invalid value for {name}: byte 0xe9 of 'caf\\udce9' is not UTF-8; "
    )
    assert said.count("\n") == 1


def test_the_name_of_a_file_may_be_any_bytes(tmp_path):
    (tmp_path / LATIN).write_text("Once upon\n")
    assert read_prompts(tmp_path / LATIN) == ["Once upon"]
    with main.cli.make_context(
        "main", ["--prompts", str(tmp_path / LATIN), "-o", LATIN]
    ) as context:
        assert context.params["output_file"] == LATIN


def test_the_folder_of_a_model_must_be_text(tmp_path):
    folder = tmp_path / LATIN
    shutil.copytree(DEMO, folder)
    with pytest.raises(ModelError, match=r"caf\\udce9' is not UTF-8, .* rename it"):
        resolve_model(str(folder))


# ---- texts that reach a request by any way


@pytest.mark.parametrize(
    ("field", "given"), [("stop", ("a", "\ud800")), ("cache_salt", "\ud800"), ("grammar", "\ud800")]
)
def test_a_text_of_a_request_is_unicode(field, given):
    with pytest.raises(RequestError, match=f"{field} holds half a surrogate pair") as caught:
        GenerationParams(1, **{field: given})
    assert caught.value.param == field


def test_a_prompt_beyond_any_context_is_refused_before_it_is_tokenized(
    tmp_path, capsys, monkeypatch
):
    tokenized = []
    encode = Tokenizer.encode

    def watched(self, text, *, special=True):
        tokenized.append(len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    monkeypatch.setattr(main, "turned_into_exceptions", nullcontext)
    (tmp_path / "long.txt").write_text("Once upon\n" + "a" * 1_000_000 + "\n")
    assert (
        main.main(["--prompts", str(tmp_path / "long.txt"), "-o", str(tmp_path / "out.txt")]) == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("error: prompt 2 of 2: the prompt has 1,000,000 characters, at least ")
    assert tokenized == [len("Once upon")]
