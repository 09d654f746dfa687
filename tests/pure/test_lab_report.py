"""The report, the checklist and the saved studies, from made-up ones; options; usage of processes."""

import json
import re
from pathlib import Path

import pytest

from baton.errors import InputError
from tools.lab.options import decimals, refuse_too_long, refuse_unread, whole_numbers
from tools.lab.report import checklist, markdown, render, slug
from tools.lab.study import Failure, Notebook, Picture, Saved, Study, Table, load, save
from tools.measure.usage import Sample, cpu_seconds, memory_of, summarise_usage

PLACE = {"machine": "a box", "torch": "2"}
MOMENT = {"date": "today", "commit": "abc"}


def study(name: str, title: str, **other: object) -> Study:
    given: dict[str, object] = {
        "name": name, "title": title, "question": "Why?", "varied": "the size",
        "fixed": {"model": "tiny"}, "command": f"python main.py lab {name}", "findings": ("It is.",),
        "tables": (Table("Stages of one request", ("stage", "ms"), (("a|b", "1.0"),)),),
    }  # fmt: skip
    return Study(**(given | other))  # type: ignore[arg-type]


def test_a_saved_study_is_read_back_as_it_was(tmp_path: Path) -> None:
    saved = Saved(
        study("kv-cache", "KV cache", pictures=(Picture("a.png", "A"),),
              failures=(Failure("x", "y"),), quotations={"said": "é"}, seconds=1.5),
        PLACE, MOMENT,
    )  # fmt: skip
    save(tmp_path, saved)
    assert load(tmp_path) == ([saved], [])


def test_studies_come_in_the_order_they_run_and_doing_one_again_keeps_the_rest(
    tmp_path: Path,
) -> None:
    for name in ("kv-cache", "baseline"):
        save(tmp_path, Saved(study(name, name), PLACE, MOMENT))
    again = Saved(study("baseline", "new"), PLACE, MOMENT)
    save(tmp_path, again)
    found, _ = load(tmp_path)
    assert [each.study.title for each in found] == ["new", "kv-cache"]


def test_a_saved_study_that_cannot_be_read_is_told_and_stops_nothing(tmp_path: Path) -> None:
    save(tmp_path, Saved(study("batching", "Batching"), PLACE, MOMENT))
    (tmp_path / "baseline.json").write_text('{"study": {}}')
    (tmp_path / "kv-cache.json").write_text("[")
    found, failures = load(tmp_path)
    assert [each.study.name for each in found] == ["batching"]
    assert [each.what for each in failures] == ["baseline.json", "kv-cache.json"]
    assert "run `lab baseline` again" in failures[0].why


