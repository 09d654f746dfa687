"""LLM over processes, its own or those of a running cluster: same calls, same tokens."""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import baton.client.blocking
from baton import LLM, SamplingParams
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import InputError, ProtocolError, RequestError
from baton.topology import plan_topology
from tests.cluster.processes import ROOT, shared_memory, short_folder
from tests.patience import PATIENCE_S

GREEDY = SamplingParams(temperature=0)
PROMPTS = ["In the future", "Once upon a time", "The river", "A cook"]


@pytest.fixture(scope="module")
def wanted() -> Iterator[list[str]]:
    """What this very process says."""
    with LLM("demo", max_num_seqs=4) as llm:
        yield [each.text for each in llm.generate(PROMPTS, GREEDY, max_new_tokens=24)]


def test_worker_processes_say_the_same_and_end_with_the_llm(
    wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = shared_memory()
    with short_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with LLM("demo", num_prefill=1, num_decode=2, device="cpu", max_num_seqs=4) as llm:
            assert len(llm.model.workers) >= 2  # the third may still be loading
            texts = [each.text for each in llm.generate(PROMPTS, GREEDY, max_new_tokens=24)]
            assert texts == wanted
            assert "".join(llm.stream(PROMPTS[0], GREEDY, max_new_tokens=24)) == wanted[0]
            with pytest.raises(
                RequestError, match=r"prompts\[0\]: the prompt has .* context is 2,304"
            ):
                llm.generate(["a", "b"], max_new_tokens=9_999)
        assert list(Path(folder).iterdir()) == []
    assert shared_memory() == shared


def test_a_running_cluster_says_the_same_and_outlives_the_llm(wanted: list[str]) -> None:
    topology = plan_topology(colocated=True)
    with Cluster(ClusterOptions(model="demo", topology=topology, batch_size=4)) as cluster:
        for model in (None, "demo"):
            with LLM(model, router=cluster.address) as llm:
                texts = [each.text for each in llm.generate(PROMPTS, GREEDY, max_new_tokens=24)]
                assert texts == wanted
                llm._tokenizer = None  # as where the model's files are not at hand
                assert llm.generate(PROMPTS[0], GREEDY, max_new_tokens=24).text == wanted[0]
                with pytest.raises(RequestError, match=r"prompts\[1\]: the prompt is empty"):
                    llm.generate(["a", ""])
        with pytest.raises(InputError, match="the cluster serves demo, not random:"):
            LLM("random:gpt2", router=cluster.address)
        assert {"router", "decode-0"} <= cluster.running()


def test_where_no_router_answers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baton.client.blocking, "ANSWER_S", 0.3)
    with (
        short_folder() as folder,
        pytest.raises(ProtocolError, match="no router answers at ipc://"),
    ):
        LLM(router=f"ipc://{folder}/router.sock")


EXAMPLES = sorted((ROOT / "examples/python").glob("*.py"))
TYPED = ("cluster", "generate")  # one with processes of its own, one without


@pytest.mark.parametrize("example", [each for each in EXAMPLES if each.stem not in TYPED],
                         ids=lambda path: path.stem)  # fmt: skip
def test_an_example_runs_in_any_process(example: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    said = capfd.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) >= 2


@pytest.mark.parametrize("name", TYPED)
def test_an_example_runs(name: str) -> None:
    """As one would type it in a checkout; where the wheel is installed, without PYTHONPATH."""
    (example,) = [each for each in EXAMPLES if each.stem == name]
    ran = subprocess.run(
        [sys.executable, example],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert len(ran.stdout.splitlines()) >= 2
