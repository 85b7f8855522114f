"""Speed of generation on this machine: prefill, decode of 1 and 8 sequences, with and without MTP.

    python -m benchmarks.generate --model nano
    python -m benchmarks.generate --model bench-small --drafts 0 --peer transformers

A preset other than nano gets random weights, whose drafts are never accepted: compare those
without MTP only. Prefill is prompt length over the time of prompt and first token; decode is
B * n over the time from when all sequences have their first token to the end. The configurations
take turns, so that a disturbance of the machine falls on all of them; a greedy check first makes
sure that all of them write the same tokens.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import Measurement, environment, print_report
from qnext.config.presets import PRESETS, preset
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from qnext.runtime.device import resolve_dtype

SHIPPED = "nano"
PROMPTS = (
    "Once upon a time there was a little fox who lived at the edge of the forest.",
    "The old man walked slowly down to the harbour, where the boats",
    "In the morning the children ran out into the garden and",
    "It was a cold night, and nobody in the village expected a visitor.",
    "She opened the letter and read it twice before she",
    "The king had three sons, and the youngest of them",
    "Far away behind the mountains there is a lake which",
    "Nobody knew where the strange bird had come from, but",
)

Prompt = str | dict[str, list[int]]


@dataclass(frozen=True)
class Timing:
    """One call of generate: wall seconds, those after the first tokens, what was written."""

    seconds: float
    decode_seconds: float
    token_ids: list[list[int]]
    acceptance: float | None  # share of drafts


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default=SHIPPED, help="nano, a checkpoint folder, or a preset (random weights)")
    add("--dtype", default="auto", help="float32, bfloat16 or auto")
    add("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    add("--repeats", type=int, default=5, help="rounds; the median is reported")
    add("--prefill", type=int, nargs="*", default=[512, 2048], help="prompt lengths, in tokens")
    add("--batch", type=int, nargs="*", default=[1, 8], help="sequences decoded together")
    add("--tokens", type=int, default=64, help="tokens decoded per sequence")
    add("--drafts", nargs="*", default=["0", "1", "2", "3", "auto"], help="drafts per step")
    add("--peer", choices=["transformers"], help="measure this library too, on the same weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    first = open_model(args)
    engines = {drafts: engine_for(args, first, drafts) for drafts in args.drafts}
    measurements = measure_prefill(args, next(iter(engines.values())))
    measurements += measure_decode(args, engines)
    if args.peer:
        measurements += measure_transformers(args, first)
    print_report(measurements, environment(torch.get_num_threads()))


def open_model(args: argparse.Namespace) -> LLM:
    """The shipped model or a checkpoint; for another preset, random weights."""
    if args.model == SHIPPED or args.model not in PRESETS:
        return LLM(args.model, dtype=args.dtype, device="cpu", num_speculative_tokens=0)
    dtype = torch.bfloat16 if args.dtype == "auto" else resolve_dtype(args.dtype)
    model = Qwen3Next(preset(args.model), dtype=dtype)
    init_weights(model, model.config, seed=0)
    return LLM.from_model(model, num_speculative_tokens=0, max_model_len=1024)


def engine_for(args: argparse.Namespace, first: LLM, drafts: str) -> LLM:
    """The same weights with this many drafts per step."""
    return LLM.from_model(
        first.model,
        first.tokenizer,
        first.generation_config,
        max_model_len=max([*args.prefill, 256 + args.tokens]) + 2,
        max_num_seqs=max([*args.batch, 1]),
        num_speculative_tokens=drafts if drafts == "auto" else int(drafts),
    )


def random_ids(num_tokens: int, engine: LLM) -> list[int]:
    """Token ids of the model's vocabulary, the same for the same length."""
    generator = torch.Generator().manual_seed(num_tokens)
    vocab_size = engine.model.config.vocab_size
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


def run(engine: LLM, prompts: list[Prompt], num_tokens: int) -> Timing:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    drafted = sum(output.metrics.num_draft_tokens for output in outputs)
    accepted = sum(output.metrics.num_accepted_tokens for output in outputs)
    # Prompts are read one after another before any sequence goes on.
    first = max(output.metrics.first_token_time or 0.0 for output in outputs)
    last = max(output.metrics.finished_time or 0.0 for output in outputs)
    return Timing(
        seconds,
        last - first,
        [list(output.outputs[0].token_ids) for output in outputs],
        accepted / drafted if drafted else None,
    )


