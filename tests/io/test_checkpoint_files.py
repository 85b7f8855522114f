"""Sharded checkpoints: round trips, indices that lie, and saves that are interrupted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qnext.io import atomic, writer
from qnext.io.reader import CheckpointReader
from qnext.io.shards import INDEX_NAME, read_entries
from qnext.io.writer import parse_size, plan_shards, write_checkpoint


def make_tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "a": torch.randn(10, 4),
        "b": torch.randn(3, dtype=torch.bfloat16),
        "c": torch.randn(20, 2, dtype=torch.float16).t(),
        "d": torch.randn(5),
    }


def save(folder, tensors, **options):
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_checkpoint(folder, specs, tensors.__getitem__, **options)


def assert_holds(folder, tensors):
    reader = CheckpointReader(folder)
    assert set(reader.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("max_shard_size", [1, 170, "1KB"])
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path, max_shard_size):
    tensors = make_tensors()
    save(tmp_path, tensors, max_shard_size=max_shard_size)
    assert_holds(tmp_path, tensors)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found.update({name: file.get_tensor(name) for name in file.keys()})
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_shards_keep_the_limit_and_a_tensor_above_it_stands_alone():
    specs = {f"t{i}": (torch.float32, (n,)) for i, n in enumerate([2, 2, 9, 1, 1, 2])}
    assert plan_shards(specs, 16) == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]


@pytest.mark.parametrize(
    "text,expected",
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("2kb", 2000)],
)
def test_sizes_are_numbers_or_text(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("size", ["5 gigs", "GB", "-1GB", 0, "0", None, float("nan"), "9" * 400])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(size)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    save(tmp_path, make_tensors(), max_shard_size=1)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone.name}: missing, but {INDEX_NAME}"):
        read_entries(tmp_path)


def edit_index(folder, change):
    index = folder / INDEX_NAME
    table = json.loads(index.read_text())
    change(table["weight_map"])
    index.write_text(json.dumps(table))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    save(tmp_path, make_tensors(), max_shard_size=1)
    edit_index(tmp_path, lambda table: table.update(a=table["b"]))
    with pytest.raises(ValueError, match="holds no tensor a, but"):
        read_entries(tmp_path)
    save(tmp_path, make_tensors())
    edit_index(tmp_path, lambda table: table.pop("a"))
    with pytest.raises(ValueError, match="holds tensor a, but"):
        read_entries(tmp_path)


@pytest.mark.parametrize("file_name", ["../x.safetensors", "sub/x.safetensors", 3, ""])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, file_name):
    save(tmp_path, make_tensors())
    edit_index(tmp_path, lambda table: table.update(a=file_name))
    with pytest.raises(ValueError, match="a plain file name"):
        read_entries(tmp_path)


def test_a_broken_index_or_none_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        read_entries(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{")
    with pytest.raises(ValueError, match=f"{INDEX_NAME}: no valid JSON"):
        read_entries(tmp_path)
    (tmp_path / INDEX_NAME).write_text("{}")
    with pytest.raises(ValueError, match="weight_map is missing"):
        read_entries(tmp_path)


def test_a_second_save_replaces_the_first_and_leaves_nothing_of_it(tmp_path):
    save_file({"a": torch.randn(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model-lora.safetensors").write_bytes(b"not ours")
    (tmp_path / "model-00001-of-00009.safetensors.tmp").write_bytes(b"left by a crash")
    for seed in range(3):
        tensors = make_tensors(seed)
        save(tmp_path, tensors, max_shard_size=170)
        assert_holds(tmp_path, tensors)
        named = set(json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"].values())
        assert {path.name for path in tmp_path.iterdir()} == {
            *named,
            INDEX_NAME,
            "model-lora.safetensors",
        }


@pytest.mark.parametrize("seed_of_old", [None, 7])
def test_a_save_that_fails_at_any_tensor_leaves_the_old_checkpoint(tmp_path, seed_of_old):
    old, new = make_tensors(7), make_tensors(8)
    folder = tmp_path / "model"
    if seed_of_old is not None:
        save(folder, old, max_shard_size=170)
    before = sorted(folder.iterdir()) if folder.exists() else []
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in new.items()}
    for failing in new:

        def get(name, failing=failing):
            if name == failing:
                raise OSError("disk full")
            return new[name]

        with pytest.raises(OSError, match="disk full"):
            write_checkpoint(folder, specs, get, max_shard_size=170)
        assert sorted(folder.iterdir()) == before
    if seed_of_old is not None:
        assert_holds(folder, old)


class Killed(BaseException):
    """Stands for the process's end: nothing after it may clean up."""


def test_a_process_killed_at_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    old, new = make_tensors(1), make_tensors(2)
    real_replace, real_unlink = atomic.os.replace, Path.unlink
    for num_steps in range(12):
        folder = tmp_path / str(num_steps)
        save(folder, old, max_shard_size=170)
        steps_left = [num_steps]

        def step(action, steps_left=steps_left):
            def run(*args, **options):
                if steps_left[0] == 0:
                    raise Killed
                steps_left[0] -= 1
                return action(*args, **options)

            return run

        monkeypatch.setattr(atomic.os, "replace", step(real_replace))
        monkeypatch.setattr(Path, "unlink", step(real_unlink))
        was_killed = False
        try:
            save(folder, new, max_shard_size=170)
        except Killed:
            was_killed = True
        monkeypatch.undo()
        reader = CheckpointReader(folder)
        found = {name: reader.read(name) for name in reader.entries}
        is_old = all(torch.equal(found[name], old[name]) for name in old)
        is_new = all(torch.equal(found[name], new[name]) for name in new)
        assert is_old != is_new
        if not was_killed:
            assert is_new
            break
        save(folder, new, max_shard_size=170)
        assert_holds(folder, new)
    else:
        pytest.fail("the save never came to its end")


def test_an_interrupt_after_the_index_is_in_place_keeps_what_it_names(tmp_path, monkeypatch):
    new = make_tensors(2)
    save(tmp_path, make_tensors(1), max_shard_size=170)
    real = writer.write_json

    def interrupted(path, table):
        real(path, table)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, new, max_shard_size=170)
    monkeypatch.undo()
    assert_holds(tmp_path, new)


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    path = tmp_path / "taken"
    path.write_text("kept")
    with pytest.raises(ValueError, match="taken: no folder can be made here: it is a file"):
        save(path, make_tensors())
    assert path.read_text() == "kept"


def mapped_mib():
    """Memory of this process that belongs to mapped files, or a skip where nobody counts it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    sizes = [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssFile:")]
    if not sizes:
        pytest.skip("this system does not count mapped files by process")
    return sizes[0]


def test_a_released_tensor_leaves_memory_and_can_be_read_again(tmp_path):
    tensors = {"large": torch.arange(8 << 20, dtype=torch.int32), "small": torch.ones(3)}
    save(tmp_path, tensors)
    reader = CheckpointReader(tmp_path)
    reader.release("small")  # never read: nothing to give back
    before = mapped_mib()
    total = reader.read("large").sum()
    assert mapped_mib() - before > 24
    reader.release("large")
    assert mapped_mib() - before < 8
    assert reader.read("large").sum() == total
    assert torch.equal(reader.read("small"), tensors["small"])
