"""Which files begin first where several workers share the tests.

A worker takes a whole file. If a long one came last, the others would have nothing to do meanwhile. Files
that start processes and files that compute take turns: the former wait, the latter do not.
"""

from collections.abc import Sequence

STARTS_PROCESSES = (
    "tests/cluster/test_main_command.py",
    "tests/cluster/test_http.py",
    "tests/cluster/test_wheel.py",
    "tests/cluster/test_parallel_processes.py",
    "tests/cluster/test_by_hand.py",
    "tests/cluster/test_faults_quick.py",
    "tests/cluster/test_page.py",
    "tests/cluster/test_processes.py",
    "tests/cluster/test_llm_cluster.py",
    "tests/torch/test_bench_gpu.py",
    "tests/cluster/test_restarts.py",
    "tests/cluster/test_parallel_town.py",
    "tests/cluster/test_lab.py",
    "tests/cluster/test_http_ends.py",
    "tests/cluster/test_stuck.py",
    "tests/cluster/test_lora_updates.py",
    "tests/torch/test_engine_loading.py",
    "tests/torch/test_llm.py",
    "tests/cluster/test_evaluation.py",
    "tests/torch/test_courier.py",
    "tests/pure/test_connection.py",
    "tests/cluster/test_run_batch.py",
    "tests/torch/test_boot.py",
    "tests/cluster/test_exposure.py",
    "tests/cluster/test_lab_studies.py",
    "tests/pure/test_faults_proxy.py",
    "tests/pure/test_cluster_spare.py",
    "tests/gpu/test_cluster_cuda.py",
)
COMPUTES = (
    "tests/torch/test_rope.py",
    "tests/torch/test_sameness_shortcuts.py",
    "tests/pure/test_explore.py",
    "tests/torch/test_native_program.py",
    "tests/torch/test_gguf.py",
    "tests/torch/test_sameness.py",
    "tests/pure/test_cluster_nodes.py",
    "tests/torch/test_sampler_draw.py",
    "tests/torch/test_sameness_families.py",
    "tests/pure/test_tools.py",
    "tests/pure/test_cluster_random.py",
    "tests/pure/test_leaving.py",
    "tests/torch/test_graphs.py",
    "tests/torch/test_sameness_graphs.py",
    "tests/torch/test_transfer_contract.py",
    "tests/torch/test_routers.py",
    "tests/pure/test_architecture.py",
    "tests/torch/test_store.py",
    "tests/pure/test_exposition.py",
    "tests/pure/test_templates.py",
    "tests/pure/test_batching.py",
    "tests/pure/test_json_schema.py",
    "tests/pure/test_text_kinds.py",
    "tests/pure/test_conformance.py",
    "tests/pure/test_hostile.py",
    "tests/torch/test_engine_parity.py",
)
"""Both: the longest first. Files that are not named take less than those that are."""

RANKS = {name: rank for kind in (STARTS_PROCESSES, COMPUTES) for rank, name in enumerate(kind)}


def in_order(files: Sequence[str]) -> list[int]:
    """The numbers of tests that stand in these files, in the order in which they shall run."""
    return sorted(range(len(files)), key=lambda number: RANKS.get(files[number], len(RANKS)))
