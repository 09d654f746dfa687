"""An error of transformers is told in terms of the config.json that caused it."""

from pathlib import Path

import pytest

from baton.checkpoints.mistakes import not_loaded, wrong_entry

ABOVE_0 = "but must be a whole number above 0"
DIVISION = ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"n_head": 0}, DIVISION, f"n_head in config.json is 0, {ABOVE_0}"),
        ({"head_dim": -1}, RuntimeError("negative"), f"head_dim in config.json is -1, {ABOVE_0}"),
        ({"hidden_size": 1.5}, TypeError("x"), f"hidden_size in config.json is 1.5, {ABOVE_0}"),
        ({"n_layer": True}, TypeError("x"), f"n_layer in config.json is True, {ABOVE_0}"),
        (
            {"text_config": {"model_type": "gemma3_text", "num_key_value_heads": 0}},
            DIVISION,
            f"num_key_value_heads in config.json is 0, {ABOVE_0}",
        ),
        (
            {"hidden_act": "sillu", "model_type": "llama"},
            KeyError("sillu"),
            "hidden_act in config.json is 'sillu', which transformers does not know",
        ),
        (
            {"bos_token_id": 0, "attn_pdrop": 0.0, "scalar": 0, "use_cache": False},
            DIVISION,
            "division by zero; config.json has 0 for scalar",
        ),
    ],
)
def test_the_entry_is_named(config: dict[str, object], error: Exception, says: str) -> None:
    assert wrong_entry(config, error) == says


@pytest.mark.parametrize("dtype", ["float17", "torch.foo", "", 16, [], {}])
def test_no_dtype(dtype: object) -> None:
    said = wrong_entry({"torch_dtype": dtype}, AttributeError("no such attribute"))
    assert said is not None
    assert said.startswith(f"torch_dtype in config.json is {dtype!r}, but must be one of auto, ")


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", "auto", None])
@pytest.mark.parametrize("error", [KeyError("gone"), KeyError(), DIVISION, OSError(5, "I/O error")])
def test_what_the_configuration_does_not_explain_keeps_its_words(
    dtype: str | None, error: Exception
) -> None:
    config = {"dtype": dtype, "num_key_value_heads": None, "bos_token_id": 0, "hidden_act": "silu"}
    assert wrong_entry(config, error) is None


def test_a_long_value_is_cut() -> None:
    said = wrong_entry({"hidden_act": "y" * 100_000}, KeyError("y" * 100_000))
    assert said is not None
    assert len(said) < 200


def test_a_folder_is_named_once() -> None:
    error = OSError(5, "I/O error")
    assert str(not_loaded("/m", Path("/m"), {}, error)) == "/m cannot be loaded: I/O error"
    assert str(not_loaded("a", Path("/m"), {}, error)) == "a cannot be loaded from /m: I/O error"
