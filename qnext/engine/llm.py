"""Text generation from Python, in vLLM's shapes: `LLM(...).generate(prompts, params)`."""

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qnext.config.generation import GenerationConfig
from qnext.engine.engine import Engine
from qnext.engine.request import (
    MAX_SEED,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    check_drafts,
    require_integer,
)
from qnext.engine.sizing import (
    PAGE_SIZE,
    engine_options,
)
from qnext.engine.text import OutputText, TextSegment
from qnext.io.hf_config import read_generation_config
from qnext.io.hub import resolve_checkpoint
from qnext.model.quantized import require_runnable
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import resolve_device, resolve_dtype, set_num_threads
from qnext.runtime.log import get_logger
from qnext.runtime.random_bits import request_seed
from qnext.tokenizer import load as load_tokenizer
from qnext.tokenizer.stream import IncrementalDetokenizer
from qnext.tokenizer.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

# Left to the loading of a checkpoint.
UNRESOLVED_DTYPES = ("auto", "int8", torch.int8, "fp8", torch.float8_e4m3fn)

_logger = get_logger(__name__)


@dataclass(frozen=True)
class StreamChunk:
    """What one step added to a streamed answer."""

    segments: list[TextSegment]  # text that is safe to show; may be empty
    output: RequestOutput  # everything so far

    @property
    def text(self) -> str:
        """The new text in one piece."""
        return "".join(segment.text for segment in self.segments)


