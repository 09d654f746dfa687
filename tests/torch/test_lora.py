"""LoRA adapters: tokens are those of the merged model, whoever shares the batch and the cluster."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from baton import LLM
from baton.adapters.changes import Entry
from baton.adapters.files import read_adapter
from baton.engine.boot import Engine, boot
from baton.engine.lora.base import Base
from baton.engine.lora.runner import LoraRunner
from baton.engine.lora.weights import read_products
from baton.engine.pool import Pool
from baton.engine.probe import discover_layout
from baton.engine.runner import Runner
from baton.errors import InputError, ModelError
from baton.kv.row import Logits, Row
from baton.local import LocalCluster, LocalOptions
from baton.model_files import resolve_model
from baton.params import GenerationParams
from baton.wire.messages import Emitted, Failed, Finished, Message, Submit
from sampler.params import SamplingParams
from tests.patience import until
from tests.torch.families import make_model, save_model
from tests.torch.lora_files import Written, continued, linears, merged, write_adapter

LENGTH = 12
SHARED = [(7 * i + 3) % 200 + 1 for i in range(40)]
"""A prompt of more than two KV blocks, asked of every adapter."""


@dataclass(frozen=True)
class Here:
    """A base model's folder and its adapters; None is the base model itself."""

    base: Path
    adapters: dict[str, Written]

    @property
    def lora(self) -> tuple[str, ...]:
        return tuple(f"{name}={each.folder}" for name, each in self.adapters.items())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Here:
    folder = tmp_path_factory.mktemp("lora")
    model = make_model("llama")
    base = save_model(model, folder / "base")
    attention = linears(model, ".*(q|v)_proj")
    every = linears(model)
    return Here(
        base,
        {
            "attention": write_adapter(folder / "attention", model, attention, seed=1),
            "every": write_adapter(
                *(folder / "every", model, every),
                seed=2,
                target_modules="all-linear",
                use_rslora=True,
                rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 16},
                alpha_pattern={"^model.layers.0.self_attn.o_proj": 3},
            ),
            "wide": write_adapter(
                *(folder / "wide", model, linears(model, r".*\.1\..*(o|up)_proj")),
                seed=3,
                r=256,
                target_modules=r".*\.layers\.1\..*(o|up)_proj",
            ),
        },
    )


@pytest.fixture(scope="module")
def cluster(here: Here) -> Iterator[LocalCluster]:
    options = LocalOptions(
        *(str(here.base), "cpu", "float32"),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        lora=here.lora,
    )
    with closing(LocalCluster(options)) as found:
        yield found


@pytest.fixture(scope="module")
def right(here: Here) -> dict[str, list[int]]:
    """What each merged model says to the shared prompt; "" is the base model."""
    models = {"": merged(here.base, None)}
    models |= {name: merged(here.base, each) for name, each in here.adapters.items()}
    return {name: continued(model, SHARED, LENGTH) for name, model in models.items()}


def submit(cluster: LocalCluster, request: str, adapter: str, prompt: list[int]) -> Submit:
    digests = {"": ""} | {each.name: each.digest for each in cluster.info().adapters}
    sampling = SamplingParams(temperature=0)
    params = GenerationParams(LENGTH, sampling, ignore_eos=True, adapter=digests[adapter])
    return Submit(request, tuple(prompt), params)


def answered(cluster: LocalCluster, *submits: Submit) -> dict[str, tuple[list[int], Finished]]:
    """Tokens and end of each, all of them submitted at once."""
    cluster.submit(*submits)
    found: list[Message] = []
    while sum(isinstance(each, Finished | Failed) for each in found) < len(submits):
        found += cluster.poll(1.0)
    assert not [each for each in found if isinstance(each, Failed)]
    tokens: dict[str, list[int]] = {each.request: [] for each in submits}
    for each in found:
        if isinstance(each, Emitted):
            tokens[each.request] += each.token_ids
    ends = {each.request: each for each in found if isinstance(each, Finished)}
    return {name: (ids, ends[name]) for name, ids in tokens.items()}


