"""Any change to the JSON files of a model is a clean load, or one line of ours: nothing else gets out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from baton.engine.loading import load_model
from baton.engine.selftest import in_torch
from baton.errors import BatonError, ModelError, OutOfMemory
from baton.grammar import Grammars
from baton.model_files import resolve_model
from baton.text import Tokenizer
from router.admission import Served
from tests.torch.families import save_checkpoint

CPU = torch.device("cpu")
FILES = ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json")
EXAMPLES = (Phase.explicit, Phase.generate)  # a failure shows the whole change: nothing to shrink
DEEP: Any = 1
for _ in range(200):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, False, "", "x", "bfloat16", [], {}, [None], {"a": 1}, [[1, 2], {"x": None}]),
    *(-1, 0, 1, 2, 3, 1.5, -1e308, 1e308, float("nan"), float("inf")),
    *(10**6, 2**31, 2**63, 10**30, "y" * 100_000, ["z"] * 10_000, DEEP),
)
EXTRA = (
    *("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "text_config", "dtype"),
    *("torch_dtype", "quantization_config", "auto_map", "architectures", "model_type", "head_dim"),
    *("n_positions", "is_encoder_decoder", "transformers_weights", "experts_implementation"),
    *(
        "attn_implementation",
        "_attn_implementation",
        "id2label",
        "num_labels",
        "use_cache",
        "top_k",
    ),
    *("temperature", "top_p", "eos_token_id", "chat_template", "bos_token", "model_max_length"),
)


def places(found: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, the first few of each array."""
    inner = found.items() if isinstance(found, dict) else enumerate(found[:3])
    for key, value in inner:
        yield (*above, key)
        if isinstance(value, dict | list) and len(above) < 3:
            yield from places(value, (*above, key))


def changed(found: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with one value replaced; dropped if it is `...`."""
    if not path:
        return value
    copied = dict(found) if isinstance(found, dict) else list(found)
    key, *rest = path
    if rest:
        copied[key] = changed(copied[key], tuple(rest), value)
    elif value is ...:
        del copied[key]
    else:
        copied[key] = value
    return copied


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_checkpoint("llama", tmp_path_factory.mktemp("fuzz") / "model")
    (made / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": "{{ messages }}", "eos_token": "<|end|>", "model_max_length": 64}
        )
    )
    return made


class Originals(dict[str, Any]):
    """The documents by file; short in the report of a failure."""

    def __repr__(self) -> str:
        return "the files of the folder"


@pytest.fixture(scope="module")
def originals(folder: Path) -> Originals:
    return Originals({name: json.loads((folder / name).read_text()) for name in FILES})


def loads(folder: Path) -> BatonError | None:
    """All that a start does with a folder, without compiling."""
    try:
        files = resolve_model(str(folder))
        Served.of(files, None)
        Tokenizer(files.tokenizer_file).encode("the relay")
        Grammars(files.tokenizer_file, files.vocab_size, files.eos_token_ids)
        in_torch(load_model(files, CPU, torch.float32), torch.float32, 16)
    except BatonError as error:
        return error
    return None


@settings(max_examples=60, phases=EXAMPLES)
@given(data=st.data())
def test_a_change_is_a_clean_load_or_one_line(
    data: st.DataObject, folder: Path, originals: Originals
) -> None:
    name = data.draw(st.sampled_from(FILES))
    document = originals[name]
    known = [*places(document)]
    added = [(key,) for key in EXTRA]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([(), *known, *added]))
        value = data.draw(st.sampled_from([..., *ODD]))
        try:
            document = changed(document, path, value)
        except (KeyError, IndexError, TypeError):  # the first change took away where this one leads
            continue
    text = "" if document is ... else json.dumps(document)
    (folder / name).write_text(text)
    try:
        error = loads(folder)
    finally:
        (folder / name).write_text(json.dumps(originals[name]))
    if error is not None:
        assert isinstance(error, ModelError | OutOfMemory)
        assert "\n" not in str(error)
        assert len(str(error)) < 1500


@settings(max_examples=30, phases=EXAMPLES)
@given(data=st.binary(max_size=40), at=st.integers(0, 2000), name=st.sampled_from(FILES))
def test_damage_is_a_clean_load_or_one_line(
    data: bytes, at: int, name: str, folder: Path, originals: Originals
) -> None:
    whole = json.dumps(originals[name]).encode()
    (folder / name).write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        error = loads(folder)
    finally:
        (folder / name).write_bytes(whole)
    assert error is None or (type(error) is ModelError and "\n" not in str(error))


def test_the_folder_itself_is_a_clean_load(folder: Path) -> None:
    assert loads(folder) is None
