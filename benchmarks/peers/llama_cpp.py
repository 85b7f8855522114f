"""Worker: llama.cpp through the low-level functions of llama-cpp-python, decode calls only.

Numbers for the quantiser are llama.cpp's `llama_ftype`. A variant may set `ubatch`, the tokens that
one pass over the weights takes at most, and `flash`, whether attention is computed in one go.
"""

import ctypes
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Answer, Peer, Unsupported, Variant, serve, timed_import

FILE_TYPES = {"int8": 7, "q4": 15}  # Q8_0 and Q4_K_M
DEFAULT_UBATCH = 512
MAX_CONTEXTS = 8  # their buffers take memory; a run has five shapes, and variants while choosing


class LlamaCppPeer(Peer):
    """A GGUF file, mapped; one context for each shape of work, the last few kept.

    A job without a model only offers `quantize`.
    """

    def __init__(self, job: Answer) -> None:
        self.api = timed_import(job, _import_engine)
        self.numpy = __import__("numpy")
        _silence(self.api)
        self.threads, self.max_tokens = job["threads"], job.get("max_tokens", 0)
        self.contexts: dict[tuple[Any, ...], Any] = {}
        self.info: Answer = describe(self.api)
        if "model" not in job:
            return
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(os.fsencode(job["model"]), params)
        if not self.model:
            raise Unsupported(f"llama.cpp cannot open {Path(job['model']).name}")
        vocab = self.api.llama_model_get_vocab(self.model)
        self.vocab_size = self.api.llama_vocab_n_tokens(vocab)

    def prefill(self, prompt: list[int], variant: Variant) -> float:
        return self.decode([prompt], 0, variant)[0]

    def decode(
        self, prompts: list[list[int]], num_tokens: int, variant: Variant
    ) -> tuple[float, float, list[list[int]]]:
        longest = max(map(len, prompts)) + num_tokens + 1
        context = self._context(len(prompts), longest, variant)
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        prompt_batches = [self._prompt_batch(prompt, idx) for idx, prompt in enumerate(prompts)]
        count = len(prompts)
        step = self.api.llama_batch_init(count, 0, 1)
        step.n_tokens = count
        for idx, prompt in enumerate(prompts):
            step.n_seq_id[idx], step.seq_id[idx][0], step.logits[idx] = 1, idx, 1
            step.pos[idx] = len(prompt)
        tokens, positions = self._array(step.token, count), self._array(step.pos, count)
        start = time.perf_counter()
        for idx, batch in enumerate(prompt_batches):
            self._run(context, batch)
            tokens[idx] = self._rows(context, 1).argmax()
        first = time.perf_counter()
        columns = [tokens.tolist()]
        for _ in range(num_tokens):
            self._run(context, step)
            tokens[:] = self._rows(context, count).argmax(-1)
            positions += 1
            columns.append(tokens.tolist())
        end = time.perf_counter()
        for batch in (*prompt_batches, step):
            self.api.llama_batch_free(batch)
        return end - start, end - first, [list(row) for row in zip(*columns, strict=True)]

    def logits(self, prompt: list[int]) -> list[float]:
        """Keys and values in float32, plain attention: its other kernels round to 16 bits."""
        context = self._context(1, len(prompt) + 1, {"flash": False, "is_exact": True})
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        batch = self._prompt_batch(prompt, 0)
        self._run(context, batch)
        self.api.llama_batch_free(batch)
        values: list[float] = self._rows(context, 1)[0].tolist()
        return values

    def _context(self, num_seqs: int, num_tokens: int, variant: Variant) -> Any:
        key = (num_seqs, num_tokens, *sorted(variant.items()))
        if key in self.contexts:
            self.contexts[key] = self.contexts.pop(key)  # the one used last stands last
            return self.contexts[key]
        params = self.api.llama_context_default_params()
        params.n_ctx = num_seqs * num_tokens
        params.n_seq_max = num_seqs
        params.n_batch = num_tokens  # the longest prompt goes in with one call
        params.n_ubatch = min(variant.get("ubatch", DEFAULT_UBATCH), num_tokens)
        params.n_threads = params.n_threads_batch = self.threads
        if "flash" in variant:
            params.flash_attn_type = int(variant["flash"])
        if variant.get("is_exact"):
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise Unsupported(f"llama.cpp makes no context of {params.n_ctx} tokens")
        while len(self.contexts) >= MAX_CONTEXTS:
            self.api.llama_free(self.contexts.pop(next(iter(self.contexts))))
        self.contexts[key] = context
        return context

    def _prompt_batch(self, prompt: list[int], seq_id: int) -> Any:
        batch = self.api.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for position, token_id in enumerate(prompt):
            batch.token[position], batch.pos[position] = token_id, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, seq_id
            batch.logits[position] = position == len(prompt) - 1
        return batch

    def _run(self, context: Any, batch: Any) -> None:
        code = self.api.llama_decode(context, batch)
        if code:
            raise Unsupported(f"llama_decode of {batch.n_tokens} tokens returned {code}")

    def _rows(self, context: Any, count: int) -> Any:
        """Logits of the rows that the last batch asked for, where the library keeps them."""
        return self._array(self.api.llama_get_logits(context), count, self.vocab_size)

    def _array(self, pointer: Any, *shape: int) -> Any:
        return self.numpy.ctypeslib.as_array(pointer, shape)


def quantize(peer: LlamaCppPeer, command: Answer) -> Answer:
    """Make a quantised file of a wide one, as llama.cpp's own tool does."""
    params = peer.api.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[command["width"]]
    params.nthread = peer.threads
    source, target = os.fsencode(command["source"]), os.fsencode(command["target"])
    code = peer.api.llama_model_quantize(source, target, ctypes.byref(params))
    if code:
        raise Unsupported(f"llama.cpp did not quantise to {command['width']}: code {code}")
    return {}


def describe(api: Any) -> Answer:
    """Versions, commit and the processor features that the build uses."""
    library = Path(api.__file__).parent / "lib"
    base = next(iter(sorted(library.glob("libggml-base.*"))), None)
    commit = None
    if base is not None:
        function = ctypes.CDLL(str(base)).ggml_commit
        function.restype = ctypes.c_char_p
        commit = function().decode()
    features = api.llama_print_system_info().decode().strip(" |")
    return {"llama-cpp-python": api.__version__, "llama.cpp": commit, "llama.cpp build": features}


def _silence(api: Any) -> None:
    """Drop the library's log lines; the callback must outlive every call."""
    callback = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    api.kept_log_callback = callback


def _import_engine() -> Any:
    import llama_cpp

    return llama_cpp


if __name__ == "__main__":
    serve(LlamaCppPeer, {"quantize": quantize})
