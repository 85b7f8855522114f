"""Models that hold their large matrices in e4m3 with scaled blocks."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch

from tests.kernels.triton_env import DEVICE, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.bench.models import bench_config, random_model
from qnext.engine import fused
from qnext.engine.llm import LLM
from qnext.io.hf_config import write_model_config
from qnext.io.writer import write_checkpoint
from qnext.kernels.dispatch import use_backend
from qnext.kernels.fp8_blocks import (
    DTYPE,
    addresses_of,
    block_scale_of,
    dequantized,
    quantize_blocks,
    scale_shape,
    tail_of,
    widened_blocks,
)
from qnext.model.checkpoint import CheckpointError, gather, load_model, logical_tensors, save_model
from qnext.model.quantized import FP8_MATRICES, fp8_names, quantize_head, quantize_model
from qnext.model.qwen3_next import Qwen3Next
from qnext.train.step import TrainStep
from tests.engine.tiny import greedy, id_prompts, step_by_step, tiny_llm, token_ids
from tests.model.tiny import tiny_config, tiny_model

# Whole blocks everywhere; two key heads, so that loading has an order of rows to change.
BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": (1,),
}
BF16 = torch.bfloat16
# Of logits. On a GPU the experts' rows of more than 16 tokens are rounded to 8 bits as well.
ROUNDING = 1e-4 if IS_INTERPRETED else 0.1
# Not in 8 bits in the published checkpoints either.
KEPT = (
    "embed",
    "lm_head",
    "norm",
    "conv1d",
    "in_proj_ba",
    "mlp.gate.",
    "shared_expert_gate",
    ".fc",
)
KEPT = (*KEPT, "A_log", "dt_bias")


def blocks_model(dtype=BF16, **changes):
    return tiny_model(dtype=dtype, scale=2.0, **{**BLOCKS, **changes}).requires_grad_(False)


def widened_model(model, dtype):
    """A model in one float type that holds the dequantised weights of a quantised one."""
    made = Qwen3Next(model.config, has_mtp=model.has_mtp, dtype=dtype).to(model.device)
    given = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            held = given[name]
            parameter.copy_(widened_blocks(held, dtype) if held.dtype == DTYPE else held)
    return made.requires_grad_(False).eval()


def checkpoint_tensors(model):
    parameters = dict(model.named_parameters())
    return {
        name: gather(tensor, parameters, parameters[tensor.parts[0].parameter].dtype)
        for name, tensor in logical_tensors(model).items()
    }


def write_fp8_checkpoint(folder, model):
    """As the published ones: matrices in e4m3, each with the scales of its blocks."""
    tensors = {}
    for name, tensor in checkpoint_tensors(model).items():
        if tensor.dim() < 2 or any(part in name for part in KEPT):
            tensors[name] = tensor
            continue
        tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(tensor)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    write_model_config(folder, replace(model.config, dtype="bfloat16"))
    path = folder / "config.json"
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {**json.loads(path.read_text()), "quantization_config": settings}
    path.write_text(json.dumps(config))
    write_checkpoint(folder, specs, tensors.__getitem__, max_shard_size="5GB")
    return tensors


def assert_same_matrices(ours, expected):
    given = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        other = given[name]
        assert parameter.dtype == other.dtype, name
        if parameter.dtype != DTYPE:
            assert torch.equal(parameter, other), name
            continue
        assert torch.equal(parameter.view(torch.uint8), other.view(torch.uint8)), name
        assert torch.equal(block_scale_of(parameter), block_scale_of(other)), name
        assert (tail_of(parameter) is None) == (tail_of(other) is None), name
        if tail_of(other) is not None:
            assert torch.equal(tail_of(parameter), tail_of(other)), name


def test_a_new_scale_at_an_old_matrix_is_a_new_address():
    weight = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    weight.block_scale = torch.ones(1, 1)
    before = addresses_of([torch.zeros(3), weight])
    assert len(before) == 3
    old, weight.block_scale = weight.block_scale, torch.ones(1, 1)
    after = addresses_of([torch.zeros(3), weight])
    assert after[1] == before[1]
    assert after[2] != old.data_ptr()


def test_what_the_published_checkpoints_keep_stays_as_it_is():
    model = blocks_model()
    names = fp8_names(model)
    assert {name.rpartition(".")[2] for name in names} == set(FP8_MATRICES)
    original = copy.deepcopy(model)
    quantize_model(model.to(DEVICE))
    held = dict(model.named_parameters())
    for name, parameter in original.named_parameters():
        assert (held[name].dtype == DTYPE) == (name in names)
        if name not in names:
            assert torch.equal(held[name].cpu(), parameter), name
    in_proj = held["layers.0.mixer.in_proj"]
    assert in_proj.shape == (1536, 128)
    assert block_scale_of(in_proj).shape == scale_shape(in_proj.shape) == (12, 1)
    # b and a decide what the state keeps: they are not rounded.
    wide = dict(original.named_parameters())["layers.0.mixer.in_proj"]
    assert torch.equal(tail_of(in_proj).cpu(), wide[1536:])
    for name in names:
        found = widened_blocks(held[name], torch.float32).cpu()
        assert found.shape == dict(original.named_parameters())[name].shape
        assert error(found, dict(original.named_parameters())[name]) < 0.04


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_checkpoint_is_quantised_while_it_is_loaded(tmp_path, layout):
    model = blocks_model()
    save_model(model, tmp_path, layout=layout)
    loaded = load_model(tmp_path, dtype="fp8", device=DEVICE)
    assert loaded.dtype == BF16
    quantize_model(model.to(DEVICE))
    assert_same_matrices(loaded, model)


def test_a_checkpoint_in_fp8_is_read_as_it_is(tmp_path):
    tensors = write_fp8_checkpoint(tmp_path, blocks_model())
    for dtype in ("auto", "fp8"):
        loaded = load_model(tmp_path, dtype=dtype, device=DEVICE)
        assert sum(p.dtype == DTYPE for p in loaded.parameters()) == len(fp8_names(loaded))
        # Inside the rows lie in another order; outside they are where they were.
        outside = checkpoint_tensors(
            widened_model(loaded.cpu() if IS_INTERPRETED else loaded, BF16)
        )
        for name, tensor in outside.items():
            stored = tensors[name]
            if stored.dtype == DTYPE:
                stored = dequantized(stored, tensors[name + "_scale_inv"]).to(BF16)
            assert torch.equal(tensor, stored.to(tensor.dtype)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_a_checkpoint_in_fp8_is_widened_for_other_types(tmp_path, dtype):
    tensors = write_fp8_checkpoint(tmp_path, blocks_model())
    loaded = load_model(tmp_path, dtype=dtype)
    name = "model.layers.0.linear_attn.out_proj.weight"
    held = loaded.layers[0].mixer.out_proj
    expected = dequantized(tensors[name], tensors[name + "_scale_inv"])
    if dtype == "int8":
        assert error(held * held.row_scale, expected) < 0.01
        return
    assert torch.equal(held, expected.to(held.dtype))
    save_model(loaded, tmp_path / "again")
    assert load_model(tmp_path / "again").dtype == loaded.dtype


def test_scales_that_are_missing_or_of_other_blocks_are_named(tmp_path):
    tensors = write_fp8_checkpoint(tmp_path, blocks_model())
    name = "model.layers.0.linear_attn.out_proj.weight_scale_inv"
    config = (tmp_path / "config.json").read_bytes()
    for change, words in ((None, "1 missing"), (torch.ones(4, 4), r"\[4, 4\] found, \[1, 4\]")):
        changed = {key: value for key, value in tensors.items() if key != name}
        if change is not None:
            changed[name] = change
        folder = tmp_path / str(change is None)
        folder.mkdir()
        (folder / "config.json").write_bytes(config)
        specs = {key: (value.dtype, tuple(value.shape)) for key, value in changed.items()}
        write_checkpoint(folder, specs, changed.__getitem__, max_shard_size="5GB")
        with pytest.raises(CheckpointError, match=words):
            load_model(folder, dtype="float32")


def test_a_machine_without_fp8_is_told_what_it_may_load(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    write_fp8_checkpoint(tmp_path, blocks_model())
    for dtype in ("auto", "fp8"):
        with pytest.raises(ValueError, match=r"run on a GPU, not on cpu; dtype may be .*bfloat16"):
            LLM(tmp_path, dtype=dtype, device="cpu")
    model = blocks_model()
    with pytest.raises(ValueError, match="run on a GPU"):
        quantize_model(model)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    quantize_model(model)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"run on a GPU, not on cpu \(layers\.0\.mixer"):
        tiny_llm(model)


def test_sizes_that_are_no_whole_blocks_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"in_proj has \d+ rows and 32 columns; .*multiples of 128"
    ):
        quantize_model(tiny_model().to(DEVICE))
    # Key heads of 64 leave parts of a published matrix in the middle of a block.
    model = blocks_model(linear_key_head_dim=64)
    write_fp8_checkpoint(tmp_path, model)
    with pytest.raises(ValueError, match=r"in_proj_qkvz.*divided at 64"):
        load_model(tmp_path, dtype="fp8", device=DEVICE)


def test_copies_keep_their_scales():
    model = blocks_model().to(DEVICE)
    quantize_model(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same_matrices(copied, model)
        assert_same_matrices(copy.deepcopy(copied), model)
        held = copied.layers[0].mixer.in_proj
        held.block_scale.zero_()
        held.tail.zero_()
    assert block_scale_of(model.layers[0].mixer.in_proj).abs().min() > 0
    assert model.to("meta").layers[0].mixer.in_proj.block_scale.device.type == "meta"


def test_int8_copies_keep_their_scales_too(tmp_path):
    save_model(tiny_model(), tmp_path)
    model = load_model(tmp_path, dtype="int8")
    ids = torch.arange(9)
    copied = copy.deepcopy(model).to(torch.float32)
    assert torch.equal(copied.logits(ids), model.logits(ids))
    assert model.to("meta").layers[0].mixer.in_proj.row_scale.device.type == "meta"


def test_what_would_lose_the_scales_is_refused(tmp_path):
    model = blocks_model().to(DEVICE)
    quantize_model(model)
    for change in (lambda: model.to(torch.float32), model.float, model.half):
        with pytest.raises(ValueError, match="fp8 with scales and cannot be converted"):
            change()
    with pytest.raises(ValueError, match="fp8 weights, which only run: save"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="which only run: take the state of"):
        model.state_dict()
    with pytest.raises(ValueError, match="fp8 weights, which only run: train"):
        TrainStep(model, None, None, None)
    with pytest.raises(ValueError, match="only run: train the model they came from"):
        model.requires_grad_(True)
    with pytest.raises(ValueError, match="which only run: quantise"):
        quantize_model(model)


def test_random_weights_are_quantised_as_they_are_drawn():
    config = tiny_config(**BLOCKS)
    how = {"has_mtp": True, "dtype": BF16, "device": torch.device(DEVICE)}
    model = random_model(config, **how)
    quantize_model(model)
    assert_same_matrices(random_model(config, **how, is_fp8=True), model)


def test_logits_are_those_of_the_widened_weights():
    model = blocks_model(torch.float32).to(DEVICE)
    quantize_model(model)
    ids = torch.arange(40, device=DEVICE)
    expected = widened_model(model, torch.float32).logits(ids)
    assert error(model.logits(ids), expected) < ROUNDING


def test_a_head_in_fp8_is_asked_for_by_itself(triton_steps):
    model = blocks_model(torch.float32, vocab_size=256).to(DEVICE)
    quantize_model(model)
    expected = model.logits(torch.arange(20, device=DEVICE))
    quantize_head(model)
    assert model.lm_head.dtype == DTYPE
    assert model.dtype == torch.float32
    assert 0 < error(model.logits(torch.arange(20, device=DEVICE)), expected) < 0.06
    wide = widened_model(model, torch.float32)
    prompts, params = id_prompts(3), greedy(3)
    found = token_ids(tiny_llm(model, num_speculative_tokens=0).generate(prompts, params))
    with use_backend("reference", op="decode_step"):
        texts = token_ids(tiny_llm(wide, num_speculative_tokens=0).generate(prompts, params))
    assert_same_texts(wide, prompts, found, texts, ROUNDING)
    with pytest.raises(ValueError, match="no output head of its own"):
        quantize_head(model)
    with pytest.raises(ValueError, match="lm_head has 97 rows"):
        quantize_head(blocks_model().to(DEVICE))


@pytest.fixture
def triton_steps(monkeypatch):
    """The GPU's whole steps, on a CPU under the interpreter."""
    if IS_INTERPRETED:
        monkeypatch.setattr(fused, "_KERNELS_CPU", fused._KERNELS_GPU)
        monkeypatch.setattr(fused, "_ROUNDS_CPU", fused._ROUNDS_GPU)
    with use_backend("triton", op="decode_step"):
        yield