class LLM:
    """A model that answers prompts, any number at a time, for one thread at a time.

    Args:
        model: "nano", a checkpoint folder, or a hub id.
        dtype: of the weights: "auto" is the stored type; else "float32", "bfloat16", "float16",
            "float64", or on a CPU "int8", with a scale for each row of a matrix, or on a GPU "fp8",
            with one for each block of 128 x 128. A GPU computes in it too, in bfloat16 beside fp8;
            a CPU holds activations and sums in float32 at least (docs/numerics.md).
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N".
        max_model_len: tokens of prompt and answer together; by default what the model was made
            for, or less if the cache could not hold that.
        max_num_seqs: sequences that run at once; further ones wait.
        num_threads: CPU threads of torch; None leaves them as they are.
        seed: of requests without a seed of their own.
        num_speculative_tokens: drafts per step, 0 for none; "auto" picks the fastest number while
            running. Greedy output is the same for all on a CPU. Sampled output follows the same
            distribution, and a seed repeats it only for a fixed number.
        kv_cache_memory_bytes: memory of the key-value pages; by default what max_num_seqs
            sequences of max_model_len need, at most 1 GiB on a CPU, 60 % of what is free on a GPU.
        tokenizer: folder of another tokenizer than the model's.

    Raises:
        ValueError: an argument out of range, a model that cannot be opened, drafts asked of a
            model without an MTP head, or a cache too small for one sequence.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        num_threads: int | None = None,
        seed: int = 0,
        num_speculative_tokens: int | str = "auto",
        kv_cache_memory_bytes: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> None:
        check_drafts(num_speculative_tokens)
        require_integer("seed", seed, 0, MAX_SEED)
        set_num_threads(num_threads)
        target = resolve_device(device)
        folder = resolve_checkpoint(model)
        wanted = dtype if dtype in UNRESOLVED_DTYPES else resolve_dtype(dtype)
        opened = Qwen3Next.from_pretrained(folder, dtype=wanted, device=target)
        if target.type == "cpu":
            # Kernels round for themselves where a CPU multiplies 16-bit numbers faster.
            opened.compute_dtype = torch.promote_types(opened.dtype, torch.float32)
        self._set_up(
            opened,
            _open_tokenizer(folder) if tokenizer is None else load_tokenizer(tokenizer),
            read_generation_config(folder),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            seed=seed,
            num_speculative_tokens=num_speculative_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
        )

    @classmethod
    def from_model(
        cls,
        model: Qwen3Next,
        tokenizer: Tokenizer | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        seed: int = 0,
        num_speculative_tokens: int | str = "auto",
        kv_cache_memory_bytes: int | None = None,
        prefill_chunk_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> "LLM":
        """Serve a model that is in memory already, on its device and in its dtype.

        Args:
            model: left in the mode it is in; its weights may change between calls of generate.
            tokenizer: None allows prompts of token ids only.
            prefill_chunk_tokens, page_size: tokens.

        Raises:
            ValueError: as for `LLM`.
        """
        llm = cls.__new__(cls)
        llm._set_up(
            model,
            tokenizer,
            generation_config or GenerationConfig(eos_token_id=model.config.eos_token_id),
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            seed=seed,
            num_speculative_tokens=num_speculative_tokens,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            prefill_chunk_tokens=prefill_chunk_tokens,
            page_size=page_size,
        )
        return llm

    def _set_up(
        self,
        model: Qwen3Next,
        tokenizer: Tokenizer | None,
        generation_config: GenerationConfig,
        *,
        seed: int,
        **sizes: Any,
    ) -> None:
        require_integer("seed", seed, 0, MAX_SEED)
        require_runnable(model)
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.seed = seed
        self.engine = Engine(model, engine_options(model, **sizes))
        self._num_requests = 0

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.options.max_model_len

    def get_default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the model's generation_config.json sets, with `changes` on top."""
        config = self.generation_config
        defaults: dict[str, Any] = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "min_p": config.min_p,
            "repetition_penalty": config.repetition_penalty,
            "presence_penalty": config.presence_penalty,
            "frequency_penalty": config.frequency_penalty,
        }
        if config.max_new_tokens is not None:
            defaults["max_tokens"] = config.max_new_tokens
        return SamplingParams(**{**defaults, **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts.

        Args:
            prompts: one or many; each is text or {"prompt_token_ids": [...]}.
            sampling_params: one for all, or one for each; the model's defaults if None.

        Returns:
            One output per prompt, in their order.

        Raises:
            ValueError: a prompt is empty, too long, or not of these forms; nothing was run then.
        """
        if not isinstance(prompts, str | Mapping | Iterable):
            raise ValueError(f"prompts is {prompts!r}; want text, or a list of prompts")
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        requests = self._requests(many, sampling_params)
        for _ in self._run(requests):
            pass
        return [self._output(request) for request in requests]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, as prompts that the chat template makes of them.

        Args:
            messages: [{"role": ..., "content": ...}, ...], or many of these.
            tools: descriptions that the template shows to the model.
            chat_template_kwargs: further options of the template.

        Raises:
            ValueError: there is no tokenizer or chat template, or as for `generate`.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise ValueError(
                f'messages is {messages!r}; want a list of {{"role": ..., "content": ...}}'
            )
        many: Any = [messages] if isinstance(messages[0], Mapping) else messages
        options = dict(chat_template_kwargs or {})
        if taken := sorted(options.keys() & {"messages", "tools", "add_generation_prompt"}):
            raise ValueError(f"chat_template_kwargs holds {taken[0]!r}, an argument of its own")
        prompts = [self.render_chat(m, tools, add_generation_prompt, **options) for m in many]
        return self.generate(prompts, sampling_params)

    def render_chat(
        self,
        messages: Messages,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> str:
        """The prompt that the chat template makes of a conversation."""
        tokenizer = self._require_tokenizer("a chat")
        return tokenizer.render_chat(messages, tools, add_generation_prompt, **template_options)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[StreamChunk]:
        """Answer one prompt, step by step. Closing the iterator ends the answer."""
        (request,) = self._requests([prompt], sampling_params)
        is_complete = False
        with closing(self._run([request])) as steps:
            while not is_complete:
                # Another iterator of this model may have run the last step.
                next(steps, None)
                is_complete = request.finish_reason is not None
                yield StreamChunk(request.output_text.take_ready(), self._output(request))

    def _run(self, requests: list[Request]) -> Generator[list[Request]]:
        """Serve requests to their end; however the caller leaves, nothing of them stays behind."""
        try:
            for request in requests:
                self.engine.add(request)
            while any(request.finish_reason is None for request in requests):
                changed = self.engine.step()
                if changed:
                    yield changed
        finally:
            self.engine.abort([r for r in requests if r.finish_reason is None])

    def _requests(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Check everything about all prompts, so that a mistake costs no work."""
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or not all(
            isinstance(params, SamplingParams) for params in sampling_params
        ):
            raise ValueError(
                f"sampling_params is {sampling_params!r}; want SamplingParams, or a list of them"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; want one, "
                "or one for each"
            )
        pairs = zip(prompts, sampling_params, strict=True)
        requests = [
            self._request(idx, prompt, params) for idx, (prompt, params) in enumerate(pairs)
        ]
        for request in requests:
            self.engine.scheduler.check(request)
        self._num_requests += len(requests)
        return requests

    def _request(self, idx: int, prompt: Prompt, params: SamplingParams) -> Request:
        name = f"prompt {idx}"
        text, ids = self._prompt_ids(name, prompt)
        vocab_size = self.model.config.vocab_size
        ids, prompt_array = _checked_ids(name, ids, vocab_size, self.max_model_len)
        if params.logprobs is not None and params.logprobs > vocab_size:
            raise ValueError(f"logprobs is {params.logprobs}; the vocabulary has {vocab_size}")
        detokenizer = IncrementalDetokenizer(self.tokenizer) if self.tokenizer else None
        request_idx = self._num_requests + idx
        total = self.max_model_len
        if params.max_tokens is not None:
            total = min(total, len(ids) + params.max_tokens)
        request = Request(
            request_id=str(request_idx),
            prompt_token_ids=ids,
            params=params,
            seed=request_seed(self.seed, request_idx) if params.seed is None else params.seed,
            max_total_tokens=total,
            output_text=OutputText(detokenizer, tuple(params.stop or ())),
            prompt=text,
            end_token_ids=frozenset() if params.ignore_eos else self._end_token_ids(),
            known_array=prompt_array,
        )
        request.metrics.arrival_time = time.monotonic()
        return request

    def _prompt_ids(self, name: str, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
            if isinstance(ids, str) or not isinstance(ids, Sequence):
                raise ValueError(f"{name}: prompt_token_ids is {ids!r}; want a list of integers")
            return prompt.get("prompt"), list(ids)
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str):
            raise ValueError(f'{name} is {prompt!r}; want text or {{"prompt_token_ids": [...]}}')
        return text, self._require_tokenizer("a prompt of text").encode(text)

    def _end_token_ids(self) -> frozenset[int]:
        ids = self.generation_config.eos_token_id
        if not ids and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_ids
        return frozenset(ids)

    def _output(self, request: Request) -> RequestOutput:
        output = request.output()
        completion = output.outputs[0]
        if completion.logprobs is not None and self.tokenizer is not None:
            completion.logprobs = [self._with_text(found) for found in completion.logprobs]
        return output

    def _with_text(self, found: dict[int, Logprob]) -> dict[int, Logprob]:
        tokenizer = self._require_tokenizer("log-probabilities with text")
        return {i: replace(one, decoded_token=tokenizer.decode([i])) for i, one in found.items()}

    def _require_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{purpose} needs a tokenizer, and this model came without one; "
                'a prompt may be {"prompt_token_ids": [...]}'
            )
        return self.tokenizer


def _checked_ids(
    name: str, ids: list[Any], vocab_size: int, max_model_len: int
) -> tuple[list[int], NDArray[np.int64]]:
    """Token ids as plain integers, as a list and as an array."""
    if not ids:
        raise ValueError(f"{name} is empty; want at least one token")
    # A long prompt is looked at as a whole; what is wrong with a bad one is told token by token.
    array = _plain_ids(ids, vocab_size)
    for idx, token_id in enumerate(ids if array is None else ()):
        is_integer = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not is_integer or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{name}: token {idx} is {token_id!r}; want an integer, 0 to {vocab_size - 1}"
            )
    if len(ids) >= max_model_len:
        raise ValueError(
            f"{name} has {len(ids):,} tokens; max_model_len is {max_model_len:,}, which must hold "
            "the prompt and at least one token more"
        )
    if array is None:
        ids = [int(token_id) for token_id in ids]
        array = np.array(ids, np.int64)
    return ids, array


def _plain_ids(values: list[Any], vocab_size: int) -> NDArray[np.int64] | None:
    """The values, if all are plain integers from 0 to vocab_size - 1; no loop in Python."""
    if list(map(type, values)).count(int) < len(values):
        return None
    try:
        ids = np.fromiter(values, np.int64, len(values))
    except OverflowError:
        return None
    return ids if ids.min() >= 0 and ids.max() < vocab_size else None


def _open_tokenizer(folder: Path) -> Tokenizer | None:
    has_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return load_tokenizer(folder) if has_files else None
