"""The learning rate over one stage, as a function of how far the stage has come."""

import math

from qnext.config.train import ScheduleConfig, StageConfig


def stage_progress(stage: StageConfig, tokens: int, seconds: float) -> float:
    """Return how far a stage has come, from 0 to 1.

    The larger of the share of its tokens and, where it has one, the share of its time budget: on
    a machine slower than planned the schedule still reaches its end inside the budget.

    Args:
        stage: the stage.
        tokens: tokens seen in it so far.
        seconds: wall time spent in it so far.
    """
    total = stage.num_steps * stage.batch_tokens
    progress = tokens / total
    if stage.time_budget_minutes is not None:
        progress = max(progress, seconds / (60 * stage.time_budget_minutes))
    return min(progress, 1.0)


def lr_scale(schedule: ScheduleConfig, progress: float) -> float:
    """Return the learning rate at `progress` as a share of its peak.

    Args:
        schedule: shape of the curve.
        progress: from 0 (first step) to 1 (past the last).

    Raises:
        ValueError: progress is outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress = {progress}: must be between 0 and 1")
    if progress < schedule.warmup_fraction:
        return progress / schedule.warmup_fraction
    if schedule.kind == "wsd":
        decay_start = 1 - schedule.decay_fraction
    else:
        decay_start = schedule.warmup_fraction
    if progress <= decay_start:
        return 1.0
    decayed = (progress - decay_start) / (1 - decay_start)
    shape = 0.5 * (1 + math.cos(math.pi * decayed)) if schedule.kind == "cosine" else 1 - decayed
    return schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * shape
