"""Checkpoints in and out of the model: identity, layouts, strictness, dtypes, peers."""

import json
import math
from dataclasses import replace

import pytest
import torch

from qnext.config.model import ModelConfig, RopeConfig
from qnext.io.hf_config import write_model_config
from qnext.io.names import checkpoint_shapes
from qnext.io.reader import CheckpointReader
from qnext.io.shards import INDEX_NAME
from qnext.io.writer import write_checkpoint
from qnext.kernels.dispatch import use_backend
from qnext.kernels.int8_rows import quantize_rows, scale_of, widened
from qnext.model.checkpoint import CheckpointError, load_model, logical_tensors, save_model
from qnext.model.init import init_weights
from qnext.model.qwen3_next import Qwen3Next
from tests.model.tiny import tiny_model

# K differs from V, heads in odd ratios, one dense layer, both mixers: no two sizes are alike.
TINY = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=14,
    shared_expert_intermediate_size=18,
    mlp_only_layers=(1,),
    layer_types=("linear_attention", "full_attention", "linear_attention", "full_attention"),
    rope=RopeConfig(partial_rotary_factor=0.5),
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_tensors(config, *, has_mtp=True, layout="per_expert", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = checkpoint_shapes(config, has_mtp=has_mtp, layout=layout)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2).to(dtype)
        for name, shape in shapes.items()
    }


def write_tensors(folder, config, tensors, max_shard_size="5GB"):
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    write_model_config(folder, config)
    write_checkpoint(folder, specs, tensors.__getitem__, max_shard_size=max_shard_size)


def assert_holds(folder, tensors):
    reader = CheckpointReader(folder)
    assert set(reader.entries) == set(tensors)
    for name, tensor in tensors.items():
        found = reader.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_mtp", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_load_then_save_is_the_identity_of_every_byte(tmp_path, layout, dtype, has_mtp, is_tied):
    config = replace(TINY, tie_word_embeddings=is_tied)
    tensors = random_tensors(config, has_mtp=has_mtp, layout=layout, dtype=DTYPES[dtype])
    write_tensors(tmp_path / "a", config, tensors, max_shard_size=20_000)
    model = load_model(tmp_path / "a")
    assert model.has_mtp == has_mtp
    save_model(model, tmp_path / "b", layout=layout, max_shard_size=30_000)
    assert_holds(tmp_path / "b", tensors)
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == dtype


def test_special_values_and_mixed_dtypes_survive(tmp_path):
    tensors = random_tensors(TINY, dtype=torch.bfloat16)
    for i, name in enumerate(tensors):
        if i % 3 == 0:
            tensors[name] = tensors[name].float() * 1.000001
        elif i % 7 == 0:
            tensors[name].view(-1)[:2] = torch.tensor([math.nan, -0.0])
    write_tensors(tmp_path / "a", TINY, tensors)
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert_holds(tmp_path / "b", tensors)


def test_the_layouts_turn_into_each_other(tmp_path):
    tensors = random_tensors(TINY, dtype=torch.bfloat16)
    write_tensors(tmp_path / "a", TINY, tensors)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", layout="fused")
    reader = CheckpointReader(tmp_path / "b")
    gate_up = reader.read("model.layers.0.mlp.experts.gate_up_proj")
    for idx in range(TINY.num_experts):
        start = f"model.layers.0.mlp.experts.{idx}."
        both = [tensors[start + "gate_proj.weight"], tensors[start + "up_proj.weight"]]
        assert torch.equal(gate_up[idx], torch.cat(both))
    save_model(load_model(tmp_path / "b"), tmp_path / "c", layout="per_expert")
    assert_holds(tmp_path / "c", tensors)


def test_a_checkpoint_may_mix_the_layouts(tmp_path):
    tensors = random_tensors(TINY)
    fused = random_tensors(TINY, layout="fused", seed=0)
    mixed = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.2.mlp.experts.")
    }
    mixed |= {name: fused[name] for name in fused if name.startswith("model.layers.2.mlp.experts.")}
    write_tensors(tmp_path / "a", TINY, mixed)
    assert load_model(tmp_path / "a").has_mtp


def test_every_row_of_every_parameter_is_filled_exactly_once():
    model = Qwen3Next(TINY, device="meta")
    parameters = dict(model.named_parameters())
    for layout in ("per_expert", "fused"):
        rows = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in parameters.items()}
        for tensor in logical_tensors(model, layout).values():
            for part in tensor.parts:
                target = rows[part.parameter]
                target = target if part.expert_idx is None else target[part.expert_idx]
                target[part.start : part.stop] += 1
        assert all((count == 1).all() for count in rows.values())


