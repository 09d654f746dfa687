"""Which worker goes to which device."""

import pytest

from baton.errors import InputError
from baton.topology import Topology, gpus_of, plan_topology, threads_per_worker, usable_cores


def test_without_a_gpu_all_run_on_the_cpu() -> None:
    assert plan_topology() == Topology(("cpu",), ("cpu",))


def test_one_gpu_is_shared() -> None:
    assert plan_topology(gpus=1) == Topology(("cuda:0",), ("cuda:0",))


def test_with_two_gpus_each_role_has_its_own() -> None:
    assert plan_topology(gpus=2) == Topology(("cuda:0",), ("cuda:1",))


def test_more_workers_than_gpus_go_round() -> None:
    planned = plan_topology(prefills=1, decodes=3, gpus=2)
    assert planned == Topology(("cuda:0",), ("cuda:1", "cuda:0", "cuda:1"))


def test_a_worker_of_several_ranks_takes_as_many_gpus() -> None:
    assert plan_topology(gpus=4, ranks=2) == Topology(("cuda:0",), ("cuda:2",))
    assert plan_topology(gpus=3, ranks=2) == Topology(("cuda:0",), ("cuda:0",))
    assert plan_topology(gpus=3, ranks=2, prefill_ranks=1) == Topology(("cuda:0",), ("cuda:1",))
    assert plan_topology(gpus=6, ranks=4, prefill_ranks=2) == Topology(("cuda:0",), ("cuda:2",))
    assert plan_topology(colocated=True, decode_devices=("cpu",), gpus=1, ranks=2) == Topology(
        (), ("cpu",), colocated=True
    )
    assert plan_topology(colocated=True, gpus=2, prefill_ranks=4) == Topology((), ("cuda:0",), True)
    assert plan_topology(gpus=0, ranks=2) == Topology(("cpu",), ("cpu",))
    with pytest.raises(InputError, match="--tensor-parallel-size 2 needs 2 GPUs, and there are 1"):
        plan_topology(gpus=1, ranks=2)
    assert gpus_of("cuda:2", 2) == {2, 3}
    assert gpus_of("cpu", 2) == frozenset()


def test_named_devices_are_taken_as_they_are() -> None:
    planned = plan_topology(["cpu"], ["cuda:3", "cuda:4"], gpus=1)
    assert planned == Topology(("cpu",), ("cuda:3", "cuda:4"))


def test_colocated_there_is_no_prefill_worker() -> None:
    assert plan_topology(colocated=True, gpus=2) == Topology((), ("cuda:0",), colocated=True)


def test_a_role_without_a_worker_is_refused() -> None:
    with pytest.raises(InputError, match="at least one decode"):
        Topology(("cpu",), ())
    with pytest.raises(InputError, match="at least one prefill worker, or use --colocated"):
        Topology((), ("cpu",))
    with pytest.raises(InputError, match="at least one decode"):
        plan_topology(decodes=0)


def test_it_says_what_it_is() -> None:
    assert (
        str(Topology(("cpu",), ("cuda:0", "cuda:1")))
        == "1 prefill on cpu, 2 decode on cuda:0, cuda:1"
    )
    assert str(Topology(("cpu", "cpu"), ("cpu",))) == "2 prefill on cpu, 1 decode on cpu"
    assert str(Topology((), ("cpu",), True)) == "colocated, 1 decode on cpu"


def test_workers_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.topology.usable_cores", lambda: 8)
    assert threads_per_worker(Topology(("cpu",), ("cpu", "cpu"))) == 2
    assert threads_per_worker(Topology(("cuda:0",), ("cpu",))) == 8
    assert threads_per_worker(Topology(("cuda:0",), ("cuda:0",))) == 8
    assert threads_per_worker(Topology(("cpu",) * 5, ("cpu",) * 5)) == 1


def test_there_is_a_core_to_run_on() -> None:
    assert usable_cores() >= 1


def test_a_device_named_for_one_role_is_not_the_first_choice_for_the_other() -> None:
    assert plan_topology(["cuda:1"], gpus=2).decode_devices == ("cuda:0",)
