"""`serve --cluster ray`: options that cannot be, in words; what is said where ray is not installed."""

import sys

import pytest

from baton.cli.main import main
from baton.cluster.on_ray import RayPlacer, free_port
from baton.errors import InputError
from baton.offline.settings import options_for_ray
from tests.pure.test_packaging import lock


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--ray-address 10.0.0.1:6379", "--ray-address is for --cluster ray"),
        ("--cluster ray --router ipc:///tmp/r", "a running cluster has its own workers"),
        ("--cluster ray --keys k", "the cluster makes its own keys"),
        ("--cluster ray --download", "fetch the model on every node before"),
        ("--cluster ray --spare-worker", "a spare cannot wait on every node"),
        ("--cluster ray --num-decode 0", "--num-decode must be at least 1, got 0"),
        ("--cluster ray --colocated --num-prefill 2", "--colocated exclude each other"),
        ("--cluster ray --decode-device cuda:1", "it is auto, cpu or cuda; Ray chooses the GPU"),
        ("--cluster slurm", "'slurm' is not one of 'local', 'ray'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], words: str, why: str
) -> None:
    assert main(["serve", "demo", *words.split()]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_workers_take_the_named_devices_in_turn() -> None:
    given = {
        **dict.fromkeys(("router", "keys", "download", "spare_worker", "colocated")),
        "model": "demo", "num_prefill": 3, "num_decode": 2, "prefill_device": ("cuda", "cpu"), "lora": (),
        "decode_device": (), "tensor_parallel_size": 1,
    }  # fmt: skip

    class Given(dict[str, object]):
        def __missing__(self, name: str) -> None:
            return None

    topology = options_for_ray(Given(given), lambda name: False, batch_size=4).topology
    assert topology.prefill_devices == ("cuda", "cpu", "cuda")
    assert topology.decode_devices == ("auto", "auto")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        InputError, match=r"--cluster ray needs the package ray: pip install 'ray>="
    ):
        RayPlacer(None)


def test_a_free_port_can_be_listened_on() -> None:
    assert 0 < free_port("127.0.0.1") < 65536


def test_pins_that_both_environments_have_are_the_same() -> None:
    ray = lock("requirements-ray.txt")
    for name, pin in lock("requirements-dev.txt").items():
        assert str(ray.get(name, pin)) == str(pin)
