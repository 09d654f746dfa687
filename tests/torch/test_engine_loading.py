"""Loading: all weights from the checkpoint, or one line that says which are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from baton.engine.attention import NAME
from baton.engine.loading import load_model
from baton.errors import ModelError, OutOfMemory
from baton.model_files import ModelFiles, resolve_model
from baton.package import ROOT
from tests.patience import PATIENCE_S
from tests.torch.catalog import save_tiny
from tests.torch.families import FAMILIES, make_model, make_tokenizer, save_checkpoint

CPU = torch.device("cpu")
SHAPE = dict(
    model_type="gpt2", vocab_size=320, n_embd=32, n_layer=2, n_head=2, initializer_range=0.02
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_model(str(folder)), CPU, dtype)


def edit_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    weights = {**load_file(folder / "model.safetensors"), **change}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def made_up(name: str = "random:small") -> ModelFiles:
    return ModelFiles(
        name, None, "small", dict(SHAPE), {}, Path(), (), 1024, 320, "", "GPT2LMHeadModel", "gpt2"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_with_our_attention(family: str, tmp_path: Path) -> None:
    model = load(save_checkpoint(family, tmp_path, seed=3))
    assert model.config._attn_implementation == NAME
    assert not model.training
    saved = dict(make_model(family, seed=3).named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, saved[name], rtol=0, atol=0)


def test_a_window_of_0_is_none_where_the_family_says_so(tmp_path: Path) -> None:
    """qwen2_moe makes 0 of any window while use_sliding_window is false."""
    save_tiny("qwen2_moe", tmp_path / "model")
    assert load(tmp_path / "model").config.sliding_window == 0


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = load(save_checkpoint("llama", tmp_path), torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(save_checkpoint("llama", tmp_path), {name: None})
    with pytest.raises(ModelError, match=f"lacks {name}"):
        load(tmp_path)


def test_a_surplus_layer_is_not_dropped(tmp_path: Path) -> None:
    edit_weights(
        save_checkpoint("llama", tmp_path),
        {"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)},
    )
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    edit_weights(save_checkpoint("llama", tmp_path), {"model.norm.weight": torch.zeros(7)})
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_tied_need_not_be_saved(tmp_path: Path) -> None:
    save_checkpoint("gpt2", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_config_that_transformers_does_not_know_is_one_line(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama_of_tomorrow"}))
    with pytest.raises(ModelError, match="llama_of_tomorrow") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_of_another_kind_is_one_line(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(ModelError, match="hidden_size") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.loading.free_memory", lambda device: 1000)
    save_checkpoint("llama", tmp_path)
    with pytest.raises(OutOfMemory, match="does not fit cpu"):
        load(tmp_path)
    with pytest.raises(OutOfMemory, match="are needed"):
        load_model(made_up(), CPU, torch.float32)


def test_made_up_weights_do_not_depend_on_the_global_seed() -> None:
    torch.manual_seed(1)
    one = load_model(made_up(), CPU, torch.float32)
    drawn = torch.rand(3)
    torch.manual_seed(2)
    two = load_model(made_up(), CPU, torch.float32)
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)


def test_made_up_weights_are_spread_as_the_shape_says() -> None:
    model = load_model(made_up(), CPU, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.wte.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.ln_f.weight.eq(1).all()
    assert model.transformer.h[0].mlp.c_fc.bias.eq(0).all()


def test_the_tokenizer_of_the_tests_reads_and_writes_any_text() -> None:
    tokenizer = make_tokenizer()
    text = "The baton, naïve 火 🏃"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_one_and_the_same_made_up_model_in_every_process() -> None:
    code = (
        "import torch; from tests.torch.test_engine_loading import made_up, load_model, CPU\n"
        "model = load_model(made_up(), CPU, torch.float32)\n"
        "print(sum(float(w.double().abs().sum()) for w in model.parameters()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    model = load_model(made_up(), CPU, torch.float32)
    ours = sum(float(weight.double().abs().sum()) for weight in model.parameters())
    assert float(told.stdout.split()[-1]) == pytest.approx(ours, rel=1e-12)
