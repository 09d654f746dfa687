"""The baseline study: one prompt through router, prefill worker and decode worker, repeated. Where does
its time go, and how near does it come to the machine's limits?
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from statistics import median

from baton.client.batch import Completion, Failure, complete
from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError
from baton.model_files import RANDOM, resolve_model
from baton.params import GenerationParams
from baton.topology import count_gpus, plan_topology
from baton.wire.messages import Submit
from sampler.params import SamplingParams
from tools.lab.baseline_findings import STAGES, Run, Share, findings, share_table, stage_table
from tools.lab.environment import chosen_dtype
from tools.lab.plots import draw_stages
from tools.lab.questions import QUESTIONS
from tools.lab.study import NEW_TOKENS, QUICK_MODEL, Notebook, Picture, Setting, Study, model_of
from tools.measure.limits import Limits, Work, measure
from tools.measure.shape import shape_of

PROMPT = "Explain why batching improves GPU utilization."
REPEATS, WARM_UP = 7, 1


def run(setting: Setting, notebook: Notebook) -> Study:
    """The whole study."""
    files = resolve_model(model_of(setting.model, quick=setting.quick))
    repeats = setting.rounds or (3 if setting.quick else REPEATS)
    limits = _limits(notebook)
    load_s, done = _completions(files.name, setting.dtype, repeats, notebook)
    runs = [_run_of(each) for each in done]
    for number, each in enumerate(runs):
        notebook.record("request", round=number, **each.stages, total_s=each.total_s,
                        ttft_s=each.ttft_s, prompt_tokens=each.prompt_tokens,
                        new_tokens=each.new_tokens)  # fmt: skip
    shares = [] if limits is None else _shares(files.config, limits, runs, setting.dtype, notebook)
    quotations = {f"What {files.name} wrote": PROMPT + done[-1].text}
    if files.name.startswith(RANDOM):  # its tokens are not text
        quotations = _bundled_text(notebook)
    picture = setting.output / "baseline-stages.png"
    ms = {name: 1e3 * median(each.stages[name] for each in runs) for name in STAGES}
    draw_stages(picture, ms)
    tables = [stage_table(load_s, runs)] + ([share_table(shares)] if shares else [])
    return Study(
        name="baseline",
        title="Baseline",
        question=QUESTIONS["baseline"],
        varied="nothing: the same request repeated, alone on the machine",
        fixed={
            "model": files.name,
            "dtype": chosen_dtype(setting.dtype),
            "prompt": f'"{PROMPT}" ({runs[0].prompt_tokens} tokens)',
            "answer": f"{NEW_TOKENS} tokens, greedy, end-of-text ignored",
            "topology": str(plan_topology(gpus=count_gpus())),
            "repeats": f"{repeats}, after {WARM_UP} that is not counted; prefix caching off",
        },
        command="",
        findings=tuple(findings(runs, shares)),
        tables=tuple(tables),
        pictures=(
            Picture(picture.name, "Stages of one request, medians of the repeats (logarithmic)"),
        ),
        quotations=quotations,
    )


def _limits(notebook: Notebook) -> Limits | None:
    """This machine's limits, measured before anything else runs on it."""
    if count_gpus():
        notebook.failed(
            "MFU and MBU", "the limits of a GPU are measured by tools/benchmarks/gpu.sh"
        )
        return None
    notebook.say("measuring this machine's limits")
    limits = measure()
    notebook.record("limits", read_gb_s=limits.read_gb_s, **limits.gemm_gflop_s)
    return limits


@contextmanager
def _cluster(model: str, dtype: str) -> Iterator[tuple[Client, float]]:
    """Separate prefill and decode, one request at a time; and the seconds until it was ready."""
    begun = time.monotonic()
    options = ClusterOptions(
        model=model,
        topology=plan_topology(gpus=count_gpus()),
        batch_size=1,
        batch_window_ms=0.0,
        dtype=dtype,
        max_model_len=1024 if resolve_model(model).max_positions >= 1024 else None,
        prefix_caching=False,  # a repeated request must cost the same
    )
    with (
        Cluster(options) as cluster,
        closing(Client(cluster.address, supervise=cluster.check)) as client,
    ):
        client.await_ready()
        yield client, time.monotonic() - begun


