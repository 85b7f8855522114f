"""`qnext bench` at tiny sizes: every part runs, every row says where it comes from."""

import json
import time

import pytest
import torch

from qnext.bench.anchors import NEXT_12L, Anchor
from qnext.bench.budget import Budget, repeated
from qnext.bench.cells import Cell
from qnext.bench.kernels import checkout_root, op_names, run_op
from qnext.bench.models import bench_config, random_model
from qnext.bench.optimizer import BenchOptimizer
from qnext.bench.options import SERVE_CELLS, BenchOptions
from qnext.bench.report import Row, Table
from qnext.bench.train import TrainCell, make_micro_batch, packed_tokens
from qnext.cli.main import main
from qnext.config.presets import preset
from qnext.kernels.dispatch import use_backend
from qnext.model.accounting import count_parameters

SERVE = ["--cells", "start", "prefill-24", "decode-2x8", "steps-1", "--max-drafts", "1"]


def bench(capsys, *arguments):
    """Exit code and the record of the last line."""
    code = main(["bench", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def by_name(part, who="qnext"):
    return {row["name"]: row for row in part["rows"] if row["who"] == who}


def test_serving_is_measured_and_recorded_in_one_json_line(capsys, tmp_path):
    path = tmp_path / "bench.json"
    options = ["--small", "--device", "cpu", "--repeats", "2", "--tokens", "64"]
    with use_backend("torch"):  # the fastest would be compiled first
        code, record = bench(capsys, "serve", *SERVE, *options, "--json", str(path))
    assert code == 0
    assert record == json.loads(path.read_text())
    assert record["torch"] == torch.__version__
    part = record["parts"]["serve"]
    rows = by_name(part)
    # Decoding so little may take less time than prefill's varied, and is then not reported.
    names = {*rows, *(entry["name"] for entry in part["skipped"])}
    assert names == {"start", "prefill-24", "decode-2x8", "steps-1", "steps-1, 1 draft"}
    assert rows["steps-1, 1 draft"]["median"] > 1
    for row in rows.values():
        assert row["spread"][0] <= row["median"] <= row["spread"][1]
        assert "limit" not in row, "limits belong to the real sizes"


def test_training_is_measured_with_its_update_apart(capsys):
    options = ["--small", "--device", "cpu", "--repeats", "1", "--moments", "bf16"]
    work = ["--train-cells", "32x16", "--accumulate", "2", "--checkpointing", "on"]
    code, record = bench(capsys, "train", *options, *work)
    assert code == 0
    row = by_name(record["parts"]["train"])["train 2 x 16"]
    assert 0 < row["update_ms"] < row["step_ms"]
    assert row["median"] == pytest.approx(2 * 32 / (row["step_ms"] / 1e3))
    assert row["checkpointing"] == "on"


def test_the_peer_has_as_many_parameters_and_does_the_same_work(capsys):
    pytest.importorskip("transformers")
    options = ["--small", "--device", "cpu", "--repeats", "1", "--peer", "transformers"]
    work = ["--cells", "prefill-8", "--train-cells", "16"]
    code, record = bench(capsys, "serve", "train", *options, *work)
    assert code == 0
    for part, name in (("serve", "prefill-8"), ("train", "train 1 x 16")):
        found = record["parts"][part]
        assert found["transformers"]["num_parameters"] == found["num_parameters"]
        assert by_name(found, "transformers")[name]["median"] > 0


@pytest.mark.gpu
def test_all_parts_but_the_kernels_run_on_a_gpu(capsys):
    code, record = bench(capsys, "serve", "train", "--small", "--repeats", "1", *SERVE)
    assert code == 0
    assert record["card"] == torch.cuda.get_device_name()
    assert by_name(record["parts"]["train"])["train 1 x 64"]["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["model"], "'model'"),
        (["serve", "--small", "--cells", "prefill-4x4"], "prefill-4x4"),
        (["train", "--small", "--train-cells", "100x64"], "100x64"),
        (["--repeats", "0"], "--repeats"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_mistakes_are_named_in_one_line(capsys, arguments, named):
    assert main(["bench", "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert named in err
    assert len(err.splitlines()) == 1


def test_without_a_gpu_the_real_sizes_are_refused(capsys):
    assert main(["bench", "serve", "--device", "cpu"]) == 2
    assert "--small" in capsys.readouterr().err


def test_time_that_is_spent_leaves_a_line_for_each_cell(capsys):
    options = ["--small", "--device", "cpu", "--seconds", "1e-6"]
    code, record = bench(capsys, "train", *options)
    assert code == 1
    assert {entry["name"] for entry in record["parts"]["train"]["skipped"]} == {
        "train 1 x 64, qnext",
        "train 2 x 32, qnext",
    }


def test_the_served_model_is_next_12l_and_the_trained_one_has_all_experts():
    config = bench_config(12, is_small=False)
    assert config == preset("next-12l")
    assert count_parameters(config, has_mtp=False).total == 20_385_346_752
    trained = bench_config(4, is_small=False)
    assert count_parameters(trained, has_mtp=False).total == 7_210_003_520
    assert trained.num_experts == 512


def test_weights_are_drawn_in_their_own_dtype_and_finite():
    config = bench_config(4, is_small=True)
    cpu = torch.device("cpu")
    model = random_model(config, has_mtp=True, dtype=torch.bfloat16, device=cpu)
    for name, parameter in model.named_parameters():
        wide = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert parameter.isfinite().all(), name
    assert float(model.embed_tokens.detach().float().std()) == pytest.approx(
        config.initializer_range, rel=0.05
    )


def test_documents_of_a_step_predict_nothing_across_their_borders():
    cell = TrainCell.parse("32x8")
    ids = packed_tokens(cell, 50, torch.Generator().manual_seed(0))
    micro = make_micro_batch(cell, ids, torch.device("cpu"))
    assert micro.num_targets == (28,)
    assert (micro.targets[0, 7::8] == -100).all()
    assert micro.batch.position_ids.tolist() == [*range(8)] * 4


def test_the_narrow_optimizer_clips_and_skips_what_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = BenchOptimizer([weight], "bf16")
    for value, is_applied in ((100.0, 1.0), (float("nan"), 0.0)):
        weight.grad = torch.full_like(weight, value)
        outcome = optimizer.step(torch.tensor(1.0))
        assert float(outcome.is_applied) == is_applied
        assert weight.grad is None
        assert weight.isfinite().all()
    assert optimizer.adamw.moments[weight].mean.dtype == torch.bfloat16
    assert len(optimizer.watch.take_seconds()) == 2


def test_cells_are_read_from_their_names():
    cells = [Cell.parse(name, 1024) for name in SERVE_CELLS]
    assert [cell.name for cell in cells] == list(SERVE_CELLS)
    assert Cell.parse("decode-8x32768", 1024) == Cell("decode", 8, 32768, "decode-8x32768")
    anchored = {cell.name for cell in cells if cell.kind != "steps"}
    assert anchored == set(NEXT_12L), "each default cell has its limit, and no limit is unused"


def test_a_row_is_held_against_limit_aim_and_peer(capsys):
    table = Table()
    table.add(Row("decode-1x8", "tok/s", (90.0, 110.0, 100.0), anchor=Anchor(200, 100, 40)))
    table.add(Row("start", "s", (21.0,), anchor=Anchor(aim=20)))
    lines = capsys.readouterr().out.splitlines()
    assert all(text in lines[0] for text in ("90.0 to 110", "50%", "met", "2.50x"))
    assert " no" in lines[1]
    assert table.ratio_note("decode-1x8", 25.0, "tok/s") == "qnext is 4.00x"
    assert table.record()["rows"][0]["spread"] == [90.0, 110.0]


def test_rounds_end_with_their_time_and_one_always_runs():
    calls = []

    def run():
        calls.append(time.sleep(0.02))
        return 1.0

    assert len(repeated(run, 3, 60)) == 3
    assert len(repeated(run, 50, 0.05)) < 4
    assert len(repeated(run, 3, 0)) == 1


def test_time_left_over_goes_to_later_pieces():
    budget = Budget(100, 4)
    assert budget.next_seconds() == pytest.approx(25, abs=1)
    assert budget.next_seconds() == pytest.approx(33.3, abs=1)
    assert Budget(0, 2).next_seconds() == 0


def test_kernel_measurements_are_found_and_tuners_left_out():
    root = checkout_root()
    assert root is not None
    names = op_names(root)
    assert {"gated_delta_rule", "elementwise", "adamw"} <= set(names)
    assert not [name for name in names if name.startswith(("tune", "_"))]
    shared = {"checks", "timing", "compile_ahead", "rows_cases", "rows_checks", "rows_sweep"}
    assert not shared & set(names), "modules that measure nothing by themselves"


def test_a_kernel_measurement_runs_in_a_process_and_is_ended_in_time(tmp_path, capsys):
    folder = tmp_path / "benchmarks" / "ops"
    folder.mkdir(parents=True)
    (folder / "quick.py").write_text("print('a row')\nprint('{\"us\": 3}')\n")
    (folder / "slow.py").write_text("import time\nprint('first row')\ntime.sleep(60)\n")
    (folder / "red.py").write_text("raise SystemExit(1)\n")
    assert run_op(tmp_path, "quick", 60) == ({"us": 3}, None)
    assert run_op(tmp_path, "red", 60) == (None, "exit code 1")
    record, problem = run_op(tmp_path, "slow", 2)
    assert record is None
    assert "--seconds" in problem
    out = capsys.readouterr().out
    assert "a row" in out
    assert "first row" in out
    assert '"us"' not in out


def test_counts_below_one_are_refused_by_name():
    with pytest.raises(ValueError, match="--train-layers is 0"):
        BenchOptions(train_layers=0)
