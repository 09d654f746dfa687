"""What a running server exposes: sockets, files, memory, connections. Read from /proc."""

import json
import os
import stat
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.processes import children_of, short_folder, terminals
from tests.cluster.serving import Server
from tests.patience import PATIENCE_S

LISTEN, UNBOUND = "0A", "0000"
SECRET_PROMPT = "an unmistakable pangram about quartz and jackdaws"


@dataclass(frozen=True)
class TcpSocket:
    """A row of /proc/net/tcp or tcp6: addresses in hexadecimal, as the kernel writes them."""

    local: str
    remote: str
    state: str


@dataclass(frozen=True)
class Exposed:
    """A server that has answered a request, the processes of its cluster, and its folder."""

    server: Server
    folder: Path
    pids: dict[str, int]

    @property
    def run_dir(self) -> Path:
        (found,) = self.folder.glob("baton-*")
        return found


@pytest.fixture(scope="module")
def exposed() -> Iterator[Exposed]:
    with short_folder() as folder, terminals() as type_in:
        keys = folder / "keys"
        keys.write_text("a-key\n")
        server = Server(type_in, folder, "--api-key-file", keys)
        body = json.dumps({"prompt": SECRET_PROMPT, "max_tokens": 4}).encode()
        head = {"Authorization": "Bearer a-key", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/v1/completions", body, head)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            assert answer.status == 200
        main = server.terminal.process.pid
        yield Exposed(server, folder, {"main": main, **children_of(main)})
        server.client.close()


def inodes(pid: int) -> set[str]:
    """The sockets that a process holds."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def tcp_sockets(pid: int) -> list[TcpSocket]:
    held, found = inodes(pid), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in held:
                found.append(TcpSocket(words[1], words[2], words[3]))
    return found


def unix_paths(pid: int) -> list[str]:
    """Files of the Unix sockets that a process holds; unnamed ones left out."""
    held = inodes(pid)
    rows = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
    return [row[7] for row in rows if row[6] in held and len(row) > 7]


def is_loopback(address: str) -> bool:
    host = address.partition(":")[0]
    if len(host) == 8:
        return host.endswith("7F")  # 127.0.0.0/8, in the byte order of the machine
    return host in ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def test_a_loopback_address_is_recognised() -> None:
    assert is_loopback("0100007F:1F90")
    assert not is_loopback("00000000:1F90")
    assert not is_loopback("0101A8C0:1F90")
    assert not is_loopback("00000000000000000000000000000000:1F90")


def test_only_the_port_of_the_server_is_open_and_only_on_loopback(exposed: Exposed) -> None:
    port = f"{int(exposed.server.url.rpartition(':')[2]):04X}"
    listening = {
        (name, each.local)
        for name, pid in exposed.pids.items()
        for each in tcp_sockets(pid)
        if each.state == LISTEN
    }
    assert {name for name, _ in listening} == {"main", "server"}  # main holds it for restarts
    assert {address for _, address in listening} == {f"0100007F:{port}"}


def test_no_process_is_connected_to_another_machine(exposed: Exposed) -> None:
    for name, pid in exposed.pids.items():
        away = [
            each
            for each in tcp_sockets(pid)
            if each.state != LISTEN and not is_loopback(each.remote)
        ]
        assert away == [], name


def test_sockets_between_processes_lie_in_a_folder_of_their_own(exposed: Exposed) -> None:
    run_dir = exposed.run_dir
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    paths = [path for pid in exposed.pids.values() for path in unix_paths(pid)]
    assert any(path.endswith("router.sock") for path in paths)
    outside = [path for path in paths if not Path(path).is_relative_to(run_dir)]
    assert outside == []


def test_the_file_of_keys_is_for_its_owner_alone(exposed: Exposed) -> None:
    """Of other files the folder's mode is the guard."""
    (keys,) = exposed.run_dir.glob("api-keys")
    assert stat.S_IMODE(keys.stat().st_mode) & 0o077 == 0


def test_the_kv_pool_has_no_name_that_another_user_could_open(exposed: Exposed) -> None:
    decode = exposed.pids["decode-0"]
    pools = [
        entry
        for entry in Path(f"/proc/{decode}/fd").iterdir()
        if os.readlink(entry).startswith("/memfd:")
    ]
    assert pools, "decode has no pool in shared memory: what is tested here?"
    maps = Path(f"/proc/{decode}/maps").read_text()
    assert "/dev/shm/" not in maps
    assert stat.S_IMODE(Path(f"/proc/{decode}/fd").stat().st_mode) & 0o077 == 0


def test_keys_are_on_no_command_line_and_prompts_in_no_log(exposed: Exposed) -> None:
    for name, pid in exposed.pids.items():
        assert b"a-key\0" not in Path(f"/proc/{pid}/cmdline").read_bytes(), name
    logs = [path.read_text(errors="replace") for path in exposed.run_dir.glob("logs/*.log")]
    assert logs
    for text in (*logs, exposed.server.said):
        assert SECRET_PROMPT not in text
        assert "a-key" not in text.replace("--api-key", "")
