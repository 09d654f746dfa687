"""Embeddings are computed by prefill workers. Pure: who could."""

from router.workers import DECODE, ENGINE, PREFILL, WorkerRegistry


def why_no_embeddings(members: WorkerRegistry, *, colocated: bool) -> str:
    """Why a cluster of these workers computes none; empty if it does, or will once they have joined."""
    engines = members.of(ENGINE) and not (members.of(PREFILL) or members.of(DECODE))
    if not colocated and not engines:
        return ""
    return "embeddings are computed by prefill workers, which this cluster does not have"
