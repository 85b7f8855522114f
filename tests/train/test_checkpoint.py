import pytest
import torch

from qnext.train.checkpoint import TrainingState, find_latest, load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


def state(step):
    return TrainingState(
        step=step,
        model={"w": torch.full((3,), float(step))},
        optimizer={"adamw.step/w": torch.tensor(float(step))},
        counters={"tokens": step * 10, "loader": {"position": [1, 2]}},
    )


def test_a_checkpoint_round_trips_with_the_random_state(tmp_path):
    torch.manual_seed(3)
    path = save_checkpoint(tmp_path, state(7), keep=1)
    expected = torch.rand(4)
    torch.manual_seed(99)
    loaded = load_checkpoint(path, device=CPU, restore_random=True)
    assert torch.equal(torch.rand(4), expected)
    assert loaded.step == 7
    assert loaded.counters == state(7).counters
    assert torch.equal(loaded.model["w"], state(7).model["w"])
    assert torch.equal(loaded.optimizer["adamw.step/w"], torch.tensor(7.0))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000010"]
    assert find_latest(tmp_path).name == "step_00000010"


def test_a_folder_left_by_a_killed_save_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, state(1), keep=2)
    leftover = tmp_path / ".partial_00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert find_latest(tmp_path).name == "step_00000001"
    save_checkpoint(tmp_path, state(2), keep=2)
    assert not leftover.exists()
    assert load_checkpoint(find_latest(tmp_path), device=CPU, restore_random=False).step == 2


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert find_latest(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_corrupt_file_is_named(tmp_path, name):
    path = save_checkpoint(tmp_path, state(1), keep=1)
    (path / name).write_bytes(b"\x00\x01")
    with pytest.raises(ValueError, match="step_00000001"):
        load_checkpoint(path, device=CPU, restore_random=False)
