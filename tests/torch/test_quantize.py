"""`python main.py quantize`: what it writes is the rounding that it says, and is served."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from baton.cli.main import cli
from baton.engine.loading import load_model
from baton.errors import InputError, ModelError
from baton.model_files import resolve_model
from baton.models.formats import checkpoint
from baton.models.quantize import _chosen, chooses, quantize_model
from baton.quantized.weights import full_weights
from tests.torch.catalog import tiny_config
from tests.torch.families import make_model, save_model
from tests.torch.gguf_files import Kind, Written, write_gguf
from tests.torch.quantized_files import saved

CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    return load_model(resolve_model(str(folder)), CPU, torch.float32).state_dict()


def quantized_names(folder: Path) -> set[str]:
    plan = resolve_model(str(folder)).quantized
    assert plan is not None
    return {each.name for each in plan.weights if each.scheme}


def check_rounded(found: torch.Tensor, weight: torch.Tensor, bits: int, group: int) -> None:
    """Every number is the nearest of its group's: whole multiples of a scale that the largest sets."""
    columns = weight.shape[1] if group == -1 else group
    rows, original = (each.reshape(-1, columns).double() for each in (found, weight))
    most = 1 << (bits - 1)
    scales = original.abs().amax(1, keepdim=True) / (most - 0.5)
    numbers = rows / scales
    assert (numbers - numbers.round()).abs().max() < 1e-4
    assert -most <= numbers.round().min() <= numbers.round().max() <= most - 1
    assert ((rows - original).abs() <= scales * 0.5001).all()
    assert not torch.equal(found, weight)


@pytest.mark.parametrize(
    ("bits", "group", "used"), [(4, None, 32), (4, 16, 16), (8, -1, -1)], ids=str
)
def test_each_weight_is_rounded_to_the_nearest(
    tmp_path: Path, bits: int, group: int | None, used: int
) -> None:
    source, out = saved("qwen2", tmp_path / "source"), tmp_path / "out"
    said = quantize_model(str(source), out, bits, group)
    groups = "a scale for each row" if used == -1 else f"groups of {used}"
    assert said.startswith(f"14 matrices of {source} are in {out} with {bits} bits ({groups}; ")
    found, before = weights_of(out), weights_of(source)
    assert found.keys() == before.keys()
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            check_rounded(found[name], weight, bits, used)
        else:
            assert torch.equal(found[name], weight), name


def test_what_chooses_experts_and_the_output_keep_their_width(tmp_path: Path) -> None:
    source, out = saved("mixtral", tmp_path / "source"), tmp_path / "out"
    quantize_model(str(source), out, 8, None)
    names = quantized_names(out)
    assert len([each for each in names if ".experts." in each]) == 2 * 4 * 3
    assert len([each for each in names if "self_attn" in each]) == 2 * 4
    assert len(names) == 2 * 4 * 3 + 2 * 4
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in told["ignore"]
    weights_of(out)


@pytest.mark.parametrize(
    ("name", "does"),
    [
        ("model.layers.0.mlp.gate.weight", True),
        ("model.layers.0.mlp.gate.wg.weight", True),
        ("model.layers.0.router.proj.weight", True),  # gemma4_text
        ("transformer.blocks.0.ffn.router.layer.weight", True),  # dbrx
        ("model.layers.0.mlp.router.layer.weight", True),  # jetmoe
        ("model.layers.0.mlp.router.classifier.weight", True),  # longcat_flash
        ("model.layers.0.mlp.router_gate.weight", True),  # doge
        ("model.layers.0.mlp.shared_expert_gate.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.mlp.experts.0.gate_up_proj.weight", False),
    ],
)
def test_what_chooses_experts_is_known_by_its_name(name: str, does: bool) -> None:
    assert chooses(name) is does