def test_tokens_are_those_of_the_merged_model_alone_and_in_a_mixed_batch(
    cluster: LocalCluster, right: dict[str, list[int]]
) -> None:
    assert len({tuple(each) for each in right.values()}) == 4, (
        "adapters that change nothing show nothing"
    )
    for name, tokens in right.items():
        alone = answered(cluster, submit(cluster, f"alone-{name}", name, SHARED))
        assert alone[f"alone-{name}"][0] == tokens
    names = [*right, *reversed(right)]
    mixed = [submit(cluster, f"mixed-{i}", name, SHARED) for i, name in enumerate(names)]
    found = answered(cluster, *mixed)
    assert [found[f"mixed-{i}"][0] for i in range(len(names))] == [right[name] for name in names]


def test_a_prefix_belongs_to_one_adapter(cluster: LocalCluster, here: Here) -> None:
    prompt = [*reversed(SHARED)]
    seen: dict[str, tuple[int, int]] = {}
    for name in ("", *here.adapters):
        first, second = (f"{name}-{turn}" for turn in ("first", "second"))
        before = answered(cluster, submit(cluster, first, name, prompt))[first]
        after = answered(cluster, submit(cluster, second, name, prompt))[second]
        assert before[0] == after[0]
        seen[name] = before[1].timings.cached_tokens, after[1].timings.cached_tokens
    assert seen == dict.fromkeys(seen, (0, 32))


def test_an_adapter_that_is_not_here_is_refused(cluster: LocalCluster) -> None:
    params = GenerationParams(LENGTH, adapter="0" * 32)
    cluster.submit(Submit("unknown", (1, 2), params))
    (failed,) = cluster.poll(1.0)
    assert isinstance(failed, Failed)
    assert failed.code == "model_not_found"
    assert "adapter 000000000000 is not loaded here, but attention (" in failed.message


