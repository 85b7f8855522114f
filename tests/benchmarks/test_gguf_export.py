"""The GGUF file holds the checkpoint's weights, in the layout that llama.cpp computes with."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gguf_export import check_supported, export_gguf, split_projection
from tests.engine.tiny import tiny_config, tiny_model


def test_the_projection_is_regrouped_from_heads_to_kinds():
    config = tiny_config()  # 2 key heads of 8, 4 value heads of 8: 16 + 2 * 16 rows a key head
    names = [
        f"{kind}{head}.{row}"
        for head in range(2)
        for kind, count in (("q", 8), ("k", 8), ("v", 16), ("z", 16))
        for row in range(count)
    ]
    qkv, z = split_projection(config, torch.arange(96)[:, None])
    expected = [
        f"{kind}{head}.{row}"
        for kind, count in (("q", 8), ("k", 8), ("v", 16))
        for head in range(2)
        for row in range(count)
    ]
    assert [names[row] for row in qkv[:, 0]] == expected
    assert [names[row] for row in z[:, 0]] == [
        f"z{head}.{row}" for head in (0, 1) for row in range(16)
    ]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"linear_key_head_dim": 16}, "linear_key_head_dim = 16"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ({"mlp_only_layers": (1,)}, "dense"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        check_supported(replace(tiny_config(), **change))


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_every_tensor_arrives_with_its_value(tmp_path, layout):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[bench]'")
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "model", layout=layout)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "float32")
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def equal(name, value):
        np.testing.assert_allclose(tensors[name], value, rtol=1e-6)

    equal("token_embd.weight", parameters["embed_tokens"])
    equal("output.weight", parameters["lm_head"])
    equal("output_norm.weight", parameters["norm.weight"] + 1)
    equal("blk.1.attn_q_norm.weight", parameters["layers.1.mixer.q_norm.weight"] + 1)
    equal("blk.0.attn_norm.weight", parameters["layers.0.input_layernorm.weight"] + 1)
    equal("blk.0.ssm_norm.weight", parameters["layers.0.mixer.norm.weight"])
    equal("blk.0.ssm_a", -np.exp(parameters["layers.0.mixer.A_log"]))
    gate_up = parameters["layers.2.mlp.experts_gate_up"]
    equal("blk.2.ffn_gate_exps.weight", gate_up[:, :16])
    equal("blk.2.ffn_up_exps.weight", gate_up[:, 16:])
    equal("blk.2.ffn_down_exps.weight", parameters["layers.2.mlp.experts_down"])
    assert tensors["blk.0.ssm_conv1d.weight"].shape == (64, 4)
    assert not any(name.startswith("blk.3") for name in tensors), "the MTP head has no place here"


def test_narrow_files_keep_routers_and_vectors_wide(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[bench]'")
    tiny_model().save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "bfloat16")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.1.attn_q.weight"] == "BF16"
    assert types["blk.0.ffn_down_exps.weight"] == "BF16"
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ssm_a", "blk.0.ssm_conv1d.weight"):
        assert types[name] == "F32"


def test_another_width_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[bench]'")
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        export_gguf(tmp_path, tmp_path / "model.gguf", "int8")
