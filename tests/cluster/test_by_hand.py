"""The README's launch, typed by hand: commands in terminals that find each other by themselves."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.client.blocking import Client
from baton.errors import ProtocolError
from baton.wire import messages as msg
from baton.wire.keys import load_keys, make_keys
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.points import SLOWLY, Points, failpoints
from tests.cluster.processes import (
    ROOT,
    Talk,
    Terminal,
    await_workers,
    free_port,
    journaled,
    short_folder,
    terminals,
)
from tests.nixl_here import NIXL, WITHOUT_NIXL
from tests.patience import PATIENCE_S, until

Type = Callable[..., Terminal]
LENGTH = 30
SAMPLING = SamplingParams(temperature=0.8, top_p=0.9, seed=9)
LIGHT = ("--threads", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def type_in() -> Iterator[Type]:
    with terminals() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@pytest.fixture(scope="module")
def points() -> Iterator[Points]:
    """Failpoints of the running cluster's workers."""
    with failpoints() as made:
        yield made


@pytest.fixture(scope="module")
def address(type_in: Type, folder: Path, points: Points) -> Iterator[str]:
    """A running cluster: its workers were there, and knocking, before there was a router."""
    address = f"ipc://{folder}/router.sock"
    workers = [
        type_in("-m", "decode_worker", "--router", address, *LIGHT, **points.environment),
        type_in("-m", "prefill_worker", "--router", address, *LIGHT, **points.environment),
    ]
    until(lambda: list(folder.glob("kv-*.sock")), "the decode worker's socket for KV")
    router = type_in("-m", "router", "--address", address, "--model", "demo", "--batch-size", 4)
    yield address
    for each in (*workers, router):
        assert each.runs(), each.said
        each.process.terminate()
        said = each.ends(0).splitlines()
        assert [line for line in said if " WARNING router: " not in line] == []


@pytest.fixture(scope="module")
def clients() -> Iterator[Callable[..., Client]]:
    made = []

    def make(*given: object, **named: object) -> Client:
        made.append(Client(*given, **named))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


Clients = Callable[..., Client]


def check_calm(talk: Talk, name: str) -> None:
    """The requests NAME0, NAME1, ... say what an undisturbed run says to the prompts."""
    for i, calmly in enumerate(calm.answers(LENGTH, SAMPLING)):
        if (request := f"{name}{i}") not in talk.tokens:
            continue
        assert tuple(talk.tokens[request]) == calmly.tokens
        assert talk.texts[request] == calmly.text
        end = talk.ends[request]
        assert isinstance(end, msg.Finished)
        assert end.reason == calmly.reason


def test_workers_join_a_router_that_came_after_them(address: str, clients: Clients) -> None:
    info = await_workers(clients(address), 2)
    assert [each.role for each in info.workers] == ["decode", "prefill"]
    assert [each.transports for each in info.workers] == [(), ("shm",)]


def test_two_clients_at_the_same_time(address: str, clients: Clients) -> None:
    first, second = Talk(clients(address)), Talk(clients(address))
    await_workers(first.client, 2)
    for i, prompt in enumerate(calm.PROMPTS):
        first.ask(f"a{i}", prompt, LENGTH, SAMPLING)
    first.listen(lambda: any(first.tokens.values()))
    for i, prompt in enumerate(calm.PROMPTS[:3]):
        second.ask(f"b{i}", prompt, LENGTH, SAMPLING)
    second.listen(second.all_ended)
    first.listen(first.all_ended)
    assert len(second.ends) == 3
    check_calm(first, "a")
    check_calm(second, "b")


def test_a_third_worker_comes_stalls_wakes_up_and_goes(
    address: str, clients: Clients, type_in: Type
) -> None:
    """Nobody restarts it here. Stopped with work on it, it is given up; awake again, it drops that
    work and joins anew; killed with work on it, it is missed by nobody."""
    talk = Talk(clients(address))
    before = {each.worker for each in await_workers(talk.client, 2).workers}
    third = type_in(
        *("-m", "tests.cluster.impatient", "prefill_worker", "--router", address, *LIGHT),
        *("--name", "third", "--max-num-batched-tokens", 16),
    )
    (name,) = {each.worker for each in await_workers(talk.client, 3).workers} - before
    assert name.startswith("third.")

    third.signal(signal.SIGSTOP)
    for i, prompt in enumerate(calm.PROMPTS):
        talk.ask(f"c{i}", prompt, LENGTH, SAMPLING)
    talk.listen(talk.all_ended)
    check_calm(talk, "c")
    ends = [talk.ends[f"c{i}"] for i in range(len(calm.PROMPTS))]
    assert max(end.timings.retries for end in ends if isinstance(end, msg.Finished)) == 1
    await_workers(talk.client, 2, unlike=(name,))

    third.signal(signal.SIGCONT)
    assert name in {each.worker for each in await_workers(talk.client, 3).workers}
    for i, prompt in enumerate(calm.PROMPTS):
        talk.ask(f"d{i}", prompt, LENGTH, SAMPLING)
    talk.listen(lambda: any(talk.tokens[f"d{i}"] for i in range(len(calm.PROMPTS))))
    third.kill()
    talk.listen(talk.all_ended)
    check_calm(talk, "d")
    await_workers(talk.client, 2, unlike=(name,))