def test_embeddings_are_those_of_the_merged_model(cluster: LocalCluster, here: Here) -> None:
    asked = replace(submit(cluster, "embedded", "every", SHARED), pooling="mean")
    plain = replace(submit(cluster, "plain", "", SHARED), pooling="mean")
    ends = answered(cluster, asked, plain)
    for name, adapter in (("embedded", here.adapters["every"]), ("plain", None)):
        model = merged(here.base, adapter)
        with torch.inference_mode():
            states = model.base_model(torch.tensor([SHARED])).last_hidden_state[0].mean(dim=0)
        ours = torch.frombuffer(bytearray(ends[name][1].embedding), dtype=torch.float32)
        torch.testing.assert_close(ours, states / states.norm(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "family", ["gpt2", "gemma2", "phi3", "gpt_neox", "mixtral", "deepseek_v3", "opt"]
)
def test_logits_are_those_of_the_merged_model_in_every_family(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    base = save_model(model, tmp_path / "base")
    names = linears(model)
    if not model.config.get_text_config().tie_word_embeddings:
        names += [name for name, _ in model.named_modules() if name in ("lm_head", "embed_out")]
    one = write_adapter(tmp_path / "one", model, names, seed=1)
    two = write_adapter(tmp_path / "two", model, names[1:2], seed=2, target_modules=names[1:2])
    files = resolve_model(str(base)).with_lora([f"one={one.folder}", f"two={two.folder}"])
    engine = boot(files, device="cpu", dtype="float32", block_size=16)
    digests = {each.name: each.digest for each in files.adapters}
    ids = [list(range(3, 20)), list(range(40, 45)), list(range(9, 16))]
    rows = [
        Row(ids[0], 0, [0, 1], Logits.ALL, adapter=digests["one"]),
        Row(ids[1], 0, [2], Logits.LAST, adapter=digests["two"]),
        Row(ids[2], 0, [3], Logits.LAST),
        Row(ids[1], 0, [4], Logits.LAST, adapter=digests["one"]),
    ]
    pool = Pool.private(engine.layout, 5, engine.device)
    with torch.inference_mode():
        wanted = [
            merged(base, adapter)(torch.tensor([ids[which]])).logits[0, first:]
            for adapter, which, first in ((one, 0, 0), (two, 1, -1), (None, 2, -1), (one, 1, -1))
        ]
    torch.testing.assert_close(
        engine.runner.run(pool, rows), torch.cat(wanted), atol=2e-3, rtol=1e-3
    )


Q = "model.layers.0.self_attn.q_proj"


def lacking(folder: Path, model: PreTrainedModel) -> None:
    write_adapter(folder, model, [Q], target_modules=["q_proj", "k_proj"])


def foreign(folder: Path, model: PreTrainedModel) -> None:
    other = make_model("gpt2")
    write_adapter(folder, other, linears(other)[:1])


def narrow(folder: Path, model: PreTrainedModel) -> None:
    changed(folder, model, **{f"{Q}.lora_A.weight": torch.zeros(4, 63)})


def infinite(folder: Path, model: PreTrainedModel) -> None:
    changed(folder, model, **{f"{Q}.lora_B.weight": torch.full((64, 4), torch.inf)})


def embedded(folder: Path, model: PreTrainedModel) -> None:
    changed(folder, model, **{"model.embed_tokens.weight": torch.zeros(320, 64)})


def unknown(folder: Path, model: PreTrainedModel) -> None:
    changed(folder, model, **{f"{Q}.lora_magnitude_vector": torch.zeros(64)})


def packed(folder: Path, model: PreTrainedModel) -> None:
    """Four bits a number: half of the bytes."""
    changed(folder, model)
    about, end = {}, 0
    for key, shape in (("A", [4, 64]), ("B", [64, 4])):
        begin, end = end, end + 128
        about[f"base_model.model.{Q}.lora_{key}.weight"] = {
            "dtype": "F4", "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    header = json.dumps(about).encode()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


def embedding(folder: Path, model: PreTrainedModel) -> None:
    other = make_model("llama")
    other.model.embed_tokens = torch.nn.Linear(64, 320)
    write_adapter(folder, other, ["model.embed_tokens"], target_modules=["embed_tokens"])


def tied(folder: Path, model: PreTrainedModel) -> None:
    write_adapter(folder, model, ["lm_head"])
    model.lm_head.weight = model.model.embed_tokens.weight


def changed(folder: Path, model: PreTrainedModel, **tensors: torch.Tensor) -> None:
    """An adapter of one linear, with other tensors, or more."""
    file = (
        write_adapter(folder, model, [Q], target_modules=[Q]).folder / "adapter_model.safetensors"
    )
    found = load_file(file) | {f"base_model.model.{key}": each for key, each in tensors.items()}
    save_file(found, file)


ODD = {
    lacking: "target_modules name model.layers.0.self_attn.k_proj, and its file holds nothing for it",
    foreign: "the model has no module transformer.h.0.attn.c_attn; it was trained for another one",
    narrow: f"for {Q} it maps 63 numbers to 64, and the model 64 to 64; it was trained for another one",
    infinite: f"its matrices of {Q} hold numbers that are not finite; fetch it again",
    embedded: "it replaces the model's model.embed_tokens.weight, by its training or because",
    unknown: "lora_magnitude_vector, which is neither part of a product nor a weight of the model",
    packed: "holds numbers of the type 'F4'; save it in float32, bfloat16 or float16",
    embedding: "it changes the embedding model.embed_tokens, and only linears can be",
    tied: "lm_head is also the model's embedding (they are tied)",
}


@pytest.mark.parametrize("write", ODD)
def test_what_does_not_fit_the_model_is_refused_by_name(
    write: Callable[[Path, PreTrainedModel], None], tmp_path: Path
) -> None:
    model = make_model("llama")
    write(tmp_path / "odd", model)
    with pytest.raises(ModelError) as refused:
        read_products(read_adapter("odd", tmp_path / "odd"), Base.of(model))
    assert str(refused.value).startswith("adapter odd ")
    assert ODD[write] in str(refused.value)


def test_an_adapter_that_is_written_anew_while_it_is_loaded_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    found, other = (
        read_adapter(
            "a", write_adapter(tmp_path / name, model, [Q], seed=seed, target_modules=[Q]).folder
        )
        for name, seed in (("one", 1), ("two", 2))
    )
    other.weights.replace(found.weights)
    with pytest.raises(ModelError, match=r"^adapter a: .* was changed while it was loaded"):
        read_products(found, Base.of(model))


def test_a_linear_that_no_forward_calls_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.spare = torch.nn.Linear(64, 64, bias=False)
    both = [Q, "model.spare"]
    written = write_adapter(tmp_path / "idle", model, both, target_modules=both)
    products = read_products(read_adapter("idle", written.folder), Base.of(model))
    runner = LoraRunner(Runner(model), {"11": products})
    with pytest.raises(ModelError, match=r"^adapter idle .* does not run model\.spare as a linear"):
        runner.prove(discover_layout(model, 16, torch.float32), {"11": ("idle", products)})


def test_a_linear_of_an_expert_is_refused_by_name(tmp_path: Path) -> None:
    """It is given only some tokens; their number may be that of a whole forward by chance."""
    model = make_model("llama")
    model.model.experts = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False)])
    model.model.experts[0].up = torch.nn.Linear(64, 64, bias=False)
    expert = [Q, "model.experts.0.up"]
    written = write_adapter(tmp_path / "expert", model, expert, target_modules=expert)
    products = read_products(read_adapter("expert", written.folder), Base.of(model))
    runner = LoraRunner(Runner(model), {"11": products})
    with pytest.raises(
        ModelError, match=r"^adapter expert .*model\.experts\.0\.up belongs to an exp"
    ):
        runner.prove(discover_layout(model, 16, torch.float32), {"11": ("expert", products)})


