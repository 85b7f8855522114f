import math

import pytest

from qnext.config.train import ScheduleConfig, StageConfig
from qnext.train.schedule import lr_scale, stage_progress


def test_wsd_warms_up_holds_and_decays_to_its_final_rate():
    schedule = ScheduleConfig(
        kind="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_lr_fraction=0.1
    )
    assert lr_scale(schedule, 0.0) == 0
    assert lr_scale(schedule, 0.05) == pytest.approx(0.5)
    assert lr_scale(schedule, 0.1) == 1
    assert lr_scale(schedule, 0.8) == 1
    assert lr_scale(schedule, 0.9) == pytest.approx(0.55)
    assert lr_scale(schedule, 1.0) == pytest.approx(0.1)


def test_cosine_and_linear_decay_from_the_end_of_the_warmup():
    cosine = ScheduleConfig(kind="cosine", warmup_fraction=0.2)
    linear = ScheduleConfig(kind="linear", warmup_fraction=0.2)
    for progress in (0.2, 0.4, 0.6, 1.0):
        decayed = (progress - 0.2) / 0.8
        assert lr_scale(linear, progress) == pytest.approx(1 - decayed)
        assert lr_scale(cosine, progress) == pytest.approx((1 + math.cos(math.pi * decayed)) / 2)


def test_a_schedule_without_warmup_starts_at_its_peak():
    assert lr_scale(ScheduleConfig(kind="linear", warmup_fraction=0.0), 0.0) == 1


def test_progress_outside_the_stage_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        lr_scale(ScheduleConfig(), 1.5)


def test_a_time_budget_pulls_the_schedule_forward_and_never_back():
    stage = StageConfig(
        name="s",
        tokens=1000,
        mixture={"a": 1.0},
        context=10,
        batch_tokens=10,
        time_budget_minutes=10.0,
    )
    assert stage_progress(stage, 500, 60.0) == pytest.approx(0.5)
    assert stage_progress(stage, 500, 480.0) == pytest.approx(0.8)
    assert stage_progress(stage, 500, 6000.0) == 1.0


@pytest.mark.parametrize(
    "change, match",
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"mixture": {}}, "at least one source"),
        ({"mixture": {"a": -1.0}}, r"mixture\.a = -1\.0"),
        ({"micro_batch_tokens": 15}, "multiple of context = 10"),
        ({"batch_tokens": 50, "micro_batch_tokens": 20}, "multiple of micro_batch_tokens = 20"),
        ({"time_budget_minutes": 0.0}, "time_budget_minutes = 0.0"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(change, match):
    values = {"name": "s", "tokens": 100, "mixture": {"a": 1.0}, "context": 10, "batch_tokens": 10}
    with pytest.raises(ValueError, match=match):
        StageConfig(**{**values, **change})


def test_a_schedule_longer_than_its_stage_is_refused():
    with pytest.raises(ValueError, match="at most 1 together"):
        ScheduleConfig(warmup_fraction=0.6, decay_fraction=0.6)
