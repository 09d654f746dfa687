"""The command line: every bad input is one line and its exit code; a good one writes the file."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import baton.cli.infer
import baton.offline.run
from baton.cli import main
from baton.offline import interrupts
from baton.offline.interrupts import Interrupted
from baton.wire.messages import Failed
from tests.patience import PATIENCE_S
from tests.pure.pretend_router import PretendRouter, PretendSupervisor, link_through, words_of

ROOT = Path(__file__).resolve().parents[2]
TWO = "Once upon\nThe end\n"


@pytest.fixture(autouse=True)
def _no_signal_handlers(monkeypatch):
    monkeypatch.setattr(main, "turned_into_exceptions", nullcontext)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text(TWO)
    return tmp_path


def run(capsys, *arguments):
    code = main.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line on stderr, without its `error: `, and the exit code."""
    code, out, err = run(capsys, *arguments)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return code, err.removeprefix("error: ").rstrip()


def pretend(monkeypatch, router=None, supervisor=None):
    router = router or PretendRouter()
    for module in (baton.offline.run, baton.cli.infer):
        monkeypatch.setattr(module, "link_to", link_through(router, supervisor))
    return router


# ---- what is refused


BAD = {
    "-b 0": "-b 0: at least 1 request must run at once; 4 is the default",
    "-b -1": "-b -1: at least 1 request must run at once; 4 is the default",
    "-b 1e9": "Invalid value for '-b' / '--batch-size': '1e9' is not a valid integer.",
    "-l 0": "-l 0: at least 1 token must be generated; 100 is the default",
    "-l x": "Invalid value for '-l' / '--generation-length': 'x' is not a valid integer.",
    "-l 2304": "-l 2,304 does not fit: the context of demo is 2,304 tokens, prompt included; use",
    "-l 2300": "prompt 1 of 8: the prompt has",
    "-l 50 --max-model-len 50": "-l 50 does not fit: the context of demo is 50 tokens",
    "--max-model-len 0": "Invalid value for '--max-model-len': 0 is not in the range x>=2.",
    "--max-model-len 9999": "--max-model-len 9,999 is more than demo has: its context is 2,304",
    "-o .": "-o . is a folder: name a file in it, such as test.txt",
    "-o no/test.txt": "-o no/test.txt: there is no folder no; make it, or choose another",
    "-o /dev/full": "-o /dev/full is a device or a pipe",
    "--prompts gone.txt": "there is no prompt file gone.txt",
    "--prompts .": ". is a folder; --prompts takes one file",
    "--temperature -1": "--temperature must be in [0, 2], got -1.0",
    "--temperature nan": "--temperature must be in [0, 2], got nan",
    "--top-p 1.5": "--top-p must be in (0, 1], got 1.5",
    "--top-k -2": "--top-k must be -1 or 0 (off), or in [1, 2**31), got -2",
    "--repetition-penalty 0": "--repetition-penalty must be finite and > 0",
    "--seed 9223372036854775808": "--seed must be in [-2**63, 2**63), got 9223372036854775808",
    "--greedy --temperature 0.5": "--greedy and --temperature 0.5 exclude each other",
    "--stop a --stop b --stop c --stop d --stop e": "at most 4 --stop strings, got 5: leave some",
    "--format xml": "Invalid value for '--format': 'xml' is not one of 'txt', 'jsonl'.",
    "--dtype int4": "Invalid value for '--dtype': 'int4' is not one of 'auto', 'float32'",
    "--kv-transport nfs": "'nfs' is not one of 'auto', 'shm', 'cuda_ipc', 'pinned', 'frames'",
    "--timings": "--timings go into jsonl lines: add --format jsonl",
    "--prefill-device gpu0": "--prefill-device must be auto, cpu, mps or cuda:0, cuda:1, ..., got",
    "--decode-device cuda:x": "--decode-device must be auto, cpu, mps or cuda:0, cuda:1, ..., got",
    "--decode-device cuda:99": "--decode-device cuda:99",
    "--num-prefill 0": "--num-prefill must be at least 1, got 0",
    "--num-decode 1 --decode-device cpu --decode-device cpu": "--num-decode 1 is less than the 2",
    "--colocated --num-prefill 2": "--num-prefill and --colocated exclude each other",
    "--colocated --role-policy adaptive": "--role-policy and --colocated exclude each other",
    "--batch-window-ms -1": "Invalid value for '--batch-window-ms': -1.0 is not in the range",
    "--batch-window-ms nan": "Invalid value for '--batch-window-ms': nan is not in the range",
    "--keys keys": "--keys is for a running cluster: add --router tcp://HOST:PORT",
    "--router localhost": "--router must be tcp://HOST:PORT or ipc://PATH",
    "--router tcp://1.2.3.4:7000": "--router tcp://1.2.3.4:7000 needs --keys DIR",
    "--router ipc://r --model demo": "--model is for a cluster that main.py starts itself",
    "--batch-sice 3": "No such option '--batch-sice'. (Did you mean one of: '--batch-size', ",
    "nonsense": "No such command 'nonsense'.",
    "-b 2 infer": "-b before 'infer' belongs to the job without a command",
    "infer -l 0": "-l 0: at least 1 token must be generated",
    "infer --prompt=": "--prompt is empty; it needs at least one character",
    "infer --router ipc://r --dtype float32": "--dtype is for a cluster that main.py starts itself",
    "convert gone out": "Invalid value for 'FOLDER': Path 'gone' does not exist.",
    "convert two.txt out": "two.txt is not a folder: name the one",
    "keys .": ". is not empty: keys are never overwritten",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_before_any_work(line, folder, capsys, monkeypatch):
    monkeypatch.setattr(baton.offline.run, "link_to", None)  # nothing may be started
    code, said = refused(capsys, *line.split())
    assert said.startswith(BAD[line]) or BAD[line] in said
    assert code == 2
    assert os.listdir(folder) == ["two.txt"]


def test_an_empty_stop_string_is_refused(folder, capsys):
    code, said = refused(capsys, "--stop", "")
    assert (code, said) == (2, "a --stop string must have 1 to 256 characters, got 0")


def test_a_prompt_that_is_too_long_is_named_with_its_size_and_the_limit(folder, capsys):
    (folder / "long.txt").write_text("short\n" + "word " * 3000 + "\n")
    code, said = refused(capsys, "--prompts", "long.txt", "-l", "4")
    assert code == 2
    assert said.startswith("prompt 2 of 2: the prompt has ")
    assert "the context is 2,304" in said


def test_a_model_that_is_not_there_is_exit_code_3(folder, capsys):
    code, said = refused(capsys, "--model", "demmo")
    assert code == 3
    assert "there is no model 'demmo'" in said
    assert "did you mean demo?" in said


def test_a_router_that_does_not_answer_is_exit_code_4(folder, capsys, monkeypatch):
    monkeypatch.setattr("baton.client.blocking.ANSWER_S", 0.1)
    (folder / "sockets").mkdir(mode=0o700)
    code, said = refused(capsys, "--router", f"ipc://{folder}/sockets/r.sock")
    assert code == 4
    assert "no router answers at ipc://" in said


def test_a_prompts_file_broken_by_editing_is_told(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "prompts", raising=False)
    (folder / "prompts.py").write_text('PROMPTS = [\n  "one,\n]\n')
    monkeypatch.syspath_prepend(str(folder))
    code, said = refused(capsys, "-l", "5")
    assert code == 2
    assert said.startswith("prompts.py, line 2: unterminated string literal")
    monkeypatch.delitem(sys.modules, "prompts", raising=False)


def test_options_that_do_nothing_are_said_to(folder, capsys, monkeypatch):
    pretend(monkeypatch)
    code, _, err = run(capsys, "--prompts", "two.txt", "-l", "3", "--greedy", "--top-k", "5")
    assert code == 0
    assert "--top-k has no effect: decoding is greedy" in err


# ---- what is done


CALM = "=== 1/2 ===\nOnce upon\n Onc0 Onc1 Onc2\n\n=== 2/2 ===\nThe end\n The0 The1 The2\n\n"
JOB = ("--prompts", "two.txt", "-l", "3", "-o", "out.txt")


def test_the_job_writes_the_file_and_says_where_the_time_went(folder, capsys, monkeypatch):
    router = pretend(monkeypatch)
    code, out, err = run(capsys, *JOB, "--seed", "7", "--stop", "X", "--ignore-eos")
    assert (code, out) == (0, "")
    assert (folder / "out.txt").read_text() == CALM
    assert sorted(os.listdir(folder)) == ["out.txt", "two.txt"]
    for word in ("machine ", "pretend, float32", "KV path   shared memory, written in place",
                 "hand-over", "ITL", "tokens", "bounds this job", "first token after",
                 "2 answers are in out.txt"):  # fmt: skip
        assert word in err
    first = router.submitted[0]
    params = first.params
    assert (params.max_new_tokens, params.stop, params.ignore_eos) == (3, ("X",), True)
    assert first.params.sampling is not None
    assert first.params.sampling.seed == 7


def test_quiet_is_quiet(folder, capsys, monkeypatch):
    pretend(monkeypatch)
    assert run(capsys, *JOB, "--quiet") == (0, "", "")


def test_jsonl_compares_and_has_timings_only_when_asked_for(folder, capsys, monkeypatch):
    pretend(monkeypatch)
    assert run(capsys, *JOB, "--format", "jsonl")[0] == 0
    lines = [json.loads(line) for line in (folder / "out.txt").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert lines[1] == {
        "index": 1,
        "prompt": "The end",
        "text": "".join(words_of("The end", 3)),
        "token_ids": [0, 1, 2],
        "finish_reason": "length",
    }
    assert run(capsys, *JOB, "--format", "jsonl", "--timings")[0] == 0
    timed = json.loads((folder / "out.txt").read_text().splitlines()[0])["timings"]
    assert {"queue_s", "prefill_s", "decode_s", "total_s", "prompt_tokens"} <= timed.keys()


def interrupted_after(turns):
    count = iter(range(turns))

    def before_turn(router):
        if next(count, None) is None:
            raise Interrupted("SIGINT")

    return before_turn


def test_an_interrupted_job_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    pretend(monkeypatch, PretendRouter(before_turn=interrupted_after(8)))
    code, _, err = run(capsys, *JOB, "-b", "1")
    assert code == 130
    assert err.splitlines()[-1] == (
        "interrupted: 1 of 2 answers are safe in out.txt.part; run the same command again to do "
        "the rest"
    )
    assert not (folder / "out.txt").exists()
    router = pretend(monkeypatch)
    code, _, err = run(capsys, *JOB, "--format", "txt", "-b", "3")
    assert code == 0
    assert "resuming: 1 of 2 done" in err
    assert [each.prompt for each in router.submitted] == ["The end"]
    assert (folder / "out.txt").read_text() == CALM
    assert sorted(os.listdir(folder)) == ["out.txt", "two.txt"]


def test_another_length_is_another_job(folder, capsys, monkeypatch):
    pretend(monkeypatch, PretendRouter(before_turn=interrupted_after(8)))
    run(capsys, *JOB, "-b", "1")
    pretend(monkeypatch)
    code, _, err = run(capsys, *JOB, "-l", "2")
    assert code == 0
    assert "starting afresh" in err


def test_an_interrupt_before_the_first_answer_leaves_nothing(folder, capsys, monkeypatch):
    pretend(monkeypatch, PretendRouter(before_turn=interrupted_after(1)))
    code, _, err = run(capsys, *JOB)
    assert code == 130
    assert "nothing was finished yet" in err.splitlines()[-1]
    assert os.listdir(folder) == ["two.txt"]


def test_a_failed_request_is_named_and_the_others_are_safe(folder, capsys, monkeypatch):
    lost = Failed("", "worker_lost", "3 workers died while this request was on them")
    pretend(monkeypatch, PretendRouter(fail={"The end": lost}))
    code, _, err = run(capsys, *JOB)
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: 1 of 2 requests failed, so no output was written: prompt 2 (worker_lost: 3 workers "
        "died while this request was on them). 1 of 2 answers are safe in out.txt.part; run the "
        "same command again to try the rest"
    )
    assert not (folder / "out.txt").exists()
    assert (folder / "out.txt.part").exists()


def test_requests_that_were_wrong_from_the_start_are_exit_code_2(folder, capsys, monkeypatch):
    wrong = Failed("", "context_length_exceeded", "too long")
    pretend(monkeypatch, PretendRouter(fail={"The end": wrong}))
    assert run(capsys, *JOB)[0] == 2


def test_what_the_supervisor_says_is_shown(folder, capsys, monkeypatch):
    supervisor = PretendSupervisor(notices=["decode-0 died (signal 9) and is started again"])
    pretend(monkeypatch, supervisor=supervisor)
    assert "decode-0 died (signal 9)" in run(capsys, *JOB)[2]


def test_a_finished_journal_needs_no_cluster(folder, capsys, monkeypatch):
    pretend(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(baton.offline.run, "write_whole", raise_interrupted)
        assert run(capsys, *JOB)[0] == 130
    monkeypatch.setattr(baton.offline.run, "link_to", None)
    code, _, err = run(capsys, *JOB)
    assert code == 0
    assert "resuming: 2 of 2 done" in err
    assert (folder / "out.txt").read_text() == CALM


def raise_interrupted(*args, **kwargs):
    raise Interrupted("SIGTERM")


def test_a_router_is_sent_no_more_requests_than_b(folder, capsys, monkeypatch):
    router = pretend(monkeypatch)
    (folder / "keys").mkdir()
    assert run(capsys, *JOB, "-b", "1", "--router", "tcp://h:1", "--keys", "keys")[0] == 0
    assert router.most_running == 1


def test_a_length_beyond_a_running_clusters_context_is_refused(folder, capsys, monkeypatch):
    pretend(monkeypatch)
    code, _, err = run(capsys, *JOB, "-l", "64", "--router", "ipc://r")
    assert code == 2
    assert "-l 64 does not fit: the context of pretend is 64 tokens" in err


def test_infer_prints_the_text_and_what_is_slower(capsys, monkeypatch):
    router = pretend(monkeypatch)
    code, out, err = run(capsys, "infer", "-l", "3")
    assert (code, err) == (0, "")
    for word in ("machine ", "Explain why batching improves GPU utilization. Exp0 Exp1 Exp2",
                 "prefill", "is slower for a token", "tokens/s", "first token after"):  # fmt: skip
        assert word in out
    assert router.submitted[0].params.sampling is not None
    assert router.submitted[0].params.sampling.temperature == 0


# ---- around it


def test_help_shows_every_section_and_default(capsys):
    code, out, _ = run(capsys, "-h")
    assert code == 0
    for word in ("The job:", "Sampling:", "Processes and devices:", "A running cluster instead:",
                 "Commands:", "Examples:", "[default: 100]", "[default: test.txt]", "infer",
                 "doctor", "keys", "convert"):  # fmt: skip
        assert word in out
    options = main.cli.params
    assert all(option.show_default for option in options if option.name != "version")
    assert run(capsys, "infer", "--help")[0] == 0


def test_the_version_is_the_projects(capsys):
    assert run(capsys, "--version") == (0, "baton 0.2.0\n", "")


def test_keys_makes_them_and_says_what_each_is_for(folder, capsys):
    code, out, _ = run(capsys, "keys", "k")
    assert code == 0
    assert sorted(os.listdir("k")) == [
        "member.public",
        "member.secret",
        "router.public",
        "router.secret",
    ]
    for word in ("router.secret", "member.secret", "python -m router --address tcp://", "--keys k"):
        assert word in out


def test_the_doctor_says_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setattr("baton.cli.doctor.ASK_TORCH", "print('cpu', 'a processor')")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("baton", "0.2.0", "python", "torch 2", "machine", "a processor", "/dev/shm",
                 "open files", "compiler", "memfd works", "port", "demo: GPT2LMHeadModel"):  # fmt: skip
        assert word in out


def test_a_torch_that_does_not_start_does_not_stop_the_doctor(capsys, monkeypatch):
    monkeypatch.setattr("baton.cli.doctor.ASK_TORCH", "raise SystemExit(1)")
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "torch does not start" in out


LIGHT = """
import sys, main
code = main.main(sys.argv[1:])
heavy = {"torch", "transformers", "numpy", "rich"} & {name.partition(".")[0] for name in sys.modules}
raise SystemExit(f"loaded {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-l", "9999"], 2),
        (["--model", "x"], 3),
        (["keys", "."], 2),
        (["convert", "gone", "out"], 2),
        (["bench", "--help"], 0),
    ],
)
def test_answers_that_need_no_model_load_no_torch(arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert done.returncode == code, done.stderr


def test_import_baton_loads_nothing_and_has_generate():
    code = (
        "import sys, baton; assert 'baton.api' not in sys.modules; from baton import generate;"
        "assert callable(generate); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE_S)


def test_a_closed_stderr_stops_nothing(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), "-l", "9999"],
        stderr=None,
        stdout=subprocess.PIPE,
        cwd=folder,
        preexec_fn=lambda: os.close(2),
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2


SECOND = """
import os, signal
from baton.offline import interrupts
try:
    with interrupts.turned_into_exceptions():
        os.kill(os.getpid(), signal.{first})
except interrupts.Interrupted as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    print(interrupt)
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_second_signal_changes_nothing(first):
    done = subprocess.run(
        [sys.executable, "-c", SECOND.format(first=first)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr, done.returncode) == (f"{first}\n", "", 0)


HELD = """
import os, signal
from baton.offline import interrupts
try:
    with interrupts.turned_into_exceptions():
        with interrupts.held_back():
            with interrupts.held_back():
                os.kill(os.getpid(), signal.SIGTERM)
            print("block")
        print("never")
except interrupts.Interrupted as interrupt:
    print(interrupt)
"""


def test_the_command_puts_back_the_callers_signal_handlers(capsys, monkeypatch):
    monkeypatch.undo()
    before = [signal.getsignal(each) for each in interrupts.SIGNALS]
    for arguments in (["--version"], ["-b", "0"]):
        main.main(arguments)
        assert [signal.getsignal(each) for each in interrupts.SIGNALS] == before


def test_a_signal_held_back_comes_after_the_block():
    done = subprocess.run(
        [sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.stdout, done.stderr) == ("block\nSIGTERM\n", "")


def test_a_job_does_not_write_what_it_reads(capsys, tmp_path, monkeypatch):
    """Without --prompts that is prompts.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("In the future")
    given = ("--prompts", "mine.txt", "-o", "mine.txt")
    text = "-o mine.txt would replace the prompts in mine.txt: choose another name for the output"
    assert refused(capsys, *given) == (2, text)
    own = str(ROOT / "prompts.py")
    assert refused(capsys, "-o", own)[1].startswith(f"-o {own} would replace the prompts in {own}")
    given = ("--prompts", "mine.txt", "-o", "a", "--trace-file", "a")
    text = "--trace-file a and -o a are one file: choose another name"
    assert refused(capsys, *given) == (2, text)
