"""A cluster option is declared once: main.py, the processes and their command lines follow from it."""

from dataclasses import replace
from pathlib import Path

import click
import pytest

import decode_worker.__main__
import prefill_worker.__main__
import router.__main__
from baton.cli.main import cli
from baton.cluster.options import DECLARED, ClusterOptions, Declaration, beside
from baton.errors import InputError
from baton.topology import Topology

COMMANDS = {
    "router": router.__main__.main,
    "prefill": prefill_worker.__main__.main,
    "decode": decode_worker.__main__.main,
}
CHANGED = {
    "dtype": "bfloat16",
    "max_model_len": 100,
    "kv_cache_dtype": "int8",
    "kv_cache_memory_bytes": 1_000_000,
    "block_size": 8,
    "prefix_caching": False,
    "prefill_cache_memory_bytes": 2_000_000,
    "speculative_model": "ngram",
    "num_speculative_tokens": 2,
    "kv_transport": "frames",
    "batch_window_ms": 2.5,
    "max_num_batched_tokens": 64,
    "drain_timeout": 2.5,
    "tensor_parallel_size": 2,
    "prefill_tensor_parallel_size": 2,
    "spare_worker": True,
    "role_policy": "adaptive",
    "slo_ttft": 1.5,
    "slo_itl": 0.05,
    "lora": ("sql=/adapters/sql", "law=/adapters/law"),
    "allow_lora_updates": str(Path(__file__).resolve().parent),
    "max_loras": 5,
}
OPTIONS = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), batch_size=4)


def test_every_declared_option_is_tried_here() -> None:
    assert CHANGED.keys() == {each.name for each in DECLARED}


def parsed(command: click.Command, arguments: list[str]) -> dict[str, object]:
    return command.make_context("x", arguments).params


@pytest.mark.parametrize("declared", DECLARED, ids=lambda each: each.name)
def test_main_and_the_processes_take_it_with_the_same_default(declared: Declaration) -> None:
    assert parsed(cli, [])[declared.name] == declared.default
    for process, command in COMMANDS.items():
        required = ["--address" if process == "router" else "--router", "ipc://r"]
        found = parsed(command, required)
        assert (declared.name in found) == (process in declared.processes)
        assert found.get(declared.name, declared.default) == declared.default


@pytest.mark.parametrize("declared", DECLARED, ids=lambda each: each.name)
def test_a_value_reaches_the_processes_that_take_it_and_no_other(declared: Declaration) -> None:
    value = CHANGED[declared.name]
    options = replace(OPTIONS, **{declared.name: value})
    for process, command in COMMANDS.items():
        arguments = options.arguments(process)
        required = ["--address" if process == "router" else "--router", "ipc://r"]
        found = parsed(command, [*required, *arguments])
        if process in declared.processes:
            assert found[declared.name] == value
        else:
            assert arguments == OPTIONS.arguments(process)


def test_the_roles_may_differ_in_their_ranks() -> None:
    options = replace(OPTIONS, tensor_parallel_size=4, prefill_tensor_parallel_size=1)
    assert "--tensor-parallel-size" not in options.worker_arguments("prefill")
    assert options.worker_arguments("decode")[-2:] == ["--tensor-parallel-size", "4"]
    assert replace(options, prefill_tensor_parallel_size=None).ranks("prefill") == 4


def test_a_worker_shares_every_gpu_that_its_ranks_use() -> None:
    """Decode takes cuda:1 and cuda:2; prefill workers start at cuda:0 to cuda:3."""
    prefills = tuple(f"cuda:{i}" for i in range(4))
    options = replace(OPTIONS, topology=Topology(prefills, ("cuda:1",)), tensor_parallel_size=2)
    assert beside(options, "cuda:1") == ["--beside", "3", "0"]
    single = replace(options, prefill_tensor_parallel_size=1)
    assert beside(single, "cuda:1") == ["--beside", "2", "0"]


def test_a_relative_folder_reaches_processes_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run in another working folder. Every option that takes any text is tried, new ones too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    text = [each for each in DECLARED if each.type is None and each.switch is None]
    free = [each for each in text if not each.multiple]  # else: test_adapters.py
    assert [each.name for each in text if each.multiple] == ["lora"]
    assert [each.name for each in free] == ["speculative_model", "allow_lora_updates"]
    options = replace(OPTIONS, model="given", **{each.name: "given" for each in free})
    absolute = str(tmp_path / "given")
    assert options.arguments("router")[:2] == ["--model", absolute]
    for each in free:
        for process in each.processes:
            required = ["--address" if process == "router" else "--router", "ipc://r"]
            found = parsed(COMMANDS[process], [*required, *options.arguments(process)])
            assert found[each.name] == absolute


def test_a_name_is_not_taken_for_a_folder_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "ngram"):
        (tmp_path / name).mkdir()
    options = replace(OPTIONS, speculative_model="ngram")
    assert (options.model, options.speculative_model) == ("demo", "ngram")


def test_a_narrow_kv_cache_is_refused_for_several_ranks() -> None:
    with pytest.raises(InputError, match="--kv-cache-dtype int8 and --tensor-parallel-size 2"):
        replace(OPTIONS, kv_cache_dtype="int8", prefill_tensor_parallel_size=2)