def test_the_job_of_a_fourth_terminal(address: str, type_in: Type, tmp_path: Path) -> None:
    """main.py as a client: the answers; and requests that cannot be, with the cluster's limits."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in calm.PROMPTS))
    long = tmp_path / "long.txt"
    long.write_text("the old man " * 2000)
    common = ("main.py", "--router", address, "-b", 3, "--quiet", "--format", "jsonl")
    sampling = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 9, "--top-k", 0)
    job = type_in(
        *common, "--prompts", prompts, "-l", LENGTH, *sampling, "-o", tmp_path / "a.jsonl"
    )
    too_long = type_in(*common, "--prompts", long, "-o", tmp_path / "b.jsonl")
    beyond = type_in(*common, "-l", 4000, "-o", tmp_path / "c.jsonl")
    assert job.ends(0) == ""
    too_long.refuses(2, "prompt 1", "2,304")
    beyond.refuses(2, "-l 4", "2,304")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [tuple(line["token_ids"]) for line in lines] == [
        each.tokens for each in calm.answers(LENGTH, SAMPLING)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl",
        "long.txt",
        "prompts.txt",
    ]


def test_another_cluster_is_a_worker_dies_in_the_middle_and_comes_back(
    address: str, clients: Clients, type_in: Type, folder: Path, points: Points
) -> None:
    """The HTTP server of the first cluster is the upstream of an engine worker of a second one. Its
    answers are seeded by position, so that they go on where they were."""
    second, port = f"ipc://{folder}/second.sock", free_port()
    serve = ("-m", "server", "--router", address, "--port", port)
    dying = type_in(*serve)
    engine = ("-m", "decode_worker", "--router", second, "--engine", "openai")
    opened = [
        type_in("-m", "router", "--address", second, "--batch-size", 8),
        type_in(*engine, "--upstream", f"http://127.0.0.1:{port}/v1", "--max-num-seqs", 6),
    ]
    talk = Talk(clients(second))
    (worker,) = await_workers(talk.client, 1).workers
    assert worker.role == "engine"
    assert worker.device == f"http://127.0.0.1:{port}"
    points.arm(SLOWLY)
    for i, prompt in enumerate(calm.PROMPTS):
        talk.ask(f"u{i}", prompt, LENGTH, SAMPLING)
    talk.listen(lambda: any(talk.tokens.values()))
    dying.signal(signal.SIGKILL)
    points.disarm(SLOWLY)
    opened.append(type_in(*serve))
    talk.listen(talk.all_ended)
    check_calm(talk, "u")
    ends = [talk.ends[f"u{i}"] for i in range(len(calm.PROMPTS))]
    assert max(end.timings.retries for end in ends if isinstance(end, msg.Finished)) >= 1
    for each in opened:
        each.process.terminate()
        assert each.ends(0).count("error") == 0


def test_a_client_killed_in_the_middle_is_nobody_elses_matter(
    address: str, clients: Clients, type_in: Type, tmp_path: Path
) -> None:
    """Its requests, thousands of tokens, are withdrawn; its journal holds what was finished."""
    talk = Talk(clients(address))
    await_workers(talk.client, 2)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Scientists have discovered a new way to\n" * 400)
    job = type_in(
        *("main.py", "--router", address, "--prompts", prompts, "-l", 100, "--ignore-eos"),
        *("-b", 4, "--quiet", "-o", tmp_path / "out.txt"),
    )
    part = tmp_path / "out.txt.part"
    until(lambda: journaled(part) >= 1, "the first answer")
    job.signal(signal.SIGKILL)
    job.process.wait(PATIENCE_S)
    for i, prompt in enumerate(calm.PROMPTS[:4]):
        talk.ask(f"e{i}", prompt, LENGTH, SAMPLING)
    talk.listen(talk.all_ended)
    check_calm(talk, "e")
    assert 1 <= journaled(part) < 400
    assert not (tmp_path / "out.txt").exists()


def test_workers_that_do_not_fit_are_refused(
    address: str, clients: Clients, type_in: Type, tmp_path: Path
) -> None:
    """Another model, another block size: exit code 4, both values named. The others work on."""
    await_workers(clients(address), 2)
    other = tmp_path / "other"
    shutil.copytree(ROOT / "baton" / "models" / "demo", other)
    (other / "config.json").write_text((other / "config.json").read_text() + " \n")
    common = ("--router", address, *LIGHT)
    model = type_in("-m", "prefill_worker", *common, "--model", other)
    blocks = type_in("-m", "decode_worker", *common, "--block-size", 8)
    model.refuses(4, calm.demo().files.fingerprint[:12], "the router", "the worker serves model")
    blocks.refuses(4, "block size 8", "block size 16", "--block-size")
    await_workers(clients(address), 2)


# ---- tcp


@pytest.mark.parametrize(
    ("choice", "transport"),
    [
        ("frames", "frames_tcp"),
        pytest.param("nixl", "nixl", marks=pytest.mark.skipif(not NIXL, reason=WITHOUT_NIXL)),
    ],
)
def test_over_tcp_with_keys(
    type_in: Type, folder: Path, clients: Clients, choice: str, transport: str
) -> None:
    folder = folder / choice
    folder.mkdir()
    keys, address = folder / "keys", f"tcp://127.0.0.1:{free_port()}"
    make_keys(keys)
    abroad = folder / "abroad"  # another machine has no router.secret
    shutil.copytree(keys, abroad)
    (abroad / "router.secret").unlink()
    common = ("--router", address, "--keys", abroad, "--kv-transport", choice, *LIGHT)
    opened = [
        type_in("-m", "prefill_worker", *common),
        type_in("-m", "decode_worker", *common, "--kv-host", "127.0.0.1"),
        type_in("-m", "router", "--address", address, "--keys", keys),
    ]

    def all_run(info: object) -> None:
        for each in opened:
            assert each.runs(), each.said

    talk = Talk(clients(address, keys=load_keys(abroad)))
    info = await_workers(talk.client, 2, check=all_run)
    (transports,) = [each.transports for each in info.workers if each.role == "prefill"]
    assert [each.partition(" ")[0] for each in transports] == [transport]
    for i, prompt in enumerate(calm.PROMPTS):
        talk.ask(f"t{i}", prompt, LENGTH, SAMPLING)
    make_keys(folder / "others")
    stranger = clients(address, keys=load_keys(folder / "others"))
    with pytest.raises(ProtocolError, match="no router answers"):
        stranger.info(timeout_s=0.5)
    talk.listen(talk.all_ended)
    until(
        lambda: "a process with other keys was turned away" in opened[-1].said, "what keeps it out"
    )
    check_calm(talk, "t")
    for i, prompt in enumerate(calm.PROMPTS):
        end = talk.ends[f"t{i}"]
        assert isinstance(end, msg.Finished)
        fill = len(calm.demo().tokenizer.encode(prompt)) - 1
        layout = calm.demo().engine.layout
        moved, rest = divmod(end.timings.moved_bytes, layout.block_bytes)
        assert rest == 0
        # A block is sent once for each of its chunks.
        assert layout.blocks_for(fill) <= moved <= fill
    for each in opened:
        each.process.terminate()
        said = each.ends(0).splitlines()
        expected = ("turned away", "KV over NIXL is not encrypted")
        assert [line for line in said if not any(each in line for each in expected)] == []


def test_commands_that_cannot_work_leave_with_one_line(type_in: Type, folder: Path) -> None:
    tcp, ipc = "tcp://127.0.0.1:1", f"ipc://{folder}/nobody.sock"
    open_folder, keys = folder / "open", folder / "some-keys"
    make_keys(keys)
    open_folder.mkdir()
    open_folder.chmod(0o755)
    wrong: list[tuple[int, tuple[str, ...], tuple[object, ...]]] = [
        (2, ("keys", tcp), ("-m", "router", "--address", tcp)),
        (2, ("keys", tcp), ("-m", "prefill_worker", "--router", tcp, *LIGHT)),
        (2, ("keys", tcp), ("-m", "decode_worker", "--router", tcp, *LIGHT)),
        (2, ("keys", tcp), ("main.py", "--router", tcp)),
        (2, ("0755", "0700"), ("-m", "router", "--address", f"ipc://{open_folder}/r.sock")),
        (2, ("every interface",), ("-m", "router", "--address", "tcp://*:1", "--keys", keys)),
        (2, ("'cuda:7'", "cpu"), ("-m", "decode_worker", "--router", ipc, "--device", "cuda:7")),
        (2, ("'tpu'", "cpu"), ("-m", "prefill_worker", "--router", ipc, "--device", "tpu")),
        (4, ("no router answers", "nobody.sock"), ("main.py", "--router", ipc)),
        (3, ("'nosuch'", "demo"), ("-m", "router", "--address", ipc, "--model", "nosuch")),
        (3, ("'nosuch'", "demo"), ("-m", "prefill_worker", "--router", ipc, "--model", "nosuch")),
        (3, ("'nosuch'", "demo"), ("-m", "decode_worker", "--router", ipc, "--model", "nosuch")),
    ]
    refused = [(code, words, type_in(*command)) for code, words, command in wrong]
    for code, words, command in refused:
        command.refuses(code, *words)
