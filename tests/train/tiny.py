"""A model of a few thousand weights beside its embedding, and runs of it."""

import os
from dataclasses import replace

import torch

from qnext.config.presets import preset
from qnext.config.toml import from_table
from qnext.config.train import LossConfig, OptimConfig, RuntimeConfig, TrainConfig
from qnext.data.loader import PackedBatch
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from qnext.train.batches import micro_batch
from qnext.train.loop import Trainer
from qnext.train.optim import TrainOptimizer
from qnext.train.step import TrainStep

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def tiny_config(**changes):
    return replace(preset("nano"), layer_types=(), **{**SIZES, "vocab_size": 64, **changes})


def tiny_model(seed=0, **changes):
    config = tiny_config(**changes)
    model = Qwen3Next(config)
    init_weights(model, config, seed=seed)
    return model


def tiny_step(model, optim=None, **loss):
    runtime = RuntimeConfig(dtype="float32")
    optimizer = TrainOptimizer(dict(model.named_parameters()), model.config, optim or OptimConfig())
    return TrainStep(model, optimizer, LossConfig(**loss), runtime)


def packed(token_ids, seq_lens, row_tokens, loss_mask=None):
    token_ids = torch.as_tensor(token_ids)
    bounds = torch.tensor([0, *seq_lens]).cumsum(0).to(torch.int32)
    mask = torch.ones(len(token_ids), dtype=torch.uint8) if loss_mask is None else loss_mask
    return PackedBatch(token_ids, mask, bounds, row_tokens, 0, ())


def random_micro(seed, seq_lens=(20, 12, 32), row_tokens=32, num_mtp_steps=1, vocab=64, **kw):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (sum(seq_lens),), generator=generator)
    return micro_batch(packed(tokens, seq_lens, row_tokens, **kw), num_mtp_steps)


def resume_run(table):
    """Run in a process of its own, to be killed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read where deterministic is on
    Trainer(from_table(TrainConfig, table), resume=True).run()
