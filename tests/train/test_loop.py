import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from qnext.cli.main import main
from qnext.config.toml import from_table
from qnext.config.train import TrainConfig
from qnext.model.qwen3_next import Qwen3Next
from qnext.train.checkpoint import find_latest
from qnext.train.loop import Trainer
from tests.data.corpus import prepare_corpus, write_jsonl
from tests.train.tiny import SIZES, resume_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))[0]


def run_table(shards, output, **changes):
    """Two stages of 8 and 6 steps; the second has another mixture, context and rope base."""
    table = {
        "output": str(output),
        "seed": 3,
        "model": {"preset": "nano", "override": {**SIZES, "num_hidden_layers": 2}},
        "data": {"shards": str(shards)},
        "optimizer": {"kind": "muon"},
        "loss": {"mtp_steps": 2, "balance_counts": "exact"},
        "runtime": {"device": "cpu", "dtype": "float32", "num_threads": 1},
        "log": {
            "every_steps": 2,
            "checkpoint_every_steps": 3,
            "routing_every_steps": 4,
            "eval_every_steps": 0,
            "sample_every_steps": 0,
            "tensorboard": False,
        },
        "stage": [
            {
                "name": "general",
                "tokens": 8 * 128,
                "context": 32,
                "batch_tokens": 128,
                "micro_batch_tokens": 64,
                "mixture": {"short": 1.0, "long": 1.0},
            },
            {
                "name": "chat",
                "tokens": 6 * 128,
                "context": 64,
                "batch_tokens": 128,
                "rope_theta": 2e6,
                "mixture": {"chat": 1.0, "pieces": 1.0},
                "schedule": {"kind": "cosine", "lr": 1e-3},
            },
        ],
    }
    return {**table, **changes}


def train(table, *, resume=False):
    trainer = Trainer(from_table(TrainConfig, table), resume=resume)
    return trainer, trainer.run()


def records(folder, kind):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights_bytes(folder):
    return {
        path.name: path.read_bytes()
        for path in sorted((folder / "model").iterdir())
        if path.suffix == ".safetensors"
    }


def has_reached(folder, step):
    """Whether a run that is still writing has logged this step; its last line may be torn."""
    log = Path(folder) / "log.jsonl"
    return log.exists() and f'"train", "step": {step},' in log.read_text()


