"""Whether greedy text depends on drafts or company: the share of equal outputs, and near ties.

    python -m benchmarks.identity --model nano --device cuda

On a CPU every output is equal by construction. A GPU's products choose their blocking from the
number of rows, so there two nearly equal logits can change places; where two texts part, the gap
between the two largest logits says how near they were.
"""

import argparse
import json

import torch

from benchmarks.prompts import PROMPTS
from qnext.engine.llm import LLM
from qnext.engine.request import SamplingParams


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.identity", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="nano", help="nano or a checkpoint folder")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", default="auto", help="float32, bfloat16 or auto")
    add("--tokens", type=int, default=128, help="tokens written for each prompt")
    add("--drafts", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="drafts per step")
    add("--batch", type=int, nargs="*", default=[1, 3, 8], help="sequences at once")
    return parser.parse_args()


def main() -> None:
    """Generate in every way, compare with one sequence and no drafts, print."""
    args = parse_arguments()
    first = LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=1,
        max_model_len=1024,
        num_speculative_tokens=0,
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens, ignore_eos=True)
    outputs = first.generate(list(PROMPTS), params)
    prompts = [{"prompt_token_ids": output.prompt_token_ids} for output in outputs]
    expected = [output.outputs[0].token_ids for output in outputs]
    records = []
    for num_drafts in args.drafts:
        for batch in args.batch:
            llm = LLM.from_model(
                first.model,
                max_num_seqs=batch,
                max_model_len=1024,
                num_speculative_tokens=num_drafts,
            )
            found = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            gaps = [
                gap_where_parted(first, prompt["prompt_token_ids"], one, other)
                for prompt, one, other in zip(prompts, expected, found, strict=True)
                if one != other
            ]
            share = 1 - len(gaps) / len(prompts)
            largest = max(gaps, default=0.0)
            print(
                f"{num_drafts} drafts, {batch} sequences: {share:.0%} equal, "
                f"largest top-2 gap where texts part {largest:.4f}"
            )
            records.append({"drafts": num_drafts, "batch": batch, "equal": share, "gaps": gaps})
    print(json.dumps({"device": str(first.model.device), "results": records}))


def gap_where_parted(llm: LLM, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Difference of the two largest logits at the first token that differs."""
    at = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    ids = torch.tensor(prompt + one[:at])
    top = llm.model.logits(ids)[-1].topk(2).values
    return float(top[0] - top[1])


if __name__ == "__main__":
    main()