def test_weights_of_other_widths_are_refused(here: Here) -> None:
    files = resolve_model(str(here.base)).with_lora(here.lora)
    for dtype in ("int8", "fp8"):
        with pytest.raises(InputError, match="--lora does not work with --dtype int8, "):
            boot(files, device="cpu", dtype=dtype, block_size=16)


# ---- adapters that come and go


def updating(here: Here, *own: str) -> Engine:
    """A model beside which adapters come from the folder of these ones."""
    lora = [f"{name}={here.adapters[name].folder}" for name in own]
    files = resolve_model(str(here.base)).with_lora(lora, str(here.base.parent))
    return boot(files, device="cpu", dtype="float32", block_size=16)


def entry_of(name: str, folder: Path) -> Entry:
    return Entry(read_adapter(name, folder).adapter, folder.name)


def put(engine: Engine, entry: Entry) -> None:
    assert engine.shelf is not None
    reading = engine.shelf.read(entry)
    until(lambda: reading.done, "the adapter")
    reading.add()


def greedy_of(engine: Engine, *adapters: str) -> list[int | None]:
    """The token after the shared prompt with each of these, in one batch."""
    pool = Pool.private(engine.layout, 3 * len(adapters), engine.device)
    blocks = [list(range(3 * i, 3 * i + 3)) for i in range(len(adapters))]
    rows = [
        Row(SHARED, 0, mine, Logits.LAST, adapter=digest)
        for mine, digest in zip(blocks, adapters, strict=True)
    ]
    return engine.runner.greedy(pool, rows)


def test_adapters_come_beside_a_packed_model_and_leave_nothing_behind(
    here: Here, right: dict[str, list[int]]
) -> None:
    engine = updating(here, "attention")
    entries = {n: entry_of(n, each.folder) for n, each in here.adapters.items()}
    attention, every, wide = (entries[n].adapter.digest for n in ("attention", "every", "wide"))
    first = {name: tokens[0] for name, tokens in right.items()}
    put(engine, entries["every"])
    put(engine, entries["wide"])
    found = greedy_of(engine, "", attention, every, wide)
    assert found == [first[n] for n in ("", "attention", "every", "wide")]
    shelf = engine.shelf
    assert shelf is not None
    for digest in (every, attention, wide):
        shelf.drop(digest)
    runner = engine.runner
    assert isinstance(runner, LoraRunner)
    assert (runner._products, runner._hooks, runner._known) == ({}, {}, set())
    assert greedy_of(engine, "") == [first[""]]
    put(engine, entries["attention"])  # one of --lora comes back
    assert greedy_of(engine, attention) == [first["attention"]]