@pytest.mark.parametrize(
    "family", ["dbrx", "jetmoe", "longcat_flash", "gemma4_text", "doge", "zaya", "hunyuan_v1_moe"]
)
def test_nothing_with_a_row_for_each_expert_is_quantized(family: str) -> None:
    config = tiny_config(family)
    moe = {"gemma4_text": "enable_moe_block", "doge": "is_moe"}
    if family in moe:
        setattr(config, moe[family], True)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    sizes = {name: tuple(each.shape) for name, each in shape.named_parameters()}
    chosen = _chosen(shape, sizes)
    routers = [name for name in sizes if "rout" in name or ".gate." in name]
    assert routers
    assert chosen
    assert not chosen.keys() & set(routers)
    experts = 4
    assert family == "doge" or not [name for name, size in chosen.items() if size[0] == experts]


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_a_large_model_is_written_in_several_files(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's matrices are transposed, phi3's are joined; both lie in more than one file."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20_000)
    source, out = saved(family, tmp_path / "source"), tmp_path / "out"
    quantize_model(str(source), out, 8, 16)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    found, before = weights_of(out), weights_of(source)
    assert quantized_names(out)
    for name, weight in before.items():
        if name in quantized_names(out):
            check_rounded(found[name], weight, 8, 16)
        else:
            assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F32, "F32"), (Kind.Q8_0, "F16")])
def test_a_gguf_file_is_quantized(tmp_path: Path, kind: Kind, dtype: str) -> None:
    """What it holds in blocks has no more than the 16 bits of its scales."""
    out = tmp_path / "out"
    write_gguf(tmp_path / "model.gguf", "llama", Written(kinds=(kind,)))
    quantize_model(str(tmp_path / "model.gguf"), out, 4, 16)
    plan = resolve_model(str(out)).quantized
    assert plan is not None
    stored = {each.name: each.parts["values"].dtype for each in plan.weights}
    assert stored["model.embed_tokens.weight"] == dtype
    found = dict(full_weights(plan, torch.float32))
    for name, weight in weights_of(tmp_path / "model.gguf").items():
        blocks = dtype == "F16" and weight.ndim > 1
        original = weight.half().float() if blocks else weight
        if name in quantized_names(out):
            if dtype == "F32":
                check_rounded(found[name], original, 4, 16)
        else:
            assert torch.equal(found[name].float(), original), name


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    """A group of zeros has no scale; in bfloat16 it must not become NaN."""
    model = make_model("llama", attention="eager").to(torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    source = save_model(model, tmp_path / "source")
    quantize_model(str(source), tmp_path / "out", 4, 32)
    assert not weights_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].any()


def test_what_cannot_be_quantized_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "source"), tmp_path / "out"

    def refusal(name: str, *, to: Path = out, group: int | None = None) -> str:
        with pytest.raises((InputError, ModelError)) as caught:
            quantize_model(name, to, 4, group)
        assert sorted(tmp_path.iterdir()) == before
        return str(caught.value)

    before = sorted(tmp_path.iterdir())
    matrix = "model.layers.0.mlp.down_proj.weight"
    wrong = f"--group-size 64 does not divide the 96 columns of {matrix} in {source}: 32 or -1 does"
    assert refusal(str(source), group=64) == wrong
    assert "made up when it is loaded" in refusal("random:gpt2")
    exists = f"{source} exists and is not an empty folder: name a new one"
    assert refusal(str(source), to=source) == exists
    assert refusal(str(source), group=0) == "--group-size must be a number of columns or -1, got 0"
    quantize_model(str(source), out, 4, None)
    before = sorted(tmp_path.iterdir())
    again = f"{out} is quantized already (compressed-tensors): name the model that it was made from"
    assert refusal(str(out), to=tmp_path / "again") == again


def test_the_command(tmp_path: Path) -> None:
    source, out = saved("llama", tmp_path / "source"), tmp_path / "out"
    wrong = CliRunner().invoke(cli, ["quantize", str(source), str(out), "--bits", "3"])
    assert wrong.exit_code == 2
    assert "'3' is not one of '4', '8'" in wrong.output
    done = CliRunner().invoke(cli, ["quantize", str(source), str(out), "--bits", "8"])
    assert done.exit_code == 0, done.output
    assert f"use it with --model {out}" in done.output
