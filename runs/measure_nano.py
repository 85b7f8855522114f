"""Measure what a nano checkpoint writes: its answers to arithmetic, and how many drafts stand.

    QNEXT_DATA=<folder of the shared data> python runs/measure_nano.py [--model PATH]

Prints one JSON object per line. Bits per byte and teacher-forced agreement: `qnext eval --mtp`.
"""

import argparse
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from qnext.data.arithmetic import exercises
from qnext.engine.llm import LLM
from qnext.engine.metrics import EngineMetrics
from qnext.engine.request import SamplingParams
from qnext.eval.loss import read_texts

SEED = 2025
SEQUENCES = 8
TEMPERATURES = (0.0, 0.7)


def measure_answers(model: str, count: int) -> None:
    """Held-out questions through the chat: how many end with the stop token, how many are right."""
    llm = LLM(model, dtype="float32", device="cpu", max_num_seqs=SEQUENCES, max_model_len=256)
    questions = list(exercises(count, SEED, "held_out"))
    conversations = [[{"role": "user", "content": q.question}] for q in questions]
    stops = set(llm.generation_config.eos_token_id)
    for temperature in TEMPERATURES:
        params = SamplingParams(temperature=temperature, max_tokens=96, seed=SEED)
        outputs = [output.outputs[0] for output in llm.chat(conversations, params)]
        ended = sum(output.token_ids[-1] in stops for output in outputs)
        right: dict[str, list[bool]] = {}
        for question, output in zip(questions, outputs, strict=True):
            right.setdefault(question.key.split()[0], []).append(question.is_right(output.text))
        result = {
            "measure": "answers",
            "questions": count,
            "temperature": temperature,
            "ended": ended / count,
            "right": sum(map(sum, right.values())) / count,
            "right_by_kind": {k: f"{sum(v)}/{len(v)}" for k, v in sorted(right.items())},
        }
        print(json.dumps(result), flush=True)


def measure_acceptance(model: str, texts: list[str], prompt_tokens: int, new_tokens: int) -> None:
    """Free-running drafts after the starts of texts, at 1 to 4 drafts a step."""
    for drafts in (1, 2, 3, 4):
        llm = LLM(
            model,
            dtype="float32",
            device="cpu",
            max_num_seqs=SEQUENCES,
            max_model_len=prompt_tokens + new_tokens,
            num_speculative_tokens=drafts,
        )
        assert llm.tokenizer is not None
        starts = [
            llm.tokenizer.encode(text[: 16 * prompt_tokens])[:prompt_tokens] for text in texts
        ]
        prompts = [{"prompt_token_ids": ids} for ids in starts]
        for temperature in TEMPERATURES:
            params = SamplingParams(
                temperature=temperature, max_tokens=new_tokens, ignore_eos=True, seed=SEED
            )
            llm.engine.metrics = EngineMetrics()
            outputs = llm.generate(prompts, params)
            print(json.dumps(_acceptance(llm.engine.metrics, drafts, temperature, outputs)))


def _acceptance(
    metrics: EngineMetrics, drafts: int, temperature: float, outputs: list[Any]
) -> dict[str, Any]:
    drafted, accepted = metrics.num_drafted_by_depth, metrics.num_accepted_by_depth
    windows = sum(output.metrics.num_windows for output in outputs)
    # Each window writes one token; the first token of an answer comes from the prompt's own pass.
    written = sum(len(output.outputs[0].token_ids) for output in outputs) - len(outputs)
    return {
        "measure": "acceptance",
        "drafts": drafts,
        "temperature": temperature,
        "prompts": len(outputs),
        "accepted_by_depth": [round(a / d, 4) for a, d in zip(accepted, drafted, strict=True)],
        "tokens_per_window": round(written / windows, 3),
        "windows": windows,
    }


def main() -> None:
    """Measure answers, then drafts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    data = os.environ.get("QNEXT_DATA")
    if not data:
        raise SystemExit("QNEXT_DATA is not set; want the folder of the shared data")
    measure_answers(args.model, args.questions)
    texts = read_texts(Path(data) / "pretrain" / "en_val.jsonl.zst")
    # From the middle of each text: titles and tables of contents stand at the start.
    middles = [text[len(text) // 2 :].partition(" ")[2] for text in islice(texts, args.prompts)]
    measure_acceptance(args.model, middles, args.prompt_tokens, args.new_tokens)


if __name__ == "__main__":
    main()
