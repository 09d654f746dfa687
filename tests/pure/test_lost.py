"""A model's path with a typo: where it ends, and what is meant."""

import pytest

from baton.checkpoints.lost import no_such_path
from baton.errors import ModelError
from baton.model_files import resolve_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama-3b").mkdir(parents=True)
    (tmp_path / "models" / "notes.txt").write_text("")
    return tmp_path


CASES = {
    "models/llama-3": "models has no 'llama-3'; did you mean models/llama-3b?",
    "./models/llama3b": "models has no 'llama3b'; did you mean models/llama-3b?",
    "modles/llama-3b/": "this folder has no 'modles'; did you mean models?",
    "./modles": "this folder has no 'modles'; did you mean models?",
    "models/gemma": "models has no 'gemma'",
    "a/b/c": "this folder has no 'a'",
    "models/notes.txt/x": "models/notes.txt is a file, not a folder",
    "/nowhere/at/all": "/ has no 'nowhere'",
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_part_that_is_missing_is_named(name, folder):
    with pytest.raises(ModelError) as caught:
        resolve_model(name)
    assert str(caught.value) == f"there is no model {name!r}: {CASES[name]}"


def test_an_absolute_path_is_shown_as_it_is(folder):
    said = no_such_path(f"{folder}/models/lama-3b")
    assert said is not None
    assert said.endswith(f"has no 'lama-3b'; did you mean {folder}/models/llama-3b?")


@pytest.mark.parametrize("name", ["demmo", "org/model", "random:gpt3"])
def test_a_name_is_no_path(name, folder):
    assert no_such_path(name) is None
