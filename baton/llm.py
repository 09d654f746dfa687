"""LLM: a model to be asked from Python. `from baton import LLM, SamplingParams`.

    llm = LLM("demo")                                  in this process: no sockets, no other process
    llm = LLM("demo", num_prefill=1, num_decode=2)     worker processes, ended with the LLM
    llm = LLM(router="ipc:///run/baton/router.sock")   a running cluster

    llm.generate(["In the future", "Once upon a time"], SamplingParams(temperature=0))
    llm.chat([{"role": "user", "content": "Hello"}])
    llm.generate("SELECT", lora="sql")                 of LLM(..., lora={"sql": "adapters/sql"})
    for piece in llm.stream("In the future"): ...
    await llm.agenerate(...); async for piece in llm.astream(...): ...

All prompts are checked before the first is started. Those of one call, and of calls in several
threads or tasks, are batched. Ctrl-C and a cancelled task abort the requests of their call alone.
Importing this module does not import torch.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from secrets import token_hex
from typing import Any, Unpack, overload

from baton import grammar
from baton.backend import Backend, Deliver, RequestThread, Start
from baton.client.batch import Batch, Completion, Failure, Streamed
from baton.client.blocking import Client
from baton.client.tracker import News
from baton.clock import monotonic
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import BatonError, InputError, ModelError, RequestError, WorkerLost
from baton.llm_params import Options as Options
from baton.llm_params import chosen, lora_options, params_of
from baton.llm_tools import ToolChats, ToolTurn
from baton.model_files import ModelFiles, resolve_model
from baton.params import NOT_STREAMED_S, GenerationParams, Limits, check_request, check_unicode
from baton.server.templates import ChatTemplate, CompiledTemplate, read_template
from baton.server.turns import Conversation
from baton.text import Tokenizer, chat_ends, encode_prompt
from baton.topology import count_gpus, plan_topology
from baton.wire.keys import load_keys
from baton.wire.messages import ClusterInfo, Submit
from sampler.params import SamplingParams

QUEUED = 4
"""Requests of one call with the router for each that runs at once: no place there is ever idle."""
GIVE_UP_S = 30.0  # so long requests wait for a lost router that nothing here restarts
REFUSALS = frozenset(
    ("invalid_request", "context_length_exceeded", grammar.INVALID, grammar.FAILED)
)

Prompt = str | list[int]
Prompts = list[str] | list[list[int]] | list[Prompt]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that answers."""

    name: str
    context: int  # tokens, prompt and generation together
    vocabulary: int
    dtype: str
    sampling: SamplingParams  # where a call gives none
    workers: tuple[str, ...]
    adapters: tuple[str, ...] = ()  # names that a call's `lora` can give


