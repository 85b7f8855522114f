"""Memory of loading and saving, and the real 80B layout as sparse files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext.config.model import ModelConfig
from qnext.config.presets import preset
from qnext.io.header import encode_header, tensor_bytes
from qnext.io.hf_config import read_model_config, write_model_config
from qnext.io.names import checkpoint_shapes, layer_prefix
from qnext.io.reader import CheckpointReader
from qnext.io.shards import INDEX_NAME
from qnext.io.writer import plan_shards, write_checkpoint
from qnext.model.checkpoint import copy_in, gather, match_tensors
from qnext.model.qwen3_next import Qwen3Next

MIB = 1 << 20
SPARE_MIB = 64

MEDIUM = ModelConfig(
    vocab_size=20_000,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    num_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    shared_expert_intermediate_size=128,
)

MEASURE = """
import sys, threading, time
import torch
from qnext.io.reader import CheckpointReader
from qnext.model.checkpoint import load_model, save_model
from qnext.model.qwen3_next import Qwen3Next

source, target, dtype = sys.argv[1:]

def anonymous_bytes():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.001)

torch.ones(1000, 1000).to(torch.bfloat16).sum()
before = anonymous_bytes()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(source, dtype=dtype)
loaded = max(peak[0], anonymous_bytes()) - before
save_model(model, target)
stop.set()
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, loaded, peak[0] - before)
"""


def write_sparse(folder: Path, config: ModelConfig, max_shard_bytes: int) -> dict[str, tuple]:
    """Writes a checkpoint whose tensors are holes: all zeros, and no blocks on the disk."""
    folder.mkdir(exist_ok=True)
    write_model_config(folder, config)
    shapes = checkpoint_shapes(config, has_mtp=True)
    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    shards = plan_shards(specs, max_shard_bytes)
    weight_map = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header = encode_header({name: ("BF16", shapes[name]) for name in names})
        size = len(header) + sum(tensor_bytes("BF16", shapes[name]) for name in names)
        with open(folder / file_name, "wb") as file:
            file.write(header)
            file.truncate(size)
        weight_map |= dict.fromkeys(names, file_name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_and_saving_take_the_weights_and_little_more(tmp_path, dtype):
    write_sparse(tmp_path / "a", MEDIUM, 30 * MIB)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a"), str(tmp_path / "b"), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    weights, loaded, with_saving = map(int, result.stdout.split())
    assert weights > 100 * MIB
    assert loaded > 0.9 * weights, "the measurement missed the weights"
    assert loaded <= weights + SPARE_MIB * MIB, f"{(loaded - weights) / MIB:.0f} MiB beyond"
    assert with_saving <= weights + SPARE_MIB * MIB


@pytest.mark.slow
def test_the_real_layout_is_opened_checked_and_two_of_its_layers_are_saved_again(tmp_path):
    config = preset("next-80b-a3b")
    shapes = write_sparse(tmp_path / "a", config, 4 * 10**9)
    assert read_model_config(tmp_path / "a") == config
    reader = CheckpointReader(tmp_path / "a")
    assert len(reader.entries) == 75_944
    assert sum(entry.num_bytes for entry in reader.entries.values()) == 162_649_725_440
    tensors, report = match_tensors(config, reader, has_mtp=True)
    assert not report, str(report)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes

    model = Qwen3Next(replace(config, dtype=None), has_mtp=True, device="meta")
    for layer_idx in (2, 3):
        prefix = layer_prefix(layer_idx)
        wanted = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        layer = model.layers[layer_idx].to(torch.bfloat16).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(1)
        copy_in(model, reader, wanted.values())
        assert not any(parameter.any() for parameter in layer.parameters())
        with torch.no_grad():
            layer.mlp.experts_down[511, -1, -1] = 7.0
        parameters = dict(model.named_parameters())
        target = tmp_path / f"layer_{layer_idx}"
        write_checkpoint(
            target,
            {name: (torch.bfloat16, tensor.shape) for name, tensor in wanted.items()},
            lambda name, of=wanted, given=parameters: gather(of[name], given, torch.bfloat16),
        )
        saved = CheckpointReader(target)
        assert {name: entry.shape for name, entry in saved.entries.items()} == {
            name: tensor.shape for name, tensor in wanted.items()
        }
        assert saved.read(f"{prefix}mlp.experts.511.down_proj.weight")[-1, -1] == 7.0
        layer.to_empty(device="meta")
