"""CURVE keys on disk: made once, read by their owner only, refused in words."""

import os
import stat
from pathlib import Path

import pytest

from baton.cli.keys import make
from baton.errors import InputError
from baton.wire.keys import NAMES, is_exposed, load_keys, make_keys


def test_made_keys_are_loaded_again(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    router, member = load_keys(tmp_path / "keys", router=True), load_keys(tmp_path / "keys")
    assert router.router_secret is not None
    assert member.router_secret is None
    assert router.router_public == member.router_public
    assert router.member_secret == member.member_secret
    assert len({router.router_public, router.router_secret, router.member_public,
                router.member_secret}) == 4  # fmt: skip


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) for name in NAMES}
    assert modes["router.secret"] == modes["member.secret"] == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in NAMES}
    with pytest.raises(InputError, match="not empty"):
        make_keys(tmp_path)
    assert kept == {name: (tmp_path / name).read_bytes() for name in NAMES}


def test_a_member_needs_no_router_secret(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / "router.secret").unlink()
    load_keys(tmp_path)
    with pytest.raises(InputError, match=r"router\.secret"):
        load_keys(tmp_path, router=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_or_broken_is_named(tmp_path: Path, name: str) -> None:
    make_keys(tmp_path)
    (tmp_path / name).write_bytes(b"short")
    with pytest.raises(InputError, match=rf"{name} is not a CURVE key"):
        load_keys(tmp_path, router=True)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        load_keys(tmp_path, router=True)


@pytest.mark.parametrize("name", ["router.secret", "member.secret"])
def test_a_secret_others_can_read_is_refused(tmp_path: Path, name: str) -> None:
    make_keys(tmp_path)
    (tmp_path / name).chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        load_keys(tmp_path, router=True)


def test_a_newline_after_a_key_does_no_harm(tmp_path: Path) -> None:
    make_keys(tmp_path)
    before = load_keys(tmp_path)
    public = tmp_path / "router.public"
    public.write_bytes(public.read_bytes() + b"\n")
    assert load_keys(tmp_path) == before


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    make_keys(tmp_path)
    keys = load_keys(tmp_path, router=True)
    assert keys.router_secret is not None
    for secret in (keys.router_secret, keys.member_secret):
        assert secret.decode() not in repr(keys)


def test_forty_characters_that_are_no_key_are_refused(tmp_path: Path) -> None:
    make_keys(tmp_path)
    (tmp_path / "router.public").write_bytes(b"\\" * 40)
    with pytest.raises(InputError, match=r"router\.public is not a CURVE key"):
        load_keys(tmp_path)


def test_what_is_printed_with_new_keys_reaches_other_hosts(tmp_path: Path) -> None:
    (decode,) = [
        line for line in make(tmp_path / "keys").splitlines() if "decode" in line and "-m" in line
    ]
    assert decode.endswith("--kv-host ADDRESS")


@pytest.mark.parametrize(
    ("mode", "owner", "exposed"),
    [
        (0o400, 10001, False),
        (0o600, 10001, False),
        (0o440, 10001, True),
        (0o404, 10001, True),
        (0o440, 0, False),  # a Secret of Kubernetes under fsGroup
        (0o640, 0, False),
        (0o460, 0, True),
        (0o444, 0, True),
    ],
)
def test_root_may_let_a_group_read_a_secret(mode: int, owner: int, exposed: bool) -> None:
    assert is_exposed(mode, owner=owner, reader=10001) is exposed


def test_root_itself_reads_only_what_is_its_own_alone() -> None:
    assert is_exposed(0o440, owner=0, reader=0)
    assert not is_exposed(0o400, owner=0, reader=0)
