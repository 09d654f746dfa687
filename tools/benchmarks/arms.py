"""Arms of `bench engine` that run in this environment, a process each (protocol: peers/lines.py)."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any

from baton.errors import BatonError
from tools.benchmarks.peers.lines import Engine, Ids, serve


class Ours:
    """The engine in this process: continuous batching as the decode worker does it, greedy."""

    def load(self, folder: str, dtype: str, threads: int) -> None:
        import torch

        from baton.engine.boot import boot
        from baton.model_files import resolve_model

        torch.set_num_threads(threads)
        self.engine = boot(resolve_model(folder), device="cpu", dtype=dtype, block_size=16)
        self.pools: dict[int, Any] = {}

    def _rows(self, prompts: list[Ids], new: int) -> tuple[Any, list[list[int]]]:
        from baton.engine.pool import Pool

        each = self.engine.layout.blocks_for(max(map(len, prompts)) + new)
        count = each * len(prompts)
        if count not in self.pools:
            self.pools = {count: Pool.private(self.engine.layout, count, self.engine.device)}
        return self.pools[count], [
            list(range(i * each, (i + 1) * each)) for i in range(len(prompts))
        ]

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        from baton.kv.row import Logits, Row

        pool, tables = self._rows(prompts, new)
        known = [list(prompt) for prompt in prompts]
        done = [0] * len(prompts)
        for _ in range(new):
            rows = [
                Row(ids[at:], at, table, Logits.LAST)
                for ids, at, table in zip(known, done, tables, strict=True)
            ]
            tokens = self.engine.runner.greedy(pool, rows)
            done = [len(ids) for ids in known]
            for ids, token in zip(known, tokens, strict=True):
                assert token is not None
                ids.append(token)
        return [ids[len(prompt) :] for ids, prompt in zip(known, prompts, strict=True)]

    def prefill(self, prompt: Ids) -> None:
        from baton.kv.row import Logits, Row

        pool, tables = self._rows([prompt], 0)
        self.engine.runner.run(pool, [Row(prompt, 0, tables[0], Logits.LAST)]).argmax()


class PrefillDecode:
    """The whole product: router, prefill and decode processes, and the client of the offline job."""

    def load(self, folder: str, dtype: str, threads: int) -> None:
        from baton.client.blocking import Client
        from baton.cluster.options import ClusterOptions
        from baton.cluster.supervisor import Cluster
        from baton.topology import plan_topology

        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
        topology = plan_topology((), (), gpus=0)
        options = ClusterOptions(
            folder,
            topology,
            batch_size=64,
            dtype=dtype,
            prefix_caching=False,
            max_num_batched_tokens=64
            * 64,  # a whole batch in one forward, as the engine alone has it
        )
        self.cluster = Cluster(options)
        atexit.register(self.cluster.stop)
        self.cluster.start()
        self.client = Client(self.cluster.address, supervise=self.cluster.check)
        self.client.await_ready()
        self.asked = 0

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        from baton.client.batch import Completion, complete
        from baton.params import NOT_STREAMED_S, GenerationParams
        from baton.wire.messages import Submit
        from sampler.params import SamplingParams

        options = GenerationParams(
            new,
            SamplingParams(temperature=0.0),
            ignore_eos=True,
            stream_interval_s=NOT_STREAMED_S,  # as the offline job asks
        )
        submits = {
            i: Submit(f"bench-{self.asked + i}", tuple(ids), options)
            for i, ids in enumerate(prompts)
        }
        self.asked += len(prompts)
        found = {
            event.index: list(event.token_ids)
            for event in complete(self.client, submits, limit=64)
            if isinstance(event, Completion)
        }
        return [found[i] for i in submits]

    def prefill(self, prompt: Ids) -> None:
        self.generate([prompt], 1)


class Transformers:
    """transformers' generate, a static batch."""

    def load(self, folder: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if dtype == "int8":
            raise ValueError("transformers has no int8 on a CPU without another package")
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()

    def generate(self, prompts: list[Ids], new: int) -> list[Ids]:
        with self.torch.inference_mode():
            ids = self.torch.tensor(prompts)
            made = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        answers: list[Ids] = made[:, ids.shape[1] :].tolist()
        return answers

    def prefill(self, prompt: Ids) -> None:
        with self.torch.inference_mode():
            ids = self.torch.tensor([prompt])
            self.model(ids, use_cache=True, logits_to_keep=1).logits.argmax()


ARMS: dict[str, Callable[[], Engine]] = {
    "ours": Ours,
    "ours P/D": PrefillDecode,
    "transformers": Transformers,
}


if __name__ == "__main__":
    serve(ARMS[sys.argv[1]](), BatonError)
