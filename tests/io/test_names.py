"""Names and shapes from the configuration, against the real checkpoint's list and transformers."""

import math
from dataclasses import replace

import pytest
import zstandard

from qnext.config.presets import preset
from qnext.io.names import checkpoint_shapes


def test_all_names_and_shapes_of_the_real_checkpoint(qnext_data):
    content = (qnext_data / "qwen/weight_names_bf16.tsv.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(content).decode().splitlines()
    expected = {}
    for line in lines[1:]:
        name, shape = line.split("\t")[:2]
        expected[name] = tuple(int(size) for size in shape.strip("[]").split(","))
    shapes = checkpoint_shapes(preset("next-80b-a3b"), has_mtp=True)
    assert shapes == expected
    assert len(shapes) == 75_944
    assert sum(map(math.prod, shapes.values())) == 81_324_862_720


@pytest.mark.parametrize(
    "name,expected", [("next-12l", 20_385_346_752), ("bench-nano", 32.7e6), ("bench-small", 520e6)]
)
def test_sizes_of_the_benchmark_models(name, expected):
    total = sum(map(math.prod, checkpoint_shapes(preset(name), has_mtp=False).values()))
    assert total == pytest.approx(expected, rel=0 if isinstance(expected, int) else 2e-3)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_layouts_hold_the_same_number_of_parameters(layout):
    shapes = checkpoint_shapes(preset("nano"), has_mtp=True, layout=layout)
    assert sum(map(math.prod, shapes.values())) <= 15_000_000
    assert any("experts.gate_up_proj" in name for name in shapes) == (layout == "fused")
    assert "lm_head.weight" not in shapes


def test_the_fused_names_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = replace(
        preset("bench-nano"), num_hidden_layers=4, layer_types=(), mlp_only_layers=(1,)
    )
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    with torch.device("meta"):
        model = transformers.Qwen3NextForCausalLM(theirs)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert checkpoint_shapes(config, has_mtp=False, layout="fused") == expected