def test_every_link_of_a_report_leads_somewhere() -> None:
    saved = [
        Saved(study("baseline", "Baseline", quotations={"text": "words"}), PLACE, MOMENT),
        Saved(study("kv-cache", "KV cache: on & off"), PLACE, MOMENT),
    ]
    text = render(saved)
    anchors = [slug(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")]
    targets = re.findall(r"\]\(#([^)]*)\)", text)
    assert targets
    assert set(targets) <= set(anchors)


def test_a_report_says_first_where_it_was_measured_and_what_each_study_was() -> None:
    text = render([Saved(study("baseline", "Baseline"), PLACE, MOMENT)])
    assert text.index("a box") < text.index("## Baseline") < text.index("## Failures")
    for word in ("*Why?* Expect decode to take most", "**Varied:** the size.", "model tiny",
                 "* It is.", "a\\|b",
                 "    python main.py lab baseline", "[baseline.jsonl](baseline.jsonl)",
                 "Not in this report yet: `python main.py lab batching`"):  # fmt: skip
        assert word in text


def test_a_quick_run_is_told_from_a_real_one() -> None:
    quick = study("baseline", "Baseline", command="python main.py lab baseline --quick")
    assert "**Quick run:**" in render([Saved(quick, PLACE, MOMENT)])
    assert "**Quick run:**" not in render([Saved(study("baseline", "Baseline"), PLACE, MOMENT)])


def test_a_study_of_another_machine_says_so() -> None:
    here = Saved(study("baseline", "Baseline"), PLACE, MOMENT)
    there = Saved(study("batching", "Batching"), PLACE | {"machine": "another"}, MOMENT)
    text = render([here, there])
    assert "**Not the environment above:** machine: another (the first study: a box)" in text


def test_failures_stand_in_one_place_and_a_study_that_failed_whole_hides_no_other() -> None:
    broken = study("baseline", "Baseline", tables=(), findings=(),
                   failures=(Failure("the whole study", "it\nfell"),))  # fmt: skip
    assert "Expect " not in render([Saved(broken, {}, {})])
    text = render([Saved(broken, {}, {}), Saved(study("batching", "Batching"), PLACE, MOMENT)],
                  [Failure("kv-cache", "was interrupted")])  # fmt: skip
    assert "* baseline, the whole study: it fell" in text
    assert "* kv-cache: was interrupted" in text
    assert "a box" in text


def test_an_empty_report_is_a_report() -> None:
    text = render([])
    assert "## Environment" not in text
    assert text.count("- [ ] ") == 7


def test_a_line_of_the_checklist_is_open_until_there_is_evidence() -> None:
    saved = [Saved(study("baseline", "Baseline"), PLACE, MOMENT)]
    lines = {line.id: line for line in checklist(saved)}
    assert list(lines) == [f"S1.{n}" for n in range(1, 8)]
    assert lines["S1.2"].evidence == ("[Stages of one request](#stages-of-one-request)",)
    assert lines["S1.3"].evidence == ()  # no text
    assert lines["S1.4"].evidence == lines["S1.5"].evidence == lines["S1.6"].evidence == ()
    quoted = [Saved(study("baseline", "Baseline", quotations={"t": "x"}), PLACE, MOMENT)]
    assert {line.id: line for line in checklist(quoted)}["S1.3"].evidence


def test_a_table_is_markdown_with_numbers_to_the_right() -> None:
    lines = markdown(Table("", ("a", "b"), (("x\ny", "1"),))).splitlines()
    assert lines == ["| a | b |", "| --- | --: |", "| x y | 1 |"]


def test_a_notebook_writes_at_once_and_keeps_failures(tmp_path: Path) -> None:
    said: list[str] = []
    notebook = Notebook(tmp_path / "x.jsonl", said.append)
    notebook.record("request", seconds=0.5, tokens=[1.0])
    notebook.failed("a cell", ValueError("no\nroom"))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert lines[0] == {"what": "request", "seconds": 0.5, "tokens": [1.0]}
    assert lines[1] == {"what": "failure", "cell": "a cell", "why": "no room"}
    assert notebook.failures == [Failure("a cell", "no room")]
    assert said == ["a cell failed: no room"]


# ---- options


def test_comma_lists_are_read_smallest_first() -> None:
    assert whole_numbers("8, 1,4", "--batch-sizes", low=1, high=64) == (1, 4, 8)
    assert decimals("50,0,2.5", "--windows-ms", low=0, high=100) == (0.0, 2.5, 50.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,x", "got 'x'"),
        ("1,,4", "empty item"),
        ("", "empty item"),
        ("4,1,4", "twice"),
        ("0,4", "1 to 64, got 0"),
        ("1,65", "1 to 64, got 65"),
        ("-1", "got '-1'"),
        ("1.5", "got '1.5'"),
        ("²", "got '²'"),
        (",".join(map(str, range(1, 18))), "at most 16"),
    ],
)
def test_a_wrong_list_is_refused_by_the_item_that_is_wrong(text: str, told: str) -> None:
    with pytest.raises(InputError, match=r"--batch-sizes") as found:
        whole_numbers(text, "--batch-sizes", low=1, high=64)
    assert told in str(found.value)


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "ten", "-1", "101"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--windows-ms"):
        decimals(text, "--windows-ms", low=0, high=100)


def test_an_option_that_no_chosen_study_reads_is_refused() -> None:
    refuse_unread({"batch_sizes": "--batch-sizes"}, ["baseline", "batching"])
    with pytest.raises(InputError, match="--batch-sizes is read by batching, not by baseline"):
        refuse_unread({"batch_sizes": "--batch-sizes"}, ["baseline"])


def test_prompts_that_do_not_fit_the_model_are_refused_with_the_way_out() -> None:
    refuse_too_long([974], new_tokens=50, context=1024, model="m")
    with pytest.raises(InputError, match="at most 974, or another --model"):
        refuse_too_long([975], new_tokens=50, context=1024, model="m")


# ---- usage


def test_cpu_time_is_read_past_a_name_with_brackets_and_blanks() -> None:
    fields = " ".join(str(n) for n in range(3, 53))
    stat = f"12 (a) b (c) {fields}"
    assert cpu_seconds(stat, 100.0) == (14 + 15) / 100


def test_memory_is_read_in_bytes() -> None:
    assert memory_of("Name:\tx\nVmHWM:\t  20 kB\nVmRSS:\t 10 kB\n") == {
        "VmHWM": 20480, "VmRSS": 10240
    }  # fmt: skip


def test_usage_is_cpu_time_by_wall_time_process_by_process() -> None:
    samples = [
        Sample(0.0, {"a": 1.0, "b": 0.0}, 10.0),
        Sample(1.0, {"a": 2.0, "b": 0.5}, 30.0),
        Sample(4.0, {"a": 3.0, "b": 0.5, "late": 0.4}),
    ]
    usage = summarise_usage(samples)
    assert usage.cores == {"a": 0.5, "b": 0.125, "late": 0.1}
    assert usage.gpu_percent == 20.0
    assert usage.total_cores == pytest.approx(0.725)


def test_one_sample_is_no_time_and_no_usage() -> None:
    usage = summarise_usage([Sample(1.0, {"a": 1.0})])
    assert (usage.seconds, usage.cores, usage.peak_cores) == (0.0, {"a": 0.0}, 0.0)