@pytest.mark.parametrize("num_drafts, goes_on", [(0, False), (2, True)])
def test_greedy_text_is_that_of_the_widened_weights(triton_steps, num_drafts, goes_on):
    model = blocks_model(torch.float32).to(DEVICE)
    quantize_model(model)
    prompts, params = id_prompts(3, 7), greedy(4 if IS_INTERPRETED else 24)
    with use_backend("reference", op="decode_step"):
        wide = widened_model(model, torch.float32)
        expected = token_ids(tiny_llm(wide, num_speculative_tokens=0).generate(prompts, params))
    llm = tiny_llm(model, num_speculative_tokens=num_drafts)
    if not goes_on:
        step_by_step(llm)
    found = token_ids(llm.generate(prompts, params))
    assert_same_texts(wide, prompts, found, expected, ROUNDING)


def assert_same_texts(model, prompts, found, expected, rounding):
    """Texts may part only where the two best logits are nearer than rounding can tell apart."""
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        assert len(ours) == len(theirs)
        pairs = enumerate(zip(ours, theirs, strict=True))
        parted = next((i for i, (our, their) in pairs if our != their), None)
        if parted is None:
            continue
        ids = torch.tensor(prompt["prompt_token_ids"] + theirs[:parted], device=model.device)
        logits = model.logits(ids)[-1]
        gap = logits[theirs[parted]] - logits[ours[parted]]
        assert gap < 4 * rounding * logits.std(), (parted, float(gap))


@pytest.mark.gpu
@pytest.mark.parametrize("num_seqs", [1, 3, 20])
def test_the_flagship_s_layers_write_the_text_of_widened_weights(num_seqs):
    config = bench_config(4, is_small=False)
    how = {"has_mtp": True, "dtype": BF16, "device": torch.device(DEVICE)}
    model = random_model(config, **how, is_fp8=True).requires_grad_(False).eval()
    wide = widened_model(model, BF16)
    ids = torch.arange(1000, 1600, device=DEVICE)
    assert error(model.logits(ids), wide.logits(ids)) < ROUNDING
    prompts = [
        {"prompt_token_ids": [(37 * i * i + 11 * n) % 150_000 for i in range(300)]}
        for n in range(num_seqs)
    ]
    sizes = {"max_model_len": 512, "max_num_seqs": 20, "prefill_chunk_tokens": 8192}
    sizes["page_size"] = 64
    texts = [
        token_ids(tiny_llm(each, num_speculative_tokens=0, **sizes).generate(prompts, greedy(24)))
        for each in (model, wide)
    ]
    assert_same_texts(wide, prompts, *texts, ROUNDING)
