"""Adapters that come and go while a cluster serves: through HTTP, its router and its workers."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from baton.adapters.below import NoAdapter, path_below, read_below, read_same, updates_folder
from baton.adapters.changes import NONE
from baton.adapters.files import read_adapter
from baton.adapters.identity import Adapter
from baton.cluster.options import ClusterOptions
from baton.errors import InputError, ModelError
from baton.server.options import ServerSettings
from baton.topology import Topology
from baton.wire import messages as msg
from baton.wire.node import ROUTER
from tests.pure.test_adapters import SHAPES, write
from tests.pure.town import Town, calm_answer
from tests.pure.town_app import WordyTown, serving

SQL, LAW = Adapter("sql", "11"), Adapter("law", "22")
PROMPT = range(1, 26)
LENGTH = 6
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def town_of_updates(**options: Any) -> Town:
    town = Town(**{"prefills": 2, "decodes": 2, "adapters": (LAW,), "updates": True} | options)
    town.folders = {SQL.digest}
    town.run(lambda: len(town.router.workers.hellos) == len(town.nodes) - 1)
    return town


def load(town: Town, adapter: Adapter = SQL, request: str = "load") -> None:
    town.client(msg.LoadAdapter(request, adapter, adapter.name))


def loaded(town: Town) -> msg.AdapterChanged:
    load(town)
    town.run(lambda: "load" in town.changed)
    return town.changed["load"]


def held(town: Town) -> list[set[str]]:
    """By the workers that live."""
    return [n._membership.keeper._shelf.holds for name, n in town.nodes.items() if name != ROUTER]


def right(town: Town, request: str, adapter: str) -> None:
    tokens, reason = calm_answer(PROMPT, LENGTH, adapter=adapter)
    assert (town.outcomes[request].tokens, town.outcomes[request].ends) == (tokens, [reason])


def test_one_that_is_loaded_answers_and_its_requests_outlast_its_end() -> None:
    town = town_of_updates()
    town.submit("early", PROMPT, LENGTH, adapter=SQL.digest)
    town.run_all(["early"])
    assert town.outcomes["early"].ends == ["model_not_found"]
    assert loaded(town).code == ""
    assert held(town) == [{"11", "22"}] * 4
    town.submit("a", PROMPT, LENGTH, adapter=SQL.digest)
    for _ in range(3):
        town.turn()
    town.client(msg.UnloadAdapter("unload", "sql"))
    town.run(lambda: "unload" in town.changed)
    assert not town.outcomes["a"].ends
    assert town.infos[-1].adapters == (LAW,)
    town.run_all(["a"])
    right(town, "a", SQL.digest)
    town.run(lambda: held(town) == [{"22"}] * 4)
    town.submit("late", PROMPT, LENGTH, adapter=SQL.digest)
    town.run_all(["late"])
    assert town.outcomes["late"].ends == ["model_not_found"]


def story(town: Town) -> None:
    """A load, requests with it, an unload while they run."""
    load(town)
    town.run(lambda: "load" in town.changed)
    assert town.changed["load"].code == ""
    for name, adapter in (("a", SQL.digest), ("b", LAW.digest), ("c", SQL.digest)):
        town.submit(name, PROMPT, LENGTH, adapter=adapter)
    town.turn()
    town.client(msg.UnloadAdapter("unload", "sql"))
    town.run_all("abc")
    town.run(lambda: "unload" in town.changed)
    town.run(lambda: all(each == {"22"} for each in held(town)))


def messages_of_a_calm_story() -> int:
    town = town_of_updates()
    story(town)
    return town.delivered


CALM_MESSAGES = messages_of_a_calm_story()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_death_before_any_message_of_a_load_and_an_unload_changes_no_token(role: str) -> None:
    for at in range(1, CALM_MESSAGES, 3):
        town = town_of_updates()

        def before(sender: str, receiver: str, message: msg.Message, *, at=at, town=town) -> None:
            if town.delivered == at:
                town.kill(town.workers(role)[0])

        town.before = before
        story(town)
        for name, adapter in (("a", SQL.digest), ("b", LAW.digest), ("c", SQL.digest)):
            right(town, name, adapter)


def test_a_worker_that_is_reset_keeps_what_is_offered() -> None:
    town = town_of_updates(prefills=1, decodes=1)
    assert loaded(town).code == ""
    (name,) = town.workers("decode")
    town.send(ROUTER, town.router._worker_gone(name, town.now, proven_dead=False))
    town.submit("a", PROMPT, LENGTH, adapter=SQL.digest)
    town.run_all("a")
    right(town, "a", SQL.digest)


def test_the_next_router_offers_it_as_soon_as_a_client_or_a_worker_is_there() -> None:
    for tells in ("client", "worker"):
        town = town_of_updates(prefills=1, decodes=1)
        assert loaded(town).code == ""
        known = msg.GetClusterInfo("pretend", town.infos[-1].changes)
        town.kill(ROUTER)
        if tells == "worker":
            town.run(lambda town=town: len(town.router.workers.hellos) == 2)  # type: ignore[misc]
            known = msg.GetClusterInfo()
        told = len(town.infos)
        town.client(known)
        town.run(lambda told=told, town=town: len(town.infos) > told)  # type: ignore[misc]
        assert town.infos[-1].adapters == (LAW, SQL)
        town.submit("a", PROMPT, LENGTH, adapter=SQL.digest)
        town.run_all("a")
        right(town, "a", SQL.digest)
    other = town_of_updates()
    other.client(msg.GetClusterInfo("another model", known.changes or NONE))
    other.turn()
    assert other.router.catalog.changes == NONE


def test_a_cluster_without_the_option_loads_none() -> None:
    town = town_of_updates(updates=False)
    assert "start router and workers with --allow-lora-updates" in loaded(town).why
    town = town_of_updates()
    town.updates = False  # of a worker that comes now
    town.start_worker("decode", 2)
    town.run(lambda: len(town.router.workers.hellos) == 5)
    answer = loaded(town)
    assert answer.code == "invalid_request"
    assert "this worker loads no adapters while it runs: start it with" in answer.why
    assert all(each == {"22"} for each in held_here(town))


def held_here(town: Town) -> list[set[str]]:
    keepers = [n._membership.keeper for name, n in town.nodes.items() if name != ROUTER]
    return [set(each.held) for each in keepers]


# ---- HTTP


def test_the_routes_load_list_and_unload_as_those_of_vllm(tmp_path: Path) -> None:
    folder = write(tmp_path / "teams" / "sql")
    write(tmp_path / "dora", use_dora=True)
    digest = read_adapter("sql", folder).adapter.digest

    async def work() -> None:
        town = WordyTown(updates=True)
        town.folders = {digest}
        async with serving(town, allow_lora_updates=tmp_path.resolve()) as client:
            asked = {"lora_name": "sql", "lora_path": "teams/sql"}
            answer = await client.ask(LOAD, asked)
            assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (
                200,
                "text/plain",
            )
            assert answer.body == b"Success: LoRA adapter 'sql' added successfully."
            listed = (await client.ask("/v1/models")).json["data"]
            assert [(each["id"], each.get("parent")) for each in listed] == [
                ("pretend", None),
                ("sql", "pretend"),
            ]
            texts = set()
            for model in ("pretend", "sql"):
                prompt = {"model": model, "prompt": "In the future", "max_tokens": 6}
                said = await client.ask("/v1/completions", prompt, submits=1)
                texts.add(said.json["choices"][0]["text"])
            assert len(texts) == 2
            for body, status, text in (
                (asked, 400, "an adapter 'sql' is loaded: unload it first"),
                (asked | {"load_inplace": True}, 200, ""),
                (asked | {"lora_name": "pretend"}, 400, "is a name of the model"),
                (asked | {"lora_name": "a\n"}, 400, "printable"),
                ({"lora_name": "b"}, 400, "lora_path"),
                ({"lora_path": "teams/sql"}, 400, "lora_name"),
                (
                    {"lora_name": "b", "lora_path": "nowhere"},
                    404,
                    "there is no folder nowhere with",
                ),
                ({"lora_name": "b", "lora_path": "dora"}, 400, "it is a DoRA adapter"),
                ({"lora_name": "b", "lora_path": "../x"}, 400, "is not below the folder of"),
                ({"lora_name": "b", "lora_path": "/etc"}, 400, "is not below the folder of"),
                (asked | {"is_3d_lora_weight": True}, 400, "is_3d_lora_weight is not supported"),
            ):
                answer = await client.ask(LOAD, body)
                assert answer.status == status, (body, answer.body)
                if text:
                    assert text in answer.json["error"]["message"]
                    assert str(tmp_path) not in answer.json["error"]["message"]
            gone = {"lora_name": "sql"}
            answer = await client.ask(UNLOAD, gone)
            assert answer.body == b"Success: LoRA adapter 'sql' removed successfully."
            assert len((await client.ask("/v1/models")).json["data"]) == 1
            assert (await client.ask(UNLOAD, gone)).status == 404
            assert (await client.ask(UNLOAD, {"lora_int_id": 1})).status == 400
            answer = await client.ask(UNLOAD, {"lora_name": "a\nb"})
            assert (answer.status, "printable" in answer.json["error"]["message"]) == (400, True)
            assert (await client.ask("/v1/completions", prompt)).status == 404

    asyncio.run(work())


def test_without_the_option_there_are_no_such_routes() -> None:
    async def work() -> None:
        async with serving() as client:
            for path in (LOAD, UNLOAD):
                asked = {"lora_name": "sql", "lora_path": "sql"}
                assert (await client.ask(path, asked)).status == 404

    asyncio.run(work())


def test_the_router_that_is_lost_meanwhile_leaves_no_client_waiting() -> None:
    async def work() -> None:
        async with serving(WordyTown(updates=True)) as client:
            router = client.service.router
            client.exchange.missing = 1000  # the town does not answer
            waits = asyncio.ensure_future(router.change(msg.UnloadAdapter("u", "sql")))
            await asyncio.sleep(0)
            router._pass_on(router._tracker.connection_lost(0.0, "cut"))
            answer = await waits
            assert answer.code == "not_ready"
            assert "perhaps done" in answer.why
            assert (await router.change(msg.UnloadAdapter("v", "sql"))).code == "not_ready"

    asyncio.run(work())


# ---- paths


@pytest.mark.parametrize(
    "given",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/",
        "/etc/passwd",
        "a\0b",
        "a\n",
        "x" * 5000,
        "//x",
        "/../x",
    ],
)
def test_paths_that_lead_out_are_refused_before_any_file_is_looked_at(
    given: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        path_below(tmp_path, given)


def test_paths_below_are_taken_relative_and_absolute(tmp_path: Path) -> None:
    for given in ("teams/sql", "./teams//sql", f"{tmp_path}/teams/sql", "teams/sql/"):
        assert path_below(tmp_path, given) == "teams/sql"


def test_links_that_lead_out_are_refused_and_others_are_read(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path / "outside")
    inside = write(root / "inside")
    (root / "same").symlink_to(inside)
    (root / "out").symlink_to(outside)
    mixed = write(root / "mixed")
    os.replace(mixed / "adapter_model.safetensors", root / "kept")
    (mixed / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    assert read_below(root, "a", "same").adapter.digest == read_adapter("a", inside).adapter.digest
    for name in ("out", "mixed"):
        with pytest.raises(ModelError, match=rf"^adapter a: {name} is a link, or holds one, that"):
            read_below(root, "a", name)
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(ModelError, match=r"^adapter a: "):
        read_below(root, "a", "loop")


def test_a_worker_reads_what_was_meant_or_refuses(tmp_path: Path) -> None:
    found = read_adapter("a", write(tmp_path / "a")).adapter
    assert read_same(tmp_path, found, "a").adapter == found
    write(
        tmp_path / "a", r=2, shapes={k: [2 if d == 4 else d for d in v] for k, v in SHAPES.items()}
    )
    with pytest.raises(ModelError, match="holds another adapter here"):
        read_same(tmp_path, found, "a")
    with pytest.raises(NoAdapter):
        read_same(tmp_path, found, "b")
    with pytest.raises(ModelError, match="names no folder here"):
        read_same(None, found, "a")


def test_the_option_names_a_folder_and_goes_to_every_process(tmp_path: Path) -> None:
    topology = Topology(("cpu",), ("cpu",))
    options = ClusterOptions("demo", topology, 4, allow_lora_updates=str(tmp_path), max_loras=3)
    for process in ("router", "prefill", "decode"):
        assert "--allow-lora-updates" in options.arguments(process)
    assert options.arguments("router")[-4:] == [
        *("--allow-lora-updates", str(tmp_path.resolve())),
        *("--max-loras", "3"),
    ]
    settings = ServerSettings("r", "demo", allow_lora_updates=tmp_path)
    assert ["--allow-lora-updates", str(tmp_path)] == settings.arguments()[2:4]
    with pytest.raises(InputError, match="is not a folder"):
        updates_folder(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="--allow-lora-updates does not work with --tensor-par"):
        ClusterOptions(
            "demo", topology, 4, allow_lora_updates=str(tmp_path), tensor_parallel_size=2
        )
