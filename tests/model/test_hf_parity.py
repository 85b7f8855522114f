"""The model against transformers' Qwen3NextForCausalLM, weights written by transformers."""

import math
from pathlib import Path

import pytest
import torch

from qnext.model.batch import ForwardBatch
from qnext.model.checkpoint import gather, logical_tensors
from qnext.model.qwen3_next import Qwen3Next
from tests.model.tiny import tiny_model

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 256,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
# name -> (changes of the config, tokens, log of A as the range it is drawn from)
CASES: dict[str, tuple[dict[str, object], int, tuple[float, float]]] = {
    "base": ({}, 100, (0.01, 16)),
    "slow decay": ({}, 200, (1e-4, 1e-2)),
    "fast decay": ({}, 70, (30, 60)),
    "one token": ({}, 1, (0.01, 16)),
    "whole chunk": ({}, 64, (0.01, 1)),
    "three values per key": (
        {"linear_num_key_heads": 3, "linear_num_value_heads": 9, "hidden_size": 24},
        65,
        (0.01, 1),
    ),
    "narrow keys, wide values": (
        {"linear_key_head_dim": 6, "linear_value_head_dim": 20},
        130,
        (0.01, 1),
    ),
    "dense layers": ({"mlp_only_layers": [1], "decoder_sparse_step": 1}, 50, (0.01, 1)),
    "sparse every second": ({"decoder_sparse_step": 2, "num_experts_per_tok": 1}, 50, (0.01, 1)),
    "tied, weights not renormalised": (
        {"tie_word_embeddings": True, "norm_topk_prob": False},
        77,
        (0.01, 1),
    ),
    "explicit layer types": (
        {
            "num_hidden_layers": 5,
            "layer_types": ["full_attention", "linear_attention"] * 2 + ["full_attention"],
        },
        90,
        (0.01, 1),
    ),
    "yarn": ({"rope_parameters": YARN, "max_position_embeddings": 256}, 150, (0.01, 1)),
}


def _peer(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    changes, num_tokens, (low, high) = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    values = {**BASE, **changes}
    if "rope_parameters" in values:
        del values["rope_theta"]
    config = transformers.Qwen3NextConfig(**values)
    config._attn_implementation = "eager"
    model = transformers.Qwen3NextForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                exponents = torch.rand(parameter.shape) * math.log(high / low) + math.log(low)
                parameter.copy_(exponents)
            elif parameter_name.endswith("dt_bias"):
                parameter.uniform_(-2, 1)
            elif "norm" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, torch.randint(0, 89, (num_tokens,))


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path: Path):
    model, ids = _peer(request.param)
    model.save_pretrained(tmp_path)
    ours = Qwen3Next.from_pretrained(tmp_path)
    assert not ours.has_mtp
    return model, ours, ids


def test_logits_and_gradients_are_those_of_transformers(pair):
    peer, ours, ids = pair
    expected = peer(ids[None]).logits[0]
    logits = ours.compute_logits(ours(ForwardBatch.packed(ids)))
    assert float((logits - expected).detach().norm() / expected.detach().norm()) < 1e-4
    goal = torch.randn_like(expected)
    (expected * goal).sum().backward()
    (logits * goal).sum().backward()
    # Gradients are compared under the checkpoint's names, whose rows lie elsewhere in ours.
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in ours.named_parameters()
    }
    tensors = logical_tensors(ours, "fused")
    largest = max(float(p.grad.norm()) for p in peer.parameters() if p.grad is not None)
    names = set()
    for name, parameter in peer.named_parameters():
        if parameter.grad is None:
            continue
        ours_grad = gather(tensors[name], grads, torch.float32)
        difference = float((ours_grad - parameter.grad).norm())
        limit = max(1e-3 * float(parameter.grad.norm()), 1e-6 * largest)
        assert difference <= limit, (name, difference, limit)
        names.add(name)
    assert names == set(tensors), "every tensor of the checkpoint was compared"


def test_transformers_opens_what_we_save_with_the_same_logits(tmp_path):
    for layout in ("per_expert", "fused"):
        model = tiny_model()
        model.save_pretrained(tmp_path / layout, layout=layout, max_shard_size=40_000)
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / layout, dtype=torch.float32, attn_implementation="eager"
        )
        ids = torch.randint(0, model.config.vocab_size, (100,))
        expected = peer(ids[None]).logits[0]
        assert (
            float((model.logits(ids) - expected).detach().norm() / expected.detach().norm()) < 1e-4
        )
