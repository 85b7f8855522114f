"""The stored loss curves are what their script draws from the stored logs."""

import runpy
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
FIGURES = REPO_ROOT / "docs" / "figures"


def test_loss_curves_are_drawn_from_the_logs():
    curves = runpy.run_path(str(FIGURES / "curves.py"))
    nano = curves["read_run"]("nano", REPO_ROOT / "qnext/assets/nano/training_log.jsonl")
    twin = curves["read_run"]("nano-dense", FIGURES / "data" / "nano_dense_log.jsonl")
    drawn = {
        "nano-loss": curves["draw_losses"](nano),
        "nano-vs-dense": curves["draw_comparison"]([nano, twin]),
    }
    for name, drawing in drawn.items():
        stored = (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
        assert drawing.render() == stored, f"{name}.svg is old; see docs/figures/curves.py"
