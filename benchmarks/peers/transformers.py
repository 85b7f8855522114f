"""Worker: Hugging Face transformers, eager, its own forward and cache in a plain greedy loop."""

import time
from typing import Any

from benchmarks.peers.protocol import Answer, Peer, Variant, serve, timed_import


class TransformersPeer(Peer):
    """`AutoModelForCausalLM` in the job's width; a variant names how it runs the experts."""

    def __init__(self, job: Answer) -> None:
        transformers, self.torch = timed_import(job, _import_engine)
        self.torch.set_num_threads(job["threads"])
        transformers.utils.logging.set_verbosity_error()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(self.torch, job["width"])
        ).eval()
        self.cache_class = transformers.DynamicCache
        self.info: Answer = {"transformers": transformers.__version__}

    def prefill(self, prompt: list[int], variant: Variant) -> float:
        return self.decode([prompt], 0, variant)[0]

    def decode(
        self, prompts: list[list[int]], num_tokens: int, variant: Variant
    ) -> tuple[float, float, list[list[int]]]:
        if "experts" in variant:
            self.model.set_experts_implementation(variant["experts"])
        cache = self.cache_class(config=self.model.config)
        start = time.perf_counter()
        columns = [self._step(prompts, cache)]
        first = time.perf_counter()
        for _ in range(num_tokens):
            columns.append(self._step([[token_id] for token_id in columns[-1]], cache))
        end = time.perf_counter()
        return end - start, end - first, [list(row) for row in zip(*columns, strict=True)]

    def logits(self, prompt: list[int]) -> list[float]:
        self.model.set_experts_implementation("eager")
        values: list[float] = self._forward([prompt], None)[0].float().tolist()
        return values

    def _step(self, token_ids: list[list[int]], cache: Any) -> list[int]:
        """The next token of each sequence. All sequences are equally long, so nothing is padded."""
        chosen: list[int] = self._forward(token_ids, cache).argmax(-1).tolist()
        return chosen

    def _forward(self, token_ids: list[list[int]], cache: Any) -> Any:
        with self.torch.inference_mode():
            ids = self.torch.tensor(token_ids)
            # The cache by position: the argument's name differs between versions.
            output = self.model(
                ids, None, None, cache, use_cache=cache is not None, logits_to_keep=1
            )
            return output.logits[:, -1]


def _import_engine() -> Any:
    import torch
    import transformers

    # Reached through the package's lazy loading, which is part of what an import costs.
    _ = transformers.AutoModelForCausalLM
    return transformers, torch


if __name__ == "__main__":
    serve(TransformersPeer)
