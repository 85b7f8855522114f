"""`qnext train`: pretrain or fine-tune a model from a TOML file."""

import argparse
import os
from pathlib import Path

STOPPED = 3


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "train",
        help="pretrain or fine-tune a model from a TOML file",
        description=(
            "Train a model as a TOML file says: stages, each with its mixture of prepared shards, "
            "context, rope base and schedule. Exit code 0: finished, the model is in "
            f"<output>/model. {STOPPED}: stopped by max_minutes or a signal with a checkpoint; "
            "the same command with --resume goes on."
        ),
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="the run; see docs/training.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, such as seed=3, optimizer.kind=muon or stage.0.tokens=1000000",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in the output folder, or start where there is none",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no log lines and no progress bar, only warnings"
    )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is finished, 3 when --resume would go on."""
    from dataclasses import replace

    from qnext.config.toml import load_toml
    from qnext.config.train import TrainConfig
    from qnext.data.sources import expand_path

    config = load_toml(args.config, TrainConfig, args.overrides)
    manifest = Path(expand_path(config.data.shards)) / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"data.shards: {manifest} does not exist; `qnext data prepare` writes it")
    if config.runtime.deterministic:
        # Read by cuBLAS when torch starts it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    import logging

    from qnext.runtime.log import setup_logging
    from qnext.train.loop import Trainer

    setup_logging(logging.WARNING if args.quiet else logging.INFO)
    if args.quiet:
        config = replace(config, log=replace(config.log, progress=False))
    outcome = Trainer(config, resume=args.resume).run()
    return 0 if outcome == "finished" else STOPPED
