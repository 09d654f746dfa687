"""Which parts of which parameters a rank of a tensor-parallel worker holds, read off shapes alone."""

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.errors import BatonError, InputError, ModelError
from baton.kv.layout import KVLayout, LayerShape
from baton.parallel.boot import check_parts
from baton.parallel.plan import OURS, Cut, Plan, plan_sharding
from tests.torch.catalog import tiny_config
from tests.torch.families import COMMON, FAMILIES

COLUMN, ROW = Cut(0), Cut(1)
LLAMA = {
    "self_attn.q_proj.weight": COLUMN,
    "self_attn.k_proj.weight": COLUMN,
    "self_attn.v_proj.weight": COLUMN,
    "self_attn.o_proj.weight": ROW,
    "mlp.gate_proj.weight": COLUMN,
    "mlp.up_proj.weight": COLUMN,
    "mlp.down_proj.weight": ROW,
}
BIASES = {f"self_attn.{each}_proj.bias": Cut(0) for each in "qkv"}
ATTENTION = {name: cut for name, cut in LLAMA.items() if "attn" in name}
EXPERTS = {"mlp.experts.gate_up_proj": Cut(1, 2), "mlp.experts.down_proj": Cut(2)}
GPT2 = {
    "attn.c_attn.weight": Cut(1, 3),
    "attn.c_attn.bias": Cut(0, 3),
    "attn.c_proj.weight": Cut(0),
    "mlp.c_fc.weight": Cut(1),
    "mlp.c_fc.bias": Cut(0),
    "mlp.c_proj.weight": Cut(0),
}
NEOX = {
    "attention.query_key_value.weight": COLUMN,
    "attention.query_key_value.bias": Cut(0),
    "attention.dense.weight": ROW,
    "mlp.dense_h_to_4h.weight": COLUMN,
    "mlp.dense_h_to_4h.bias": Cut(0),
    "mlp.dense_4h_to_h.weight": ROW,
}
CUTS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA | BIASES,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "mixtral": ATTENTION | EXPERTS,
    "qwen3_moe": ATTENTION | EXPERTS,
    "gpt_neox": NEOX,
    "gpt2": GPT2,
}


def shape(family: str, **fields: Any) -> Any:
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def planned(family: str, ranks: int = 2, **fields: Any) -> tuple[Any, Plan]:
    model = shape(family, **fields)
    return model, plan_sharding(model, ranks, family)


@pytest.mark.parametrize("family", CUTS)
def test_heads_and_inner_features_are_cut_and_all_else_is_whole(family: str) -> None:
    model, plan = planned(family)
    layers = model.config.get_text_config().num_hidden_layers
    in_layers = {n: cut for n, cut in plan.cuts.items() if not n.startswith("lm_head")}
    numberless = {re.sub(r"^.*?\.\d+\.", "", name): cut for name, cut in in_layers.items()}
    assert numberless == CUTS[family]
    assert len(in_layers) == layers * len(numberless)
    assert {name for name, _ in model.named_parameters()} >= plan.cuts.keys() | plan.once


@pytest.mark.parametrize("family", CUTS)
def test_the_parts_of_all_ranks_are_the_whole(family: str) -> None:
    model, plan = planned(family)
    parameters = dict(model.named_parameters())
    for name, cut in plan.cuts.items():
        whole = torch.arange(parameters[name].numel()).view(parameters[name].shape)
        parts = [cut.take(whole, rank, 2) for rank in range(2)]
        assert sum(part.numel() for part in parts) == whole.numel()
        assert torch.cat([part.flatten() for part in parts]).unique().numel() == whole.numel()
        assert all(part.shape == parts[0].shape for part in parts)


def test_a_packed_matrix_is_cut_in_each_of_its_matrices() -> None:
    whole = torch.arange(12).view(1, 12)
    assert Cut(1, 3).take(whole, 1, 2).tolist() == [[2, 3, 6, 7, 10, 11]]
    assert Cut(1).take(whole, 1, 2).tolist() == [[6, 7, 8, 9, 10, 11]]