def test_one_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    here: Here, tmp_path: Path
) -> None:
    engine = updating(here)
    root = here.base.parent
    model = make_model("llama")
    lacking(root / "lacking", model)
    infinite(root / "infinite", model)
    huge = write_adapter(root / "huge", model, [Q], target_modules=[Q], lora_alpha=10**9)
    file = huge.folder / "adapter_model.safetensors"
    save_file({key: each * 1e20 for key, each in load_file(file).items()}, file)
    for name, why in (
        ("lacking", "and its file holds nothing for it"),
        ("infinite", "hold numbers that are not finite"),
        ("huge", "with it logits are not finite"),
    ):
        entry = entry_of(name, root / name)
        with pytest.raises(ModelError, match=why):
            put(engine, entry)
    file.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"^huge/adapter_model\.safetensors is broken"):
        put(engine, entry)
    assert isinstance(engine.runner, LoraRunner)
    assert (engine.runner._products, engine.runner._known) == ({}, set())


def test_a_copy_of_the_head_is_compared_with_the_one_that_is_packed(tmp_path: Path) -> None:
    """peft writes the head beside an adapter of it."""
    model = make_model("llama")
    base = save_model(model, tmp_path / "base")
    head = write_adapter(tmp_path / "head", model, ["lm_head"], target_modules=["lm_head"])
    files = resolve_model(str(base)).with_lora((), str(tmp_path))
    engine = boot(files, device="cpu", dtype="float32", block_size=16)
    put(engine, entry_of("head", head.folder))
    file = head.folder / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(file)
    tensors[name][3, 5] += 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"replaces the model's lm_head\.weight"):
        put(engine, entry_of("head", head.folder))


def test_without_the_option_a_model_has_no_shelf(here: Here) -> None:
    files = resolve_model(str(here.base)).with_lora(here.lora)
    assert boot(files, device="cpu", dtype="float32", block_size=16).shelf is None
    for dtype in ("int8", "fp8"):
        with pytest.raises(InputError, match="--allow-lora-updates does not work with --dtype"):
            boot(
                resolve_model(str(here.base)).with_lora((), str(here.base)),
                device="cpu", dtype=dtype, block_size=16,
            )  # fmt: skip


# ---- from Python


def test_each_prompt_of_a_call_chooses_its_adapter(here: Here, right: dict[str, list[int]]) -> None:
    greedy = SamplingParams(temperature=0)
    folders = {name: each.folder for name, each in here.adapters.items()}
    with LLM(str(here.base), device="cpu", dtype="float32", max_num_seqs=4, lora=folders) as llm:
        assert llm.model.adapters == ("attention", "every", "wide")
        how = {"max_new_tokens": LENGTH, "ignore_eos": True}
        mixed = llm.generate([SHARED, SHARED], greedy, lora=["every", None], **how)
        assert [list(each.token_ids) for each in mixed] == [right["every"], right[""]]
        one = llm.generate([SHARED], greedy, lora="wide", **how)
        assert list(one[0].token_ids) == right["wide"]
        with pytest.raises(
            InputError, match="no adapter 'law' here; there are: attention, every, w"
        ):
            llm.generate([SHARED], lora="law")
        with pytest.raises(InputError, match="lora names 1 adapters for 2 prompts"):
            llm.generate([SHARED, SHARED], lora=["wide"])


def test_adapters_of_an_llm_that_cannot_be_are_refused_by_name(here: Here) -> None:
    with pytest.raises(InputError, match="lora must be names without = and their folders"):
        LLM(str(here.base), lora={"a=b": "x"})
    with pytest.raises(InputError, match="lora must be a mapping of names to folders"):
        LLM(str(here.base), lora=["x"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a running cluster has adapters of its own"):
        LLM(router="ipc:///nowhere", lora={"a": "x"})