def _completions(
    model: str, dtype: str, repeats: int, notebook: Notebook
) -> tuple[float, list[Completion]]:
    notebook.say(f"{model}: {repeats} times {NEW_TOKENS} tokens")
    with _cluster(model, dtype) as (client, load_s):
        notebook.record("load", seconds=load_s)
        done = [_ask(client) for _ in range(WARM_UP + repeats)]
    return load_s, done[WARM_UP:]


def _ask(client: Client) -> Completion:
    options = GenerationParams(NEW_TOKENS, SamplingParams(temperature=0.0), ignore_eos=True)
    submit = Submit(f"lab-{secrets.token_hex(6)}", PROMPT, options)
    for event in complete(client, {0: submit}, limit=1):
        if isinstance(event, Completion):
            return event
        if isinstance(event, Failure):
            raise BatonError(f"the request failed ({event.code}): {event.message}")
    raise AssertionError("a request ends with a Completion or a Failure")


def _run_of(done: Completion) -> Run:
    """`other` is the client's time outside all stages of the router. Detokenizing overlaps decode, so it
    is not part of the sum."""
    times = done.timings
    stages = {
        "tokenize": done.tokenize_s,
        "queue": times.queue_s,
        "reserve": times.reserve_s,
        "prefill": times.prefill_s,
        "hand-over": times.handover_s,
        "decode": times.decode_s,
        "detokenize": times.detokenize_s,
    }
    total = done.ended - done.submitted
    accounted = sum(stages.values()) - times.detokenize_s
    return Run(
        stages | {"other": max(0.0, total - accounted)},
        total,
        times.ttft_s,
        done.prompt_tokens,
        len(done.token_ids),
    )


def _shares(
    config: dict[str, object], limits: Limits, runs: list[Run], asked: str, notebook: Notebook
) -> list[Share]:
    shape = shape_of(config)
    dtype = chosen_dtype(asked)
    if shape is None or dtype not in limits.gemm_gflop_s:
        notebook.failed("MFU and MBU", "the operations of this kind of model cannot be counted")
        return []
    run = runs[0]
    shares = []
    if run.filled > 0 and (prefill := median(each.stages["prefill"] for each in runs)) > 0:
        work = shape.work(tokens=run.filled, answers=0, cached=run.filled, dtype=dtype)
        shares.append(_share("prefill", work, prefill, limits, dtype))
    context = run.prompt_tokens + run.new_tokens // 2
    step = shape.work(tokens=1, answers=1, cached=context, dtype=dtype)
    seconds = median(each.decode_token_s for each in runs)
    shares.append(_share("decode", step, seconds, limits, dtype))
    for each in shares:
        notebook.record("share", **asdict(each))
    return shares


def _share(stage: str, work: Work, seconds: float, limits: Limits, dtype: str) -> Share:
    gflop_s = work.flops / seconds / 1e9
    gb_s = (work.weight_bytes + work.kv_bytes) / seconds / 1e9
    mfu, mbu = gflop_s / limits.gemm_gflop_s[dtype], gb_s / limits.read_gb_s
    return Share(stage, mfu, mbu, gflop_s, gb_s)


def _bundled_text(notebook: Notebook) -> dict[str, str]:
    """Random weights write no readable text, so show the bundled model's answer to the same prompt."""
    try:
        _, done = _completions(QUICK_MODEL, "auto", 1, notebook)
    except BatonError as error:
        notebook.failed(f"the answer of the bundled model ({QUICK_MODEL})", error)
        return {}
    notebook.record("words", model=QUICK_MODEL, text=done[0].text)
    caption = f"Random weights write no text; the bundled model ({QUICK_MODEL}) wrote"
    return {caption: PROMPT + done[0].text}
