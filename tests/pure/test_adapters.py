"""Adapters' folders: what is read as peft reads it, and what is refused, by its name, in one line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from baton.adapters.config import MERGE, Share, read_spec
from baton.adapters.files import (
    absolute_lora,
    read_adapter,
    read_weights,
    resolve_adapters,
    split_lora,
)
from baton.adapters.identity import Adapter, unknown
from baton.cli.main import main
from baton.cluster.options import ClusterOptions
from baton.engine.lora.groups import grouped, span
from baton.errors import InputError, ModelError
from baton.kv.prefix import root
from baton.kv.row import Logits, Row
from baton.offline.run_batch import facts_of
from baton.topology import Topology
from router.__main__ import _served

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "init_lora_weights": True, "use_dora": False, "qalora_group_size": 16, "task_type": "CAUSAL_LM",
    "megatron_core": "megatron.core", "auto_mapping": {"base_model_class": "X"}, "lora_dropout": 0.1,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
SHAPES = {
    f"base_model.model.{Q}.lora_A.weight": [4, 8],
    f"base_model.model.{Q}.lora_B.weight": [6, 4],
}


def safetensors(shapes: Mapping[str, list[int]]) -> bytes:
    """A file of float32 zeros."""
    about, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        about[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def write(folder: Path, shapes: Mapping[str, list[int]] = SHAPES, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(shapes))
    return folder


def test_a_folder_is_read(tmp_path: Path) -> None:
    found = read_adapter("sql", write(tmp_path))
    assert (found.adapter.name, found.linears, found.copies) == ("sql", (Q,), ())
    assert found.spec.share(Q) == Share(4, 2.0)


def test_equal_content_has_an_equal_digest_wherever_it_lies(tmp_path: Path) -> None:
    here = read_adapter("a", write(tmp_path / "here")).adapter
    moved = write(tmp_path / "moved", base_model_name_or_path="elsewhere", lora_dropout=0.0)
    assert read_adapter("b", moved).adapter.digest == here.digest
    for changes in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}):
        other = write(tmp_path / "other", **changes)
        assert read_adapter("a", other).adapter.digest != here.digest
    trained = write(tmp_path / "trained")
    weights = trained / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert read_adapter("a", trained).adapter.digest != here.digest


def test_numbers_that_are_not_those_of_the_digest_are_not_loaded(tmp_path: Path) -> None:
    found = read_adapter("sql", write(tmp_path))
    content = found.weights.read_bytes()
    assert read_weights(found) == content
    for other in (content[:-1] + b"\1", content[:-1], b""):
        found.weights.write_bytes(other)
        with pytest.raises(
            ModelError, match=r"^adapter sql: .*was changed while it was loaded; start again$"
        ):
            read_weights(found)


@pytest.mark.parametrize(
    ("config", "module", "share"),
    [
        ({}, Q, Share(4, 2.0)),
        ({"use_rslora": True}, Q, Share(4, 8 / sqrt(4))),
        ({"rank_pattern": {"q_proj": 2}}, Q, Share(2, 4.0)),
        ({"rank_pattern": {"proj": 2}}, Q, Share(4, 2.0)),
        ({"rank_pattern": {".*proj": 2}}, Q, Share(2, 4.0)),
        ({"rank_pattern": {r"layers\.1\..*": 2, r"layers\.0\.self_attn\.q_proj": 1}}, Q, Share(1, 8.0)),
        ({"alpha_pattern": {f"^{Q}": 1, "q_proj": 3}}, Q, Share(4, 0.25)),
        ({"alpha_pattern": {"q_proj": 3, f"^{Q}": 1}}, Q, Share(4, 0.75)),
        ({"alpha_pattern": {"^q_proj": 3}}, Q, Share(4, 2.0)),
    ],
)  # fmt: skip
def test_rank_and_scale_are_those_of_peft(
    config: dict[str, Any], module: str, share: Share
) -> None:
    assert read_spec("a", CONFIG | config).share(module) == share


LINEARS = (
    "model.layers.0.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.q_proj",
    "model.layers.11.q_proj", "lm_head",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "targeted"),
    [
        ({}, (0, 2, 3)),
        ({"target_modules": "all-linear"}, (0, 1, 2, 3)),
        ({"target_modules": ["lm_head", "up_proj"]}, (1, 4)),
        ({"target_modules": ["proj", "head"]}, ()),
        ({"target_modules": r".*\.1\.q_proj"}, (2,)),
        ({"target_modules": "q_proj"}, ()),
        ({"layers_to_transform": 1}, (2,)),
        ({"layers_to_transform": [0, 11]}, (0, 3)),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, (2,)),
        ({"layers_to_transform": [1], "layers_pattern": ["blocks", "h"]}, ()),
        ({"layers_to_transform": [1], "layers_pattern": "(layers|h)"}, (2,)),
        ({"layers_to_transform": [1], "layers_pattern": "layers|h"}, (2,)),
        ({"layers_to_transform": [1], "layers_pattern": ["(h)", "(layer)s"]}, (2,)),
        ({"exclude_modules": ["layers.1.q_proj"]}, (0, 3)),
        ({"exclude_modules": r".*\.11\..*", "target_modules": "all-linear"}, (0, 1, 2)),
    ],
)
def test_linears_are_targeted_as_by_peft(config: dict[str, Any], targeted: tuple[int, ...]) -> None:
    found = read_spec("a", CONFIG | config).targeted(LINEARS, ["lm_head"])
    assert found == [LINEARS[each] for each in targeted]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', and only LORA is"),
        ({"peft_type": None}, "its peft_type is None"),
        ({"use_dora": True}, "it is a DoRA adapter, which scales whole weights (use_dora)"),
        ({"bias": "lora_only"}, "it also changes biases (bias is 'lora_only')"),
        ({"lora_bias": True}, "its B matrices have a bias (lora_bias)"),
        ({"modules_to_save": ["lm_head"]}, "whole modules beside its products (modules_to_save)"),
        ({"trainable_token_indices": [1]}, "it holds embeddings of tokens"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "such as those of experts"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "it repeats layers of the model"),
        ({"alora_invocation_tokens": [3]}, "(alora_invocation_tokens)"),
        ({"new_in_peft_9": {"x": 1}}, "'new_in_peft_9' in adapter_config.json is not known here"),
    ],
)
def test_what_is_more_than_a_product_is_refused_by_name(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError) as refused:
        read_spec("sql", CONFIG | config)
    text = str(refused.value)
    assert text.startswith("adapter sql cannot be served: ")
    assert why in text
    assert text.endswith(MERGE)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"r": 257}, "r in adapter_config.json must be a rank of 1 to 256, got 257"),
        ({"r": 0}, "must be a rank of 1 to 256, got 0"),
        ({"r": True}, "must be a rank of 1 to 256, got True"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern in adapter_config.json must be a rank"),
        ({"rank_pattern": [1]}, "rank_pattern in adapter_config.json must be an object"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern in adapter_config.json has the pattern '(', which"),
        ({"lora_alpha": None}, "must be a number of at most 1,000,000,000, got None"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "has the pattern '(?i)q_proj', which cannot be read"),
        ({"alpha_pattern": {"(?i)q_proj": 4}}, "has the pattern '(?i)q_proj', which cannot be read"),
        ({"layers_pattern": "(?i)layers"}, "has the pattern '(?i)layers', which cannot be read"),
        ({"layers_pattern": ["(?i)layers"]}, "has the pattern '(?i)layers', which cannot be read"),
        ({"lora_alpha": float("nan")}, "must be a number of at most 1,000,000,000, got nan"),
        ({"lora_alpha": 10**400}, "must be a number of at most 1,000,000,000, got 1000000"),
        ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern in adapter_config.json must be a num"),
        ({"target_modules": "*"}, "target_modules in adapter_config.json has the pattern '*', which"),
        ({"target_modules": None}, "target_modules in adapter_config.json names no linear"),
        ({"target_modules": {"q": 1}}, "must be a text or a list of texts"),
        ({"layers_to_transform": "0"}, "layers_to_transform in adapter_config.json must be numbers"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the model's own weights"),
        ({"init_lora_weights": "OLoRA"}, "path_initial_model_for_weight_conversion"),
    ],
)  # fmt: skip
def test_a_configuration_that_says_nonsense_is_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError) as refused:
        read_spec("sql", CONFIG | config)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


A_ONLY = {key: shape for key, shape in SHAPES.items() if "lora_A" in key}
EMBEDDED = {"base_model.model.model.embed_tokens.lora_embedding_A": [4, 9]}


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        (A_ONLY, f"adapter sql is incomplete: of {Q} it has one matrix and lacks the other"),
        (SHAPES | EMBEDDED, "it changes an embedding (model.embed_tokens.lora_embedding_A)"),
        ({"transformer.q.lora_A.weight": [4, 8]}, "has no name that peft gives"),
        ({"base_model.model.lm_head.weight": [4, 8]}, "adapter sql changes nothing"),
        ({key: [*reversed(shape)] for key, shape in SHAPES.items()}, "its rank there is 4"),
    ],
)
def test_a_file_without_products_is_refused(
    tmp_path: Path, shapes: dict[str, list[int]], why: str
) -> None:
    with pytest.raises(ModelError) as refused:
        read_adapter("sql", write(tmp_path, shapes))
    assert why in str(refused.value)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"nowhere is not a folder; it must hold adapter_config\.json"
    ):
        read_adapter("sql", tmp_path / "nowhere")
    with pytest.raises(
        ModelError, match=r"not an adapter's folder: adapter_config\.json is missing"
    ):
        read_adapter("sql", tmp_path)
    folder = write(tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"holds adapter_model\.bin, a pickle"):
        read_adapter("sql", folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        read_adapter("sql", folder)
    cut = write(tmp_path / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-7])
    with pytest.raises(ModelError, match="its header says"):
        read_adapter("sql", cut.parent)


def test_a_router_refuses_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    """Before a worker loads: it is started first."""
    with pytest.raises(
        ModelError, match=r"is not an adapter's folder: adapter_config\.json is missing"
    ):
        _served("demo", None, [f"sql={tmp_path}"])


def test_the_option_names_an_adapter_and_its_folder(tmp_path: Path) -> None:
    assert split_lora("sql=a=b") == ("sql", "a=b")
    for wrong in ("sql", "sql=", "=folder", "", "s\nql=x", f"{'x' * 257}=y"):
        with pytest.raises(InputError, match="--lora must be NAME=FOLDER"):
            split_lora(wrong)
    folder = write(tmp_path / "sql")
    both = [f"b={folder}", f"a={folder}"]
    assert [each.adapter.name for each in resolve_adapters(both, "demo")] == ["a", "b"]
    with pytest.raises(InputError, match="--lora a is given twice"):
        resolve_adapters([f"a={folder}"] * 2, "demo")
    with pytest.raises(InputError, match="--lora a has the model's own name"):
        resolve_adapters([f"a={folder}"], "a")


def test_the_option_reaches_router_and_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), 4, lora=("a=one", "b=/two"))
    wanted = ["--lora", f"a={tmp_path}/one", "--lora", "b=/two"]
    for process in ("router", "prefill", "decode"):
        arguments = options.arguments(process)
        first = arguments.index("--lora")
        assert arguments[first : first + 4] == wanted
    assert absolute_lora("a=~/x") == f"a={Path.home()}/x"
    for ranks in ({"tensor_parallel_size": 2}, {"prefill_tensor_parallel_size": 2}):
        with pytest.raises(InputError, match="--lora does not work with --tensor-parallel-size 2"):
            ClusterOptions("demo", Topology(("cpu",), ("cpu",)), 4, lora=("a=one",), **ranks)


def test_commands_whose_requests_name_no_model_refuse_the_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command, why in (
        (["infer", "--lora", "a=b"], "--lora is for serve and run-batch"),
        (["--lora", "a=b", "--lora", "c=d"], "a job runs all its prompts with one adapter"),
        (["--allow-lora-updates", "."], "--allow-lora-updates is for serve: leave it out here"),
        (["infer", "--allow-lora-updates", "."], "--allow-lora-updates is for serve"),
    ):
        assert main(command) == 2
        assert why in capsys.readouterr().err


def test_a_batch_is_not_resumed_with_an_adapter_of_other_content(tmp_path: Path) -> None:
    source, folder = tmp_path / "in.jsonl", write(tmp_path / "sql")
    source.write_text("{}")
    options = ClusterOptions("demo", Topology(("cpu",), ("cpu",)), 4, lora=(f"sql={folder}",))
    before = facts_of(options, source)
    assert facts_of(options, source) == before
    write(folder, lora_alpha=9)
    assert facts_of(options, source) != before
    assert "lora" not in facts_of(replace(options, lora=()), source)


def test_an_order_for_an_unknown_adapter_names_those_that_are_here() -> None:
    here = (Adapter("law", "22" * 16), Adapter("sql", "11" * 16))
    assert not unknown("", here)
    assert not unknown("11" * 16, here)
    assert unknown("33" * 16, here) == (
        "adapter 333333333333 is not loaded here, but law (222222222222), sql (111111111111)"
    )
    assert unknown("33" * 16, ()).endswith("is not loaded here, but no adapters")


def test_rows_are_grouped_by_adapter_wherever_they_stand() -> None:
    rows = [
        Row([1, 2, 3], 0, [0], Logits.LAST, adapter="sql"),
        Row([4], 9, [1], Logits.LAST),
        Row([5, 6], 3, [2], Logits.ALL, adapter="law"),
        Row([7, 8], 0, [3], adapter="law"),
        Row([9], 7, [4], Logits.LAST, adapter="sql"),
    ]
    found = grouped(rows)
    assert (found.tokens, found.logits) == (9, 5)
    assert [(each.adapter, each.tokens, each.logits) for each in found.groups] == [
        ("sql", [0, 1, 2, 8], [0, 4]),
        ("law", [4, 5, 6, 7], [2, 3]),
    ]
    assert grouped([Row([1], 0, [0])]).groups == ()
    assert [span(each) for each in ([], [4], [4, 5, 6], [4, 6], [0, 1, 3])] == [
        *(slice(0, 0), slice(4, 5), slice(4, 7), None, None)
    ]


def test_the_hash_before_the_first_block_is_one_for_each_salt_and_adapter() -> None:
    salts = ("", "x", "11")
    roots = {root(salt, adapter) for salt in salts for adapter in ("", "11", "22")}
    assert len(roots) == 9
    assert root("x") == root("x", "")