class LLM:
    """Close it, or use it as a context manager; one that is garbage collected is closed too.

    The calls may come from several threads. Prompts are texts or lists of token ids; one in, one out;
    a list in, a list out, in its order. `sampling` None is the model's own default, with seed 0."""

    def __init__(
        self,
        model: str | None = None,
        *,
        num_prefill: int | None = None,
        num_decode: int | None = None,
        colocated: bool = False,
        router: str | None = None,
        keys: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 2048,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
        prefix_caching: bool = True,
        chat_template: str | Path | None = None,
        download: bool = False,
        lora: Mapping[str, str | Path] | None = None,
    ) -> None:
        """`model` is a name of configs/model_paths.yaml, a folder, or a Hugging Face id; by default the
        bundled demo. With `num_prefill` or `num_decode` worker processes compute, with neither this
        process does. `colocated`: decode fills its own KV, there are no prefill workers. At most
        `max_num_seqs` requests run at once. It is ready as soon as the router and the first worker of
        each role are; further workers join when they have loaded, and take requests from then on.
        `lora`: adapters as peft writes them, folders by name; a call chooses one by its option `lora`.

        `router` is the address of a running cluster, which has its own settings: of the others only
        `model`, `keys` and `chat_template` count then. Texts are tokenized here if the files of its
        model are on this machine, else by the router.

        Raises InputError for the arguments, ModelError, OutOfMemory, and ProtocolError where no router
        answers. The first LLM of a model on this CPU compiles it: see baton/local.py."""
        name = model or "demo"
        files = resolve_model(name, download=download) if router is None or model else None
        given = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": max_num_batched_tokens,
            "kv_cache_dtype": kv_cache_dtype,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "prefix_caching": prefix_caching,
            "lora": lora_options(lora),
        }
        prefills = 0 if colocated else 1 if num_prefill is None else num_prefill
        if router is not None:
            _refuse_beside_router(num_prefill, num_decode, lora)
            start = _connect(router, keys)
        elif num_prefill is None and num_decode is None:
            start = _in_process(name, device, prefills, max_num_seqs, given)
        else:
            start = _processes(name, device, prefills, num_decode, max_num_seqs, given)
        self._thread = RequestThread(start)
        self._close = weakref.finalize(self, self._thread.close)
        self._limit = QUEUED * max_num_seqs
        self._names = map(f"llm-{token_hex(6)}-{{}}".format, count())
        self.model = _described(self._thread.info)
        self._files = self._checked_files(files)
        self._tokenizer = Tokenizer(self._files.tokenizer_file) if self._files else None
        override = Path(chat_template) if chat_template is not None else None
        self._chat_template = read_template(self._files.folder if self._files else None, override)
        self._tool_chats: ToolChats | None = None
        template = self._chat_template
        self._template = CompiledTemplate(template) if template is not None else None

    # ---- calls

    @overload
    def generate(
        self, prompts: str, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Prompts, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: str | Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]:
        """Continue the prompts. Raises RequestError, before anything is started, for the first that
        the model cannot answer, naming its index; BatonError if a request fails on the way."""
        call = self._call(prompts, sampling, options, NOT_STREAMED_S)
        with closing(self._texts(call)) as texts:
            for _ in texts:
                pass
        return call.result()

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Message] = (),
        tool_choice: str | Message = "auto",
        parallel_tool_calls: bool = True,
        **options: Unpack[Options],
    ) -> Completion:
        """The assistant's answer to {"role": ..., "content": ...} messages. InputError if the model
        has no chat template; RequestError if the template refuses them.

        `tools` and what belongs to them are OpenAI's. The answer's `tool_calls` are names and arguments,
        JSON of their schemas, its `text` what else it says, and it ends with finish_reason tool_calls."""
        if not options.get("ignore_eos"):
            options["stop_token_ids"] = (*options.get("stop_token_ids", ()), *self.chat_stop_ids)
        if not tools:
            return self.generate([self.chat_ids(messages)], sampling, **options)[0]
        tokenizer, template = self._for_chats()
        if self._tool_chats is None:
            assert self._files is not None  # with them came the tokenizer
            self._tool_chats = ToolChats(self._files, template, tokenizer)
        turn = self._tool_chats.turn(messages, tools, tool_choice, parallel=parallel_tool_calls)
        ids = encode_prompt(tokenizer, turn.text, self.model.context, special=False)
        call = self._call([list(ids)], sampling, options, NOT_STREAMED_S, turn)
        with closing(self._texts(call)) as texts:
            for _ in texts:
                pass
        return turn.read(call.completions[0])

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Iterator[str]:
        """Pieces of text as they are generated. Leaving the loop aborts the request."""
        return self._texts(self._call([prompt], sampling, options, 0.0))

    @overload
    async def agenerate(
        self, prompts: str, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    async def agenerate(
        self, prompts: Prompts, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> list[Completion]: ...
    async def agenerate(
        self,
        prompts: str | Prompts,
        sampling: SamplingParams | None = None,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]:
        """generate() for an event loop, which goes on meanwhile."""
        call = await asyncio.to_thread(self._call, prompts, sampling, options, NOT_STREAMED_S)
        async with aclosing(self._atexts(call)) as texts:
            async for _ in texts:
                pass
        return call.result()

    async def astream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[str]:
        """stream() for an event loop."""
        call = await asyncio.to_thread(self._call, [prompt], sampling, options, 0.0)
        async with aclosing(self._atexts(call)) as texts:
            async for text in texts:
                yield text

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation up to where the assistant's answer begins: a prompt. To stream
        the answer, give stream() `stop_token_ids=llm.chat_stop_ids`."""
        tokenizer, _ = self._for_chats()
        assert self._template is not None
        text = self._template.render(Conversation(messages))
        return list(encode_prompt(tokenizer, text, self.model.context, special=False))

    def _for_chats(self) -> tuple[Tokenizer, ChatTemplate]:
        if self._tokenizer is None:
            raise InputError(
                f"the files of {self.model.name} are not on this machine, and chat() needs its "
                "tokenizer: give the LLM its model"
            )
        if self._chat_template is None:
            raise InputError(
                f"{self.model.name} has no chat template: use generate(), or give the LLM a chat_template"
            )
        return self._tokenizer, self._chat_template

    @property
    def chat_stop_ids(self) -> tuple[int, ...]:
        """The ids that end a chat beside those that end every text of the model: the eos_token of its
        tokenizer, where that is another one."""
        if self._tokenizer is None or self._files is None:
            return ()
        return chat_ends(self._tokenizer, self._files.eos_token_ids, self._files.vocab_size)

    def close(self) -> None:
        """End the worker processes, free the memory. Calls that are under way raise BatonError. May be
        called again."""
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside

    def _checked_files(self, given: ModelFiles | None) -> ModelFiles | None:
        """The files of the model that is served; None if they are not on this machine."""
        info = self._thread.info
        if given is not None and given.fingerprint != info.fingerprint:
            self.close()
            raise InputError(f"the cluster serves {info.model}, not {given.name}")
        files = given
        if files is None:
            with suppress(ModelError):
                files = resolve_model(info.model)
        return files if files and files.fingerprint == info.fingerprint else None

    def _call(
        self,
        prompts: str | Prompts,
        sampling: SamplingParams | None,
        options: Options,
        interval_s: float,
        turn: ToolTurn | None = None,
    ) -> "_Call":
        """Everything checked, nothing started."""
        if not isinstance(prompts, str | list):
            raise InputError(f"prompts must be a string or a list, got {type(prompts).__name__}")
        listed = [prompts] if isinstance(prompts, str) else prompts
        params = params_of(sampling or self.model.sampling, options, interval_s)
        params = params if turn is None else turn.guided(params)
        adapters = chosen(options.get("lora"), len(listed), self._thread.info.adapters)
        submits = {}
        for index, (prompt, adapter) in enumerate(zip(listed, adapters, strict=True)):
            try:
                submits[index] = self._submit(prompt, replace(params, adapter=adapter))
            except RequestError as error:
                where = "the prompt" if isinstance(prompts, str) else f"prompts[{index}]"
                raise RequestError(f"{where}: {error}", code=error.code) from error
        return _Call(Batch(submits, limit=self._limit), isinstance(prompts, str))

    def _submit(self, prompt: Prompt, params: GenerationParams) -> Submit:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                check_unicode(prompt, "the prompt")
                return Submit(next(self._names), prompt, params)
            ids = encode_prompt(self._tokenizer, prompt, self.model.context)
        elif isinstance(prompt, list) and all(type(each) is int for each in prompt):
            ids = tuple(prompt)
        else:
            raise RequestError(
                f"a prompt is a string or a list of token ids, got {type(prompt).__name__}; one prompt "
                "of ids needs a list around it: [[1, 2, 3]]"
            )
        eos = self._files.eos_token_ids if self._files is not None else ()
        limits = Limits(self.model.context, self.model.vocabulary, self._thread.info.adapters)
        check_request(ids, params.resolved(self.model.sampling, eos), limits)
        return Submit(next(self._names), ids, params)

    def _texts(self, call: "_Call") -> Generator[str, None, None]:
        """Run the call; yields the new text of every message. Aborts what is left when it is closed."""
        inbox: SimpleQueue[News | Exception] = SimpleQueue()
        try:
            while not call.batch.done:
                self._send(call, inbox.put)
                if text := call.take(inbox.get()):
                    yield text
        finally:
            self._thread.abandon(call.batch.running)

    async def _atexts(self, call: "_Call") -> AsyncGenerator[str, None]:
        inbox: asyncio.Queue[News | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(news: News | Exception) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so the call is over
                loop.call_soon_threadsafe(inbox.put_nowait, news)

        try:
            while not call.batch.done:
                self._send(call, deliver)
                if text := call.take(await inbox.get()):
                    yield text
        finally:
            self._thread.abandon(call.batch.running)

    def _send(self, call: "_Call", deliver: Deliver) -> None:
        if requests := call.batch.next_requests(monotonic()):
            self._thread.submit(requests, deliver)


@dataclass(slots=True)
class _Call:
    """The requests of one call, and what has come of them."""

    batch: Batch
    single: bool  # one prompt, not in a list
    completions: dict[int, Completion] = field(default_factory=dict)

    def take(self, news: News | Exception) -> str:
        """The new text. Raises the error that ended the call."""
        if isinstance(news, Exception):
            raise news
        match self.batch.take(news, monotonic()):
            case Streamed(text=text):
                return text
            case Completion() as done:
                self.completions[done.index] = done
            case Failure() as failure:
                raise self._error(failure)
        return ""

    def result(self) -> Completion | list[Completion]:
        """In the order of the prompts."""
        found = [self.completions[index] for index in range(len(self.completions))]
        return found[0] if self.single else found

    def _error(self, failure: Failure) -> BatonError:
        where = "the prompt" if self.single else f"prompts[{failure.index}]"
        if failure.code in REFUSALS:
            return RequestError(f"{where}: {failure.message}", code=failure.code)
        kind = WorkerLost if failure.code == "worker_lost" else BatonError
        return kind(f"{where}: the request failed ({failure.code}): {failure.message}")


def _refuse_beside_router(
    num_prefill: int | None, num_decode: int | None, lora: Mapping[str, str | Path] | None
) -> None:
    if num_prefill is not None or num_decode is not None:
        raise InputError("router names a running cluster: leave num_prefill and num_decode out")
    if lora:
        raise InputError("a running cluster has adapters of its own: leave lora out")


def _described(info: ClusterInfo) -> ModelInfo:
    workers = tuple(f"{each.role} on {each.device}: {each.how}" for each in info.workers)
    adapters = tuple(each.name for each in info.adapters)
    about = info.model, info.context, info.vocabulary, info.dtype, info.sampling
    return ModelInfo(*about, workers, adapters)


# ---- backends. Functions that hold no reference to the LLM, so that it can be garbage collected.


def _in_process(
    model: str, device: str, prefills: int, max_num_seqs: int, given: Mapping[str, Any]
) -> Start:
    @contextmanager
    def start() -> Iterator[tuple[Backend, ClusterInfo]]:
        from baton.local import LocalCluster, LocalOptions  # imports torch

        options = LocalOptions(model, device, prefills=prefills, max_num_seqs=max_num_seqs, **given)
        with closing(LocalCluster(options)) as cluster:
            yield cluster, cluster.info()

    return start


def _processes(
    model: str,
    device: str,
    prefills: int,
    decodes: int | None,
    max_num_seqs: int,
    given: Mapping[str, Any],
) -> Start:
    named, decodes = device != "auto", 1 if decodes is None else decodes
    topology = plan_topology(
        (device,) * prefills if named else (),
        (device,) * decodes if named else (),
        prefills=prefills,
        decodes=decodes,
        colocated=prefills == 0,
        gpus=count_gpus(),
    )
    options = ClusterOptions(model=model, topology=topology, batch_size=max_num_seqs, **given)

    @contextmanager
    def start() -> Iterator[tuple[Backend, ClusterInfo]]:
        with (
            Cluster(options) as cluster,
            closing(Client(cluster.address, supervise=cluster.check, down=cluster.down)) as client,
        ):
            yield client, client.await_ready()

    return start


def _connect(address: str, keys: str | Path | None) -> Start:
    @contextmanager
    def start() -> Iterator[tuple[Backend, ClusterInfo]]:
        loaded = load_keys(Path(keys)) if keys is not None else None
        with closing(Client(address, keys=loaded, give_up_s=GIVE_UP_S)) as client:
            yield client, client.await_ready()

    return start
