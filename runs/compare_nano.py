"""Compare the nano model's training with its dense twin's, from their logs.

    python runs/compare_nano.py

For each figure that the twin reached: what the nano model had spent when it was as good. Undecayed
figures are met on the undecayed part of the nano's curve; the twin's best one, at the end of its
decay, on the whole of it, which understates the nano: its own decay was not over by then.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "qnext" / "assets" / "nano" / "training_log.jsonl"
TWIN = ROOT / "docs" / "figures" / "data" / "nano_dense_log.jsonl"
# Stages whose figures compare; `long` and `instructions` follow other texts.
UNDECAYED, DECAYED = "general", "dense"

Row = dict[str, float]


def measurements(path: Path, stages: tuple[str, ...]) -> list[Row]:
    """Every evaluation in these stages with the tokens, FLOPs and seconds spent until then."""
    rows: list[Row] = []
    tokens = flops = 0.0
    last: dict[str, float | str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            per_token = record["flops_per_second"] / record["tokens_per_second"]
            flops += (record["tokens"] - tokens) * per_token
            tokens = record["tokens"]
            last = record
        elif record["kind"] == "eval" and last["stage"] in stages:
            rows.append(
                {
                    "bits_per_byte": record["en_val"]["bits_per_byte"],
                    "tokens": tokens,
                    "flops": flops,
                    "seconds": float(last["seconds"]),
                }
            )
    return rows


def spent_at(rows: list[Row], bits_per_byte: float) -> Row | None:
    """What a run had spent when it came to this figure, interpolated in log tokens."""
    for before, after in zip(rows, rows[1:], strict=False):
        high, low = before["bits_per_byte"], after["bits_per_byte"]
        if high >= bits_per_byte >= low:
            share = (high - bits_per_byte) / (high - low)
            return {
                key: math.exp((1 - share) * math.log(before[key]) + share * math.log(after[key]))
                for key in ("tokens", "flops", "seconds")
            }
    return None


def main() -> None:
    """Print one line per figure of the twin."""
    undecayed = measurements(NANO, (UNDECAYED,))
    whole = measurements(NANO, (UNDECAYED, DECAYED))
    cases = [(row, undecayed, "undecayed") for row in measurements(TWIN, (UNDECAYED,))]
    cases.append((measurements(TWIN, (DECAYED,))[-1], whole, "decayed "))
    for twin, curve, kind in cases:
        nano = spent_at(curve, twin["bits_per_byte"])
        if nano is None:
            continue
        ratios = ", ".join(
            f"{key} {twin[key]:.3g} / {nano[key]:.3g} = {twin[key] / nano[key]:.2f}"
            for key in ("tokens", "flops", "seconds")
        )
        print(f"{kind} {twin['bits_per_byte']:.4f}: twin / nano {ratios}")


if __name__ == "__main__":
    main()