def test_rows_are_deinterleaved_as_the_layers_expect(tmp_path):
    tensors = random_tensors(TINY)
    write_tensors(tmp_path, TINY, tensors)
    model = load_model(tmp_path)
    D, Hq = TINY.head_dim, TINY.num_attention_heads
    q_proj = tensors["model.layers.1.self_attn.q_proj.weight"].view(Hq, 2, D, -1)
    qkv = model.layers[1].mixer.qkv_proj
    assert torch.equal(qkv[: Hq * D], q_proj[:, 0].reshape(Hq * D, -1))
    assert torch.equal(qkv[Hq * D : 2 * Hq * D], q_proj[:, 1].reshape(Hq * D, -1))
    qkvz = tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    K, V, Hk, Hv = 8, 12, 2, 6
    group = qkvz.view(Hk, 2 * K + 2 * (Hv // Hk) * V, -1)
    in_proj = model.layers[0].mixer.in_proj
    assert torch.equal(in_proj[K : 2 * K], group[1, :K])
    first_value = in_proj[2 * Hk * K :]
    assert torch.equal(first_value[3 * V : 4 * V], group[1, 2 * K : 2 * K + V])
    ba = tensors["model.layers.0.linear_attn.in_proj_ba.weight"].view(Hk, 2, Hv // Hk, -1)
    assert torch.equal(in_proj[-Hv:], ba[:, 1].reshape(Hv, -1))


def test_missing_unexpected_and_misshapen_tensors_are_each_listed(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.extra"] = torch.zeros(2)
    tensors["model.layers.2.linear_attn.A_log"] = torch.zeros(7)
    write_tensors(tmp_path, TINY, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    error = caught.value
    assert isinstance(error, ValueError)
    assert set(error.missing) == {
        "model.norm.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
    }
    assert error.unexpected == ("model.layers.0.extra",)
    assert error.misshapen == ("model.layers.2.linear_attn.A_log: [7] found, [6] expected",)
    for name in (*error.missing, *error.unexpected, *error.misshapen, str(tmp_path)):
        assert name in str(error)


def test_without_strictness_what_is_skipped_is_named_and_the_rest_is_loaded(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.extra"] = torch.zeros(2)
    write_tensors(tmp_path, TINY, tensors)
    with pytest.warns(UserWarning, match="strict=False") as caught:
        model = load_model(tmp_path, strict=False)
    text = str(caught[0].message)
    assert "model.norm.weight" in text
    assert "model.layers.0.extra" in text
    assert torch.equal(model.norm.weight, torch.zeros(24))
    assert torch.equal(model.embed_tokens, tensors["model.embed_tokens.weight"])
    assert model.has_mtp


def test_an_incomplete_mtp_head_is_an_error_and_no_head_is_none(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["mtp.fc.weight"]
    write_tensors(tmp_path / "a", TINY, tensors)
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        load_model(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"mtp\.norm\.weight"):
        assert not load_model(tmp_path / "a", strict=False).has_mtp
    write_tensors(tmp_path / "b", TINY, random_tensors(TINY, has_mtp=False))
    model = load_model(tmp_path / "b")
    assert not model.has_mtp
    with pytest.raises(ValueError, match="MTP"):
        model.mtp_logits(torch.arange(5))


def test_quantised_weights_are_refused_by_the_method_s_name(tmp_path, qnext_data):
    path = qnext_data / "qwen/Qwen3-Next-80B-A3B-Instruct-FP8/config.json"
    text = path.read_text().replace('"quant_method": "fp8"', '"quant_method": "awq"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="quantization_config: method 'awq' is not supported"):
        load_model(tmp_path)


def test_a_dtype_that_cannot_be_computed_in_is_refused_by_name(tmp_path):
    tensors = random_tensors(TINY)
    name = "model.layers.0.mlp.gate.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_tensors(tmp_path, TINY, tensors)
    with pytest.raises(ValueError, match=rf"{name} is stored as F8_E4M3"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="dtype = 'int4'"):
        load_model(tmp_path, dtype="int4")


def test_a_corrupt_checkpoint_is_one_error_that_names_the_file(tmp_path):
    write_tensors(tmp_path, TINY, random_tensors(TINY), max_shard_size=20_000)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=f"{last.name}: .*(truncated|describes)"):
        load_model(tmp_path)
    last.unlink()
    with pytest.raises(ValueError, match=f"{last.name}: missing"):
        load_model(tmp_path)


def test_decay_parameters_stay_wide_and_are_written_as_they_were_read(tmp_path):
    tensors = random_tensors(TINY, dtype=torch.bfloat16)
    write_tensors(tmp_path / "a", TINY, tensors)
    model = load_model(tmp_path / "a")
    mixer = model.layers[0].mixer
    assert mixer.in_proj.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    # Once trained further, writing them narrow would round them again.
    with torch.no_grad():
        mixer.A_log.mul_(1.0001)
    save_model(model, tmp_path / "b")
    reader = CheckpointReader(tmp_path / "b")
    assert reader.dtype("model.layers.0.linear_attn.A_log") == torch.float32
    assert reader.dtype("model.layers.0.linear_attn.dt_bias") == torch.bfloat16
    assert torch.equal(reader.read("model.layers.0.linear_attn.A_log"), mixer.A_log)


def test_an_asked_dtype_is_held_and_saved(tmp_path):
    write_tensors(tmp_path / "a", TINY, random_tensors(TINY, dtype=torch.bfloat16))
    for given in (torch.float32, "float32"):
        model = load_model(tmp_path / "a", dtype=given)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(model, tmp_path / "b")
    assert {entry.dtype for entry in CheckpointReader(tmp_path / "b").entries.values()} == {"F32"}
    widened = load_model(tmp_path / "a").float()
    save_model(widened, tmp_path / "c")
    narrow = [n for n, e in CheckpointReader(tmp_path / "c").entries.items() if e.dtype != "F32"]
    assert all(name.endswith(("A_log", "dt_bias")) for name in narrow)


def test_a_model_trained_here_keeps_its_decays_wide_in_a_bf16_export(tmp_path):
    model = Qwen3Next(TINY)
    init_weights(model, TINY, seed=1)
    save_model(model, tmp_path, dtype="bfloat16")
    found = {name: entry.dtype for name, entry in CheckpointReader(tmp_path).entries.items()}
    wide = {name for name, dtype in found.items() if dtype == "F32"}
    assert wide == {name for name in found if name.endswith(("A_log", "dt_bias"))}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    load_model(tmp_path)


def test_tokenizer_files_travel_and_a_generation_config_is_always_there(tmp_path):
    config = replace(TINY, eos_token_id=(3, 4))
    write_tensors(tmp_path / "a", config, random_tensors(config))
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/chat_template.jinja").write_text("x")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "b/chat_template.jinja").read_text() == "x"
    generation = json.loads((tmp_path / "b/generation_config.json").read_text())
    assert generation["eos_token_id"] == [3, 4]
    (tmp_path / "b/generation_config.json").write_text('{"temperature": 0.5}')
    save_model(load_model(tmp_path / "b"), tmp_path / "c")
    assert (tmp_path / "c/generation_config.json").read_text() == '{"temperature": 0.5}'


def test_a_model_is_saved_over_the_checkpoint_it_came_from(tmp_path):
    write_tensors(tmp_path, TINY, random_tensors(TINY))
    model = load_model(tmp_path)
    with torch.no_grad():
        model.norm.weight.fill_(0.25)
    save_model(model, tmp_path, max_shard_size=30_000, layout="fused")
    assert torch.equal(load_model(tmp_path).norm.weight, torch.full((24,), 0.25))
    named = set(json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"].values())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named
    assert len(named) > 1


def test_unknown_options_are_refused_before_anything_is_written(tmp_path):
    model = Qwen3Next(TINY)
    for options, words in (
        ({"layout": "stacked"}, "layout = 'stacked'"),
        ({"max_shard_size": "big"}, "max_shard_size = 'big'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
    ):
        with pytest.raises(ValueError, match=words):
            save_model(model, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_transformers_opens_what_we_save_with_the_same_logits(tmp_path, layout, is_tied):
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, tie_word_embeddings=is_tied)
    model = Qwen3Next(config)
    init_weights(model, config, seed=2)
    save_model(model, tmp_path, layout=layout, max_shard_size=30_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert theirs.dtype == torch.float32
    ids = torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    assert relative_error(model.logits(ids[0]), expected) < 1e-4


def test_we_open_what_transformers_saves_with_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(**TINY.to_hf(), experts_implementation="eager")
    theirs = transformers.Qwen3NextForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    model = load_model(tmp_path)
    assert not model.has_mtp
    ids = torch.randint(0, 97, (1, 70))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    assert relative_error(model.logits(ids[0]), expected) < 1e-4


def test_the_public_methods_lead_here(tmp_path):
    write_tensors(tmp_path / "a", TINY, random_tensors(TINY))
    model = Qwen3Next.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="1MB", layout="fused")
    again = Qwen3Next.from_pretrained(str(tmp_path / "b"), dtype="float32", device="cpu")
    for (name, found), (_, expected) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_holds_no_weights_here_is_refused_by_name(tmp_path, device):
    save_model(Qwen3Next(TINY), tmp_path)
    with pytest.raises(ValueError, match=f"device is '{device}'"):
        load_model(tmp_path, device=device)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_int8_is_quantised_row_by_row_while_loading(tmp_path, layout):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, layout=layout)
    loaded = Qwen3Next.from_pretrained(tmp_path, dtype="int8")
    assert loaded.dtype == torch.float32
    held = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in loaded.matrix_names():
            assert torch.equal(held[name], parameter), name
            continue
        expected, scale = quantize_rows(parameter.detach())
        assert torch.equal(held[name], expected), name
        assert torch.equal(scale_of(held[name]), scale), name
    ids = torch.arange(20)
    widened_model = model.float()
    with torch.no_grad():
        for name, parameter in widened_model.named_parameters():
            parameter.copy_(widened(held[name], torch.float32))
    expected = widened_model.logits(ids)
    with use_backend("torch"):  # products in fp32, where a CPU may take them in bfloat16
        assert (loaded.logits(ids) - expected).norm() / expected.norm() < 1e-5
    assert torch.isfinite(loaded.mtp_logits(ids, 2)[:5]).all()
    with pytest.raises(ValueError, match="int8 weights, which only run"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