def measure_prefill(args: argparse.Namespace, engine: LLM) -> list[Measurement]:
    """Tokens per second until the first token, one sequence."""
    prompts: dict[int, Prompt] = {
        n: {"prompt_token_ids": random_ids(n, engine)} for n in args.prefill
    }
    seconds: dict[int, list[float]] = {length: [] for length in prompts}
    for repeat in range(args.repeats + 1):
        for length, prompt in prompts.items():
            timing = run(engine, [prompt], 1)
            if repeat:  # the first round warms up
                seconds[length].append(timing.seconds)
    return [
        Measurement(f"prefill {length:,} tokens", "tok/s", tuple(length / s for s in values))
        for length, values in seconds.items()
    ]


def decode_prompts(engine: LLM, count: int) -> list[Prompt]:
    """Beginnings of sentences, or random ids for a model without a tokenizer."""
    if engine.tokenizer is None:
        return [{"prompt_token_ids": random_ids(16 + index, engine)} for index in range(count)]
    return [PROMPTS[index % len(PROMPTS)] for index in range(count)]


def measure_decode(args: argparse.Namespace, engines: dict[str, LLM]) -> list[Measurement]:
    """Tokens per second after the first token, all sequences together."""
    measurements = []
    for count in args.batch:
        prompts = decode_prompts(next(iter(engines.values())), count)
        check_equal_outputs(engines, prompts, args.tokens)
        values: dict[str, list[float]] = {drafts: [] for drafts in engines}
        notes = {}
        for _ in range(args.repeats):
            for drafts, engine in engines.items():
                timing = run(engine, prompts, args.tokens + 1)
                values[drafts].append(count * args.tokens / timing.decode_seconds)
                share = timing.acceptance
                notes[drafts] = "" if share is None else f"accepted {share:.0%} of drafts"
        names = {drafts: f"decode {count} x {args.tokens}, k = {drafts}" for drafts in engines}
        measurements += [
            Measurement(name, "tok/s", tuple(values[drafts]), names.get("0"), notes[drafts])
            for drafts, name in names.items()
        ]
    return measurements


def check_equal_outputs(engines: dict[str, LLM], prompts: list[Prompt], num_tokens: int) -> None:
    """Speed counts only on right answers: every number of drafts must give the same tokens.

    Raises:
        ValueError: two configurations differ, with their names.
    """
    written = {name: run(engine, prompts, num_tokens).token_ids for name, engine in engines.items()}
    first = next(iter(written))
    for name, tokens in written.items():
        if tokens != written[first]:
            raise ValueError(f"greedy tokens with k = {name} differ from those with k = {first}")


def measure_transformers(args: argparse.Namespace, engine: LLM) -> list[Measurement]:
    """The same weights and prompts through Hugging Face transformers, eager, one sequence."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        engine.model.save_pretrained(folder)
        peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=engine.model.dtype)
    peer.eval()

    def seconds_of(ids: list[int], num_tokens: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            peer.generate(
                torch.tensor([ids]),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )
        return time.perf_counter() - start

    def repeated(value: Callable[[], float]) -> tuple[float, ...]:
        value()
        return tuple(value() for _ in range(args.repeats))

    measurements = []
    for length in args.prefill:
        ids = random_ids(length, engine)
        values = repeated(lambda ids=ids: len(ids) / seconds_of(ids, 1))  # type: ignore[misc]
        name = f"transformers prefill {length:,} tokens"
        measurements.append(Measurement(name, "tok/s", values, f"prefill {length:,} tokens"))
    ids = random_ids(16, engine)
    count = args.tokens
    values = repeated(lambda: count / (seconds_of(ids, count + 1) - seconds_of(ids, 1)))
    baseline = f"decode 1 x {count}, k = 0"
    name = f"transformers decode 1 x {count}"
    return [*measurements, Measurement(name, "tok/s", values, baseline)]


if __name__ == "__main__":
    main()