def test_what_is_added_and_joined() -> None:
    _, plan = planned("gpt_neox")
    assert plan.sums == [
        *(f"gpt_neox.layers.{i}.attention.dense" for i in range(2)),
        *(f"gpt_neox.layers.{i}.mlp.dense_4h_to_h" for i in range(2)),
    ]
    assert plan.once == {f"{name}.bias" for name in plan.sums}
    assert plan.fewer == [f"gpt_neox.layers.{i}.attention" for i in range(2)]
    _, plan = planned("mixtral")
    assert "model.layers.1.mlp.experts" in plan.sums


def test_an_lm_head_is_cut_where_it_is_no_embedding_and_can_be() -> None:
    assert planned("llama")[1].joined == ["lm_head"]
    assert planned("llama", tie_word_embeddings=True)[1].joined == []
    assert planned("llama", vocab_size=321)[1].joined == []


@pytest.mark.parametrize(
    ("family", "ranks", "fields", "said"),
    [
        ("llama", 4, {}, r"^llama has 2 KV heads .* among 4 ranks: .* can be 2$"),
        ("llama", 3, {}, r"can be 2$"),
        ("llama", 2, {"num_key_value_heads": 1}, r"^llama has 1 KV heads .* can be only 1$"),
        ("llama", 8, {"num_key_value_heads": 4}, r"can be 2, 4$"),
        ("llama", 4, {"num_key_value_heads": 4, "intermediate_size": 90}, r"can be 2$"),
        ("gpt2", 3, {}, r"^gpt2 has 4 KV heads .* can be 2, 4$"),
    ],
)
def test_what_cannot_be_divided_so_names_what_can(
    family: str, ranks: int, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        planned(family, ranks, **fields)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("stablelm", "no tensor-parallel plan for stablelm"),
        ("opt", "no tensor-parallel plan for opt"),
        ("phi3", "leaves attention whole on every rank"),
        ("deepseek_v3", "leaves attention whole on every rank"),
    ],
)
def test_what_cannot_be_divided_at_all_is_refused_by_name(family: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"^{family} cannot be divided: .*{said}.*; serve it"):
        planned(family)


def test_a_style_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OURS, "llama", {"layers.*.self_attn.q_proj": "sideways"})
    with pytest.raises(ModelError, match="uses sideways, which is not known here"):
        planned("llama")


PLANNED = (
    "smollm3",
    "starcoder2",
    "olmo",
    "granite",
    "glm4",
    "seed_oss",
    "phi",
    "qwen2_moe",
    "minimax",
)
NOT_PLANNED = ("afmoe", "hunyuan_v1_dense", "falcon", "gpt_oss", "olmo2", "minicpm3")


@pytest.mark.parametrize("family", [*PLANNED, *NOT_PLANNED])
def test_every_family_is_planned_or_refused_in_one_line(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    refused = ""
    try:
        plan_sharding(model, 2, family)
    except BatonError as error:
        refused = str(error)
    assert (refused == "") == (family in PLANNED)
    assert refused == "" or refused.startswith(f"{family} cannot be divided: ")
    assert "\n" not in refused


def test_each_rank_must_have_its_share_of_the_kv_heads() -> None:
    whole = KVLayout((LayerShape(4, 8, 8), LayerShape(2, 8, 8)), 16, "float32")
    check_parts("m", whole, KVLayout((LayerShape(2, 8, 8), LayerShape(1, 8, 8)), 16, "float32"), 2)
    with pytest.raises(ModelError, match="layer 1 has 2 KV heads, and 2 on each of 2 ranks"):
        check_parts(
            "m", whole, KVLayout((LayerShape(2, 8, 8), LayerShape(2, 8, 8)), 16, "float32"), 2
        )
