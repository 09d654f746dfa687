"""A short description of the cluster for the user."""

from baton.kv.layout import INT8
from baton.kv.transports import transport
from baton.topology import Topology
from baton.wire.messages import ClusterInfo
from baton.wire.records import WorkerInfo


def describe_cluster(info: ClusterInfo, started: Topology | None = None) -> list[str]:
    """Model, dtype, topology, and how the KV cache gets from prefill to decode. Work begins with the
    first workers to join; `started` says how many were started in all."""
    return [
        f"model     {info.model}, {_dtypes(info)}, context {info.context:,} tokens{_how(info)}",
        f"topology  {_topology(info, started)}",
        f"KV path   {_ways(info)}",
    ]


def _dtypes(info: ClusterInfo) -> str:
    """That of the model, and that of the KV cache where it was asked for."""
    return f"{info.dtype}, KV cache {info.kv_dtype}" if info.kv_dtype == INT8 else info.dtype


def _how(info: ClusterInfo) -> str:
    """The backends of the workers."""
    ways = dict.fromkeys(worker.how for worker in info.workers if worker.how)
    return "".join(f", {way}" for way in ways)


def worker_states(info: ClusterInfo) -> str:
    """For the progress bar: prefill 1/1, decode 1/2."""
    parts = []
    for role in ("prefill", "decode", "engine"):
        workers = _of_role(info, role)
        if workers:
            alive = sum(worker.state == "alive" for worker in workers)
            parts.append(f"{role} {alive}/{len(workers)}")
    return ", ".join(parts)


def _topology(info: ClusterInfo, started: Topology | None) -> str:
    if engines := _of_role(info, "engine"):
        return _counted(engines, "engine", 0)
    prefill, decode = _of_role(info, "prefill"), _of_role(info, "decode")
    decodes = _counted(decode, "decode", len(started.decode_devices) if started else 0)
    if not prefill:
        return f"colocated: {decodes}, filling {_its(decode)} own cache"
    prefills = _counted(prefill, "prefill", len(started.prefill_devices) if started else 0)
    return f"{prefills}, {decodes}"


def _counted(workers: list[WorkerInfo], role: str, started: int) -> str:
    devices = ", ".join(dict.fromkeys(worker.device for worker in workers)) or "none"
    count = f"{len(workers)} of {started}" if started > len(workers) else f"{len(workers)}"
    plural = "s" if max(len(workers), started) != 1 else ""
    slowest = max((worker.load_s for worker in workers), default=0.0)
    loaded = f" (ready after {slowest:.1f} s)" if slowest else ""
    return f"{count} {role} worker{plural} on {devices}{loaded}"


def _its(workers: list[WorkerInfo]) -> str:
    return "its" if len(workers) == 1 else "their"


def _ways(info: ClusterInfo) -> str:
    prefill = _of_role(info, "prefill")
    if _of_role(info, "engine"):
        return "none, the engines keep it"
    if not prefill:
        return "none needed, decode fills its own cache"
    ways = dict.fromkeys(way for worker in prefill for way in worker.transports)
    return "; ".join(_way(each) for each in ways) or "not known yet"


def _way(reported: str) -> str:
    """A transport as the router reports it, "shm" or "frames 3.1 GB/s", in words."""
    way, _, speed = reported.partition(" ")
    name = known.title if (known := transport(way)) else way
    return f"{name}, {speed}" if speed else f"{name}, written in place, nothing copied"


def _of_role(info: ClusterInfo, role: str) -> list[WorkerInfo]:
    return [worker for worker in info.workers if worker.role == role]