def start(table):
    """A process of its own, forked from a server that has imported torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qnext.train.loop"])
    process = context.Process(target=resume_run, args=(table,))
    process.start()
    return process


def kill_when(process, condition):
    """kill -9 the process as soon as condition() holds; False when it ended before."""
    while process.is_alive():
        if condition():
            process.kill()
            process.join()
            return True
        time.sleep(0.0005)
    return False


GPU_RUNTIME = {"device": "cuda", "dtype": "bfloat16", "deterministic": True}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_run_goes_on_bit_by_bit(shards, tmp_path, device):
    runtime = {} if device == "cpu" else {"runtime": GPU_RUNTIME}
    whole = start(run_table(shards, tmp_path / "whole", **runtime))
    whole.join()
    assert whole.exitcode == 0
    expected = weights_bytes(tmp_path / "whole")
    assert expected

    killed = tmp_path / "killed"
    table = run_table(shards, killed, **runtime)
    checkpoints = killed / "checkpoints"
    points = [
        # Inside the first save, between two saves, inside a save of the second stage.
        lambda: any(checkpoints.glob(".partial_*/*")),
        lambda: has_reached(killed, 8),
        lambda: any(checkpoints.glob(".partial_0000001*")),
        lambda: has_reached(killed, 14),
    ]
    num_killed = sum(kill_when(start(table), point) for point in points)
    assert num_killed >= 3
    last = start(table)
    last.join()
    assert last.exitcode == 0
    assert weights_bytes(killed) == expected
    steps = [record["step"] for record in records(killed, "train")]
    assert steps == sorted(set(steps))


def to_toml(table):
    def inline(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(inline, value))}]"
        return json.dumps(value)

    return "".join(f"{key} = {inline(value)}\n" for key, value in table.items())


def test_the_command_trains_and_the_result_can_be_measured(shards, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(run_table(shards, tmp_path / "run")))
    arguments = ["train", str(file), "--quiet", "--set", "stage.0.tokens=256"]
    assert main([*arguments, "--set", "max_minutes=1e-6"]) == 3
    assert main([*arguments, "--resume"]) == 0
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    texts = write_jsonl(tmp_path / "val.jsonl", [{"text": "One two three."}] * 3)
    model = str(tmp_path / "run/model")
    assert main(["eval", model, "--bpb", texts, "--mtp", "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["documents"] == 3
    assert result["bits_per_byte"] > 1
    assert 0 <= result["mtp_agreement"] <= 1
    assert main(["eval", model, "--bpb", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_each_stage_brings_its_rope_base_and_ends_its_schedule(shards, tmp_path):
    trainer, _ = train(run_table(shards, tmp_path / "run"))
    assert trainer.model.config.rope.theta == 2e6
    saved = Qwen3Next.from_pretrained(tmp_path / "run/model")
    assert saved.config.rope.theta == 2e6
    assert Qwen3Next.from_pretrained(tmp_path / "run/model-general").config.rope.theta == 1e6
    logged = records(tmp_path / "run", "train")
    assert {record["stage"] for record in logged} == {"general", "chat"}
    assert logged[-1]["lr"] < 1e-4
    assert logged[-1]["tokens"] == 14 * 128
    assert sum(record["skipped"] for record in logged) == 0
    routing = records(tmp_path / "run", "routing")[0]
    assert set(routing["entropy"]) == {"layer_0", "layer_1", "layer_2", "layer_3"}


def test_the_exported_model_is_the_trained_one_in_bfloat16(shards, tmp_path):
    trainer, _ = train(run_table(shards, tmp_path / "run"))
    saved = Qwen3Next.from_pretrained(tmp_path / "run/model")
    params = dict(trainer.model.named_parameters())
    for name, param in saved.named_parameters():
        is_decay = name.endswith((".A_log", ".dt_bias"))
        assert param.dtype == (torch.float32 if is_decay else torch.bfloat16), name
        assert torch.equal(param, params[name].to(param.dtype)), name
    assert (tmp_path / "run/model/tokenizer.json").is_file()


def test_a_time_limit_stops_with_a_checkpoint_and_resume_finishes(shards, tmp_path):
    table = run_table(shards, tmp_path / "run", max_minutes=1e-6)
    _, outcome = train(table)
    assert outcome == "stopped"
    assert find_latest(tmp_path / "run/checkpoints") is not None
    with pytest.raises(ValueError, match="--resume"):
        train(table)
    _, outcome = train(run_table(shards, tmp_path / "run"), resume=True)
    assert outcome == "finished"


def test_evaluation_samples_and_tensorboard_are_written(shards, tmp_path):
    validation = write_jsonl(tmp_path / "val.jsonl", [{"text": "One two three."}] * 3)
    table = run_table(shards, tmp_path / "run")
    table["data"]["validation"] = {"numbers": validation}
    table["log"] |= {"eval_every_steps": 5, "sample_every_steps": 7, "sample_tokens": 3}
    table["log"]["tensorboard"] = True
    pytest.importorskip("tensorboard")
    train(table)
    evaluations = records(tmp_path / "run", "eval")
    assert [record["step"] for record in evaluations] == [5, 8, 10, 14]
    assert 1 < evaluations[0]["numbers"]["bits_per_byte"] < 20
    assert 0 <= evaluations[0]["numbers"]["mtp_agreement"] <= 1
    assert "Once upon a time" in records(tmp_path / "run", "sample")[0]
    assert any((tmp_path / "run/tensorboard").iterdir())


def test_too_many_skipped_steps_stop_the_run_and_name_the_batch(shards, tmp_path):
    table = run_table(shards, tmp_path / "run")
    table["optimizer"] = {"max_skipped_steps": 2}
    trainer = Trainer(from_table(TrainConfig, table), resume=False)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="2 steps in a row were skipped.*rows .*document"):
        trainer.run()
    skips = records(tmp_path / "run", "skip")
    assert [record["step"] for record in skips] == [1, 2]
    assert "document" in skips[0]["batch"]


def test_a_run_that_does_not_fit_its_data_is_refused(shards, tmp_path):
    table = run_table(shards, tmp_path / "run")
    table["stage"][0]["mixture"] = {"nowhere": 1.0}
    with pytest.raises(ValueError, match="nowhere"):
        train(table)
    table = run_table(shards, tmp_path / "other")
    table["model"]["override"]["vocab_size"] = 16
    with pytest.raises(ValueError, match="vocab_size = 16"):
        train(table)
    table["model"]["override"] = {"colour": 3}
    with pytest.raises(ValueError, match=r"model\.override\.colour"):
        train(table)
