"""Worker: this package, as its users call it."""

import statistics
import time
from typing import Any

from benchmarks.peers.protocol import Answer, Peer, Unsupported, Variant, serve, timed_import

PARTS_PROMPTS = 2


class QnextPeer(Peer):
    """An `LLM` of the job's width and number of drafts."""

    def __init__(self, job: Answer) -> None:
        llm_class, self.params_class = timed_import(job, _import_engine)
        try:
            self.llm = llm_class(
                job["model"],
                dtype=job["width"],
                device="cpu",
                max_model_len=job["max_tokens"],
                max_num_seqs=job["max_seqs"],
                num_threads=job["threads"],
                num_speculative_tokens=job.get("drafts", 0),
            )
        except ValueError as error:
            raise Unsupported(str(error)) from error
        self.info: Answer = {}

    def prefill(self, prompt: list[int], variant: Variant) -> float:
        return self.generate([prompt], 1)[0]

    def decode(
        self, prompts: list[list[int]], num_tokens: int, variant: Variant
    ) -> tuple[float, float, list[list[int]]]:
        total, decode, outputs = self.generate(prompts, num_tokens + 1)
        return total, decode, [list(output.outputs[0].token_ids) for output in outputs]

    def logits(self, prompt: list[int]) -> list[float]:
        import torch

        values: list[float] = self.llm.model.logits(torch.tensor(prompt))[-1].float().tolist()
        return values

    def generate(
        self, prompts: list[list[int]], num_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> tuple[float, float, list[Any]]:
        """Seconds in all, seconds after the last first token, and the outputs."""
        params = self.params_class(
            temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=seed
        )
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        seconds = time.perf_counter() - start
        # Prompts are read one after another before any sequence goes on.
        first = max(output.metrics.first_token_time or 0.0 for output in outputs)
        last = max(output.metrics.finished_time or 0.0 for output in outputs)
        return seconds, last - first, outputs


def _import_engine() -> Any:
    from qnext.engine.llm import LLM
    from qnext.engine.request import SamplingParams

    return LLM, SamplingParams


def measure_drafts(peer: QnextPeer, command: Answer) -> Answer:
    """Write after each prompt alone, timed; then once more step by step, to time the kernels."""
    from qnext.engine.metrics import EngineMetrics

    engine = peer.llm.engine
    engine.metrics = EngineMetrics()
    seconds, token_ids = 0.0, []
    options = command["num_tokens"] + 1, command["temperature"], command["seed"]
    for prompt in command["prompts"]:
        _, spent, outputs = peer.generate([prompt], *options)
        seconds += spent
        token_ids.append(list(outputs[0].outputs[0].token_ids))
    metrics = engine.metrics
    engine.metrics = EngineMetrics()
    kernels = KernelTimes()
    engine.runner.launch_rounds = lambda *args: None  # a kernel that goes on hides its parts
    try:
        for prompt in command["prompts"][:PARTS_PROMPTS]:
            peer.generate([prompt], *options)
    finally:
        del engine.runner.launch_rounds
        kernels.remove()
    return {
        "seconds": seconds,
        "token_ids": token_ids,
        "num_steps": metrics.num_decode_steps,
        "drafted": metrics.num_drafted_by_depth,
        "accepted": metrics.num_accepted_by_depth,
        "steps_by_drafts": {str(k): n for k, n in metrics.num_steps_by_speculation.items()},
        "draft_seconds": kernels.median("draft"),
        "window_seconds": kernels.median("window"),
    }


class KernelTimes:
    """Times of the compiled steps of one row a sequence in the draft layer, and of windows."""

    def __init__(self) -> None:
        from qnext.kernels.decode_step import fields, numba

        self.times: dict[str, list[float]] = {"draft": [], "window": []}
        self._module, self._run = numba, numba.run_step

        def timed(table: Any, num_threads: int) -> None:
            start = time.perf_counter()
            self._run(table, num_threads)
            kind = "draft" if table[fields.FC] else "window"
            self.times[kind].append(time.perf_counter() - start)

        numba.run_step = timed  # type: ignore[assignment]

    def median(self, kind: str) -> float:
        """Seconds of one step; 0 where there was none."""
        return statistics.median(self.times[kind] or [0.0])

    def remove(self) -> None:
        """Let the kernel be called directly again."""
        self._module.run_step = self._run


if __name__ == "__main__":
    serve(QnextPeer, {"drafts": measure_drafts})
