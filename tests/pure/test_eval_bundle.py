"""Reading a bundle's folder, and the errors for mistakes in it."""

import json
import random
from pathlib import Path

import pytest

from baton.errors import InputError
from tools.evaluation.bundle import LanguageModeling, MultipleChoice, Schema, read_bundle
from tools.evaluation.data import BUNDLE

TASK = """- label: t
  dataset_uri: sub/t.jsonl
  num_fewshot: [2]
  icl_task_type: {kind}
"""
CORE = f"icl_tasks:\n{TASK}"
META = "Eval Task,Description,Random baseline\nt,a task,25\n"
LINES = {
    "language_modeling": [{"context": str(i), "continuation": "x"} for i in range(6)],
    "multiple_choice": [{"query": "q", "choices": ["a", "b"], "gold": i % 2} for i in range(6)],
    "schema": [{"context_options": ["a", "b"], "continuation": "c", "gold": 1} for _ in range(6)],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "eval_data" / "sub").mkdir(parents=True)
    (tmp_path / "eval_meta_data.csv").write_text(META)
    fill(tmp_path, "language_modeling")
    return tmp_path


def fill(folder: Path, kind: str, lines: list[object] | None = None) -> None:
    (folder / "core.yaml").write_text(CORE.format(kind=kind))
    text = "".join(json.dumps(each) + "\n" for each in lines or LINES[kind])
    (folder / "eval_data" / "sub" / "t.jsonl").write_text(text)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        read_bundle(folder)
    return str(error.value)


def test_a_task_is_what_the_files_say(folder: Path) -> None:
    (task,) = read_bundle(folder)
    assert (task.label, task.shots, task.delimiter, task.baseline) == ("t", 2, " ", 0.25)
    assert set(task.examples) == {LanguageModeling(str(i), "x") for i in range(6)}


def test_examples_stand_in_nanochats_order(folder: Path) -> None:
    order = list(range(6))
    random.Random(1337).shuffle(order)
    (task,) = read_bundle(folder, max_per_task=4)
    assert task.examples == tuple(LanguageModeling(str(i), "x") for i in order[:4])


@pytest.mark.parametrize(
    ("kind", "type_"), [("multiple_choice", MultipleChoice), ("schema", Schema)]
)
def test_every_kind_is_read(folder: Path, kind: str, type_: type) -> None:
    fill(folder, kind)
    (task,) = read_bundle(folder)
    assert {type(each) for each in task.examples} == {type_}


def test_a_number_is_taken_as_it_is_written(folder: Path) -> None:
    fill(folder, "language_modeling", [{"context": 3, "continuation": 1.5}] * 3)
    assert read_bundle(folder)[0].examples[0] == LanguageModeling("3", "1.5")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([], "an object is needed, got []"),
        ({"query": "q", "gold": 0}, "missing field 'choices'; there are 'query', 'gold'"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "choices must be a list of 2 or more texts"),
        ({"query": "q", "choices": ["a", None], "gold": 0}, "choices[1] must be a text, got null"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold must be a number from 0 to 1, got 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold must be a number from 0 to 1"),
        ({"query": "\ud83d", "choices": ["a", "b"], "gold": 0}, "query holds half a surrogate pair"),
        ({"query": ["q"], "choices": ["a", "b"], "gold": 0}, 'query must be a text, got ["q"]'),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(folder: Path, line: object, words: str) -> None:
    fill(folder, "multiple_choice", [*LINES["multiple_choice"], line])
    assert f"sub/t.jsonl:7: {words}" in refused(folder)


def test_a_line_that_is_no_json_is_named(folder: Path) -> None:
    file = folder / "eval_data" / "sub" / "t.jsonl"
    file.write_text('\n{"context": "a", "continuation"\n')
    assert "t.jsonl:2: not valid JSON" in refused(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("core.yaml", "icl_tasks: 3", "core.yaml has no list icl_tasks"),
        ("core.yaml", "icl_tasks: [", "core.yaml is not valid YAML"),
        ("core.yaml", "icl_tasks: [{label: t}]", "task 1: missing field 'icl_task_type'"),
        ("core.yaml", CORE.format(kind="riddle"), "icl_task_type must be one of"),
        ("core.yaml", CORE.format(kind="schema").replace("[2]", "six"), "num_fewshot must be"),
        ("core.yaml", CORE.format(kind="schema").replace("t\n", "u\n", 1), "no line for 'u'"),
        ("core.yaml", CORE.format(kind="schema") + TASK.format(kind="schema"), "'t' twice"),
        ("eval_meta_data.csv", "Eval Task\nt\n", "csv:2: missing column 'Random baseline'"),
        ("eval_meta_data.csv", META.replace("25", "much"), "csv:2: 'much' is not a percentage"),
        ("eval_meta_data.csv", META.replace("25", "100"), "below 100"),
    ],
)  # fmt: skip
def test_a_wrong_listing_is_named(folder: Path, name: str, text: str, words: str) -> None:
    fill(folder, "schema")
    (folder / name).write_text(text)
    assert words in refused(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "eval_data" / "sub" / "t.jsonl").unlink()
    assert "t.jsonl cannot be read: No such file" in refused(folder)


def test_more_solved_examples_than_there_are_others_are_refused(folder: Path) -> None:
    fill(folder, "schema", LINES["schema"][:2])
    assert "2 solved examples for each need more than the 2 of" in refused(folder)


def test_the_bundled_one_has_all_three_kinds_and_no_answer_at_one_place() -> None:
    tasks = read_bundle(BUNDLE)
    assert {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in tasks:
        assert 20 <= len(task.examples) <= 40
        assert len(set(task.examples)) == len(task.examples)
        golds = [each.gold for each in task.examples if not isinstance(each, LanguageModeling)]
        if golds:
            share = max(map(golds.count, golds)) / len(golds)
            assert share <= task.baseline + 0.1, task.label
