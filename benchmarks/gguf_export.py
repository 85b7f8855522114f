"""Write a checkpoint as a GGUF file, so that llama.cpp runs the same weights.

    python -m benchmarks.gguf_export CHECKPOINT model.gguf --dtype bfloat16

The file has token ids only, no vocabulary and no MTP head. What llama.cpp wants otherwise than a
checkpoint has it: zero-centred norms get their 1, `A_log` becomes -exp(A_log), the projection of
DeltaNet is regrouped from head by head to q, k, v and z, and experts are stacked. Quantised files
are made from this one by llama.cpp itself.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.config.model import ModelConfig
from qnext.io.hf_config import read_model_config
from qnext.io.names import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    expert_names,
    fused_names,
    layer_prefix,
)
from qnext.io.reader import CheckpointReader

ARCHITECTURE = "qwen3next"
DTYPES = ("float32", "bfloat16")

# Names in a layer of the checkpoint and in a block of the file, for tensors that stay as they are.
_ATTENTION = {
    "self_attn.q_proj.weight": "attn_q.weight",  # per head: query, then gate, in both
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
_DELTA_NET = {
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",  # per key head: b, then a, in both
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",  # not zero-centred
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
_LAYER_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
# llama.cpp keeps these matrices in float32 at every width.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ssm_conv1d.weight")


def export_gguf(folder: Path, path: Path, dtype: str = "bfloat16") -> None:
    """Write the checkpoint in `folder` to the file `path`.

    Args:
        dtype: of the matrices, one of DTYPES; vectors, routers and convolutions stay float32.

    Raises:
        ValueError: another dtype, or a configuration that llama.cpp's model cannot express.
    """
    import gguf

    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: allowed are {', '.join(DTYPES)}")
    config = read_model_config(folder)
    check_supported(config)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _add_sizes(writer, config)
    is_wide = dtype == "float32"
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if is_wide else gguf.LlamaFileType.MOSTLY_BF16)
    reader = CheckpointReader(folder)
    for name, tensor in gguf_tensors(config, reader):
        tensor = tensor.float().contiguous()
        if is_wide or tensor.dim() == 1 or name.endswith(_ALWAYS_FLOAT32):
            writer.add_tensor(name, tensor.numpy())
        else:
            narrow = tensor.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, narrow, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader.close()


def check_supported(config: ModelConfig) -> None:
    """Refuse what llama.cpp's model cannot express.

    Raises:
        ValueError: with the key, its value and what would be possible.
    """
    if not all(config.is_moe_layer(idx) for idx in range(config.num_hidden_layers)):
        raise ValueError("a layer is dense: llama.cpp wants a mixture of experts in every layer")
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise ValueError(
            f"linear_key_head_dim = {config.linear_key_head_dim} and linear_value_head_dim = "
            f"{config.linear_value_head_dim}: llama.cpp wants them equal"
        )
    if config.shared_expert_intermediate_size == 0:
        raise ValueError("shared_expert_intermediate_size = 0: llama.cpp wants a shared expert")
    if not config.norm_topk_prob:
        raise ValueError("norm_topk_prob = False: llama.cpp always normalises")
    if config.rope.rope_type != "default":
        raise ValueError(f"rope_type = {config.rope.rope_type!r}: only 'default' is exported")


def gguf_tensors(config: ModelConfig, reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
    """Yields name and content of each tensor of the file, in the file's layout."""
    yield "token_embd.weight", reader.read(EMBEDDING)
    for layer_idx in range(config.num_hidden_layers):
        for name, tensor in _layer_tensors(config, reader, layer_idx):
            yield f"blk.{layer_idx}.{name}", tensor
    yield "output_norm.weight", reader.read(FINAL_NORM).float() + 1
    if not config.tie_word_embeddings:
        yield "output.weight", reader.read(HEAD)


def _layer_tensors(
    config: ModelConfig, reader: CheckpointReader, layer_idx: int
) -> Iterator[tuple[str, Tensor]]:
    prefix = layer_prefix(layer_idx)
    is_attention = config.is_attention_layer(layer_idx)
    kept = {**(_ATTENTION if is_attention else _DELTA_NET), **_SHARED_EXPERT}
    norms = {**_LAYER_NORMS, **(_HEAD_NORMS if is_attention else {})}
    for source, target in kept.items():
        yield target, reader.read(prefix + source)
    for source, target in norms.items():
        yield target, reader.read(prefix + source).float() + 1
    if not is_attention:
        mixer = prefix + "linear_attn."
        yield "ssm_a", -reader.read(mixer + "A_log").float().exp()
        yield "ssm_conv1d.weight", reader.read(mixer + "conv1d.weight").squeeze(1)
        qkv, z = split_projection(config, reader.read(mixer + "in_proj_qkvz.weight"))
        yield "attn_qkv.weight", qkv
        yield "attn_gate.weight", z
    yield "ffn_gate_inp.weight", reader.read(prefix + "mlp.gate.weight")
    shared_gate = reader.read(prefix + "mlp.shared_expert_gate.weight")
    yield "ffn_gate_inp_shexp.weight", shared_gate.squeeze(0)
    gate, up, down = _stacked_experts(config, reader, prefix + "mlp.")
    yield "ffn_gate_exps.weight", gate
    yield "ffn_up_exps.weight", up
    yield "ffn_down_exps.weight", down


def split_projection(config: ModelConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Regroup the rows of `in_proj_qkvz`, which go key head by key head.

    Args:
        weight: per key head the rows of q, k, its value heads' v and their z. [2 (Hk K + Hv V), C]

    Returns:
        Rows of all q, then all k, then all v; and rows of all z.
    """
    num_heads, K = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.value_dim // num_heads
    per_head = weight.unflatten(0, (num_heads, 2 * K + 2 * values))  # [Hk, rows, C]
    q, k, v, z = (part.flatten(0, 1) for part in per_head.split([K, K, values, values], dim=1))
    return torch.cat([q, k, v]), z


def _stacked_experts(
    config: ModelConfig, reader: CheckpointReader, prefix: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down matrices of all experts of one layer. [E, I, C], [E, I, C], [E, C, I]"""
    gate_up, down = fused_names(prefix)
    if gate_up in reader.entries:
        gate, up = reader.read(gate_up).chunk(2, dim=1)
        return gate, up, reader.read(down)
    names = [expert_names(prefix, idx) for idx in range(config.num_experts)]
    gates, ups, downs = (
        torch.stack([reader.read(name) for name in kind]) for kind in zip(*names, strict=True)
    )
    return gates, ups, downs


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    """The keys that llama.cpp reads; `no_vocab` lets it take any token id."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.value_dim)
    writer.add_array(
        f"{ARCHITECTURE}.attention.recurrent_layers",
        [not config.is_attention_layer(idx) for idx in range(config.num_hidden_layers)],
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gguf_export", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the matrices")
    args = parser.parse_args(argv)
    export_gguf(args.checkpoint, args.file, args.dtype)


if __name__ == "__main__":
    main()
