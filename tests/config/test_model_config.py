"""Reading `config.json`: real files, what transformers writes, and what is refused."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from qnext.config.hf_keys import IGNORED_KEYS, REQUIRED_VALUES
from qnext.config.model import HONOURED_KEYS, ModelConfig, RopeConfig
from qnext.config.presets import PRESETS, preset

SMALL = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}


def test_config_imports_no_torch():
    code = (
        "import sys, qnext.config.presets, qnext.config.generation, qnext.config.toml\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("variant", ["Instruct", "Thinking"])
def test_the_real_config_is_the_preset(qnext_data, variant):
    path = qnext_data / f"qwen/Qwen3-Next-80B-A3B-{variant}/config.json"
    assert ModelConfig.from_hf(json.loads(path.read_text())) == preset("next-80b-a3b")


def test_the_coder_config_differs_in_its_rope_base_only(qnext_data):
    path = qnext_data / "qwen/Qwen3-Coder-Next/config.transcribed.json"
    config = ModelConfig.from_hf(json.loads(path.read_text()))
    real = preset("next-80b-a3b")
    assert config == replace(real, rope=replace(real.rope, theta=5e6))


def test_a_quantised_config_tells_its_method(qnext_data):
    path = qnext_data / "qwen/Qwen3-Next-80B-A3B-Instruct-FP8/config.json"
    config = ModelConfig.from_hf(json.loads(path.read_text()))
    assert config == replace(preset("next-80b-a3b"), quant_method="fp8")
    with pytest.raises(ValueError, match="fp8"):
        config.to_hf()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_way_to_json_and_back(name):
    config = preset(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'mini'.*nano.*next-80b-a3b"):
        preset("mini")


def test_derived_sizes_of_the_real_model():
    config = preset("next-80b-a3b")
    assert (config.num_attention_layers, config.num_linear_layers) == (12, 36)
    assert (config.rotary_dim, config.conv_dim) == (64, 8192)
    assert (config.key_dim, config.value_dim) == (2048, 4096)
    assert config.full_attention_interval == 4
    assert [i for i in range(12) if config.is_attention_layer(i)] == [3, 7, 11]
    assert all(config.is_moe_layer(i) for i in range(48))


def test_mixture_layers_follow_step_and_list():
    config = ModelConfig.from_hf(
        {**SMALL, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert [i for i in range(6) if config.is_moe_layer(i)] == [1, 5]
    dense = ModelConfig.from_hf({"num_experts": 0, "num_hidden_layers": 2})
    assert not any(dense.is_moe_layer(i) for i in range(2))


def test_both_rope_spellings_read_the_same():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
    old = {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_scaling": yarn}
    new = {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5, **yarn}}
    aliased = {**old, "rope_scaling": {**yarn, "type": "yarn"}}
    del aliased["rope_scaling"]["rope_type"]
    config = ModelConfig.from_hf({**SMALL, **old})
    assert config == ModelConfig.from_hf({**SMALL, **new}) == ModelConfig.from_hf(SMALL | aliased)
    assert config.rope == RopeConfig(1e7, 0.5, "yarn", 4.0, 262144)
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_yarn_takes_its_trained_context_from_the_model_when_none_is_given():
    source = {**SMALL, "max_position_embeddings": 4096}
    source["rope_scaling"] = {"type": "yarn", "factor": 2}
    assert ModelConfig.from_hf(source).rope.original_max_position_embeddings == 4096


def test_layer_types_win_over_the_interval_and_old_names_are_read():
    types = ["attention", "linear_attention", "linear_attention", "full_attention"]
    config = ModelConfig.from_hf({**SMALL, "layer_types": types, "full_attention_interval": 4})
    assert [config.is_attention_layer(i) for i in range(4)] == [True, False, False, True]
    assert config.full_attention_interval is None
    assert "full_attention_interval" not in config.to_hf()


def test_one_many_or_no_stop_ids_are_read():
    assert ModelConfig.from_hf({**SMALL, "eos_token_id": 5}).eos_token_id == (5,)
    assert ModelConfig.from_hf({**SMALL, "eos_token_id": [5, 6]}).eos_token_id == (5, 6)
    assert ModelConfig.from_hf({**SMALL, "eos_token_id": None}).eos_token_id == ()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"num_attention_heads": 5}, ["num_attention_heads = 5", "num_key_value_heads = 2"]),
        ({"linear_num_value_heads": 20}, ["linear_num_value_heads = 20", "= 16"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types has 3", "is 4"]),
        ({"layer_types": []}, ["layer_types has 0", "is 4"]),
        ({"layer_types": ["full_attention"] * 3 + ["ssm"]}, ["layer_types[3] = 'ssm'", "linear"]),
        ({"layer_types": "full_attention"}, ["layer_types = 'full_attention'"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_type = 'llama3'", "'yarn'"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["factor is missing"]),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, ["factor = 0.5", "at least 1"]),
        ({"rope_scaling": {"factor": 2}}, ["factor = 2.0", "rope_type 'default'", "must be 1"]),
        ({"rope_scaling": {"kind": "yarn"}}, ["rope_scaling.kind = 'yarn'"]),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e7}},
            ["rope_theta", "contradicts"],
        ),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "num_experts = 8"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok = 0", "at least 1"]),
        ({"mlp_only_layers": [4]}, ["layer 4", "0 to 3"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step = 0"]),
        ({"full_attention_interval": 0}, ["full_attention_interval = 0"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
        ({"head_dim": 6, "partial_rotary_factor": 0.5}, ["head_dim = 6", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"use_sliding_window": True}, ["use_sliding_window = True"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1"]),
        ({"model_type": "qwen3_moe"}, ["model_type = 'qwen3_moe'", "'qwen3_next'"]),
        ({"hidden_size": "2048"}, ["hidden_size = '2048'", "an integer"]),
        ({"hidden_size": float("inf")}, ["hidden_size = inf", "an integer"]),
        ({"hidden_size": float("nan")}, ["hidden_size = nan", "an integer"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps = 1000", "a finite number"]),
        ({"hidden_size": 0}, ["hidden_size = 0", "at least 1"]),
        ({"norm_topk_prob": 1}, ["norm_topk_prob = 1", "true or false"]),
        ({"initializer_range": -0.1}, ["initializer_range = -0.1", "at least 0"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps = 0.0"]),
        ({"dtype": "int8"}, ["dtype = 'int8'", "bfloat16"]),
        ({"dtype": "float32", "torch_dtype": "float16"}, ["dtype", "contradicts"]),
        ({"use_mla": True}, ["use_mla = True", "unknown"]),
    ],
)
def test_a_contradiction_is_refused_by_name_value_and_limit(change, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf({**SMALL, **change})
    for word in words:
        assert word in str(caught.value)


def test_every_key_is_honoured_or_limited_or_ignored_and_never_two_of_them():
    groups = [set(HONOURED_KEYS), set(REQUIRED_VALUES), set(IGNORED_KEYS)]
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not group & other


@pytest.mark.parametrize("key", sorted(IGNORED_KEYS))
def test_an_ignored_key_changes_nothing(key):
    assert ModelConfig.from_hf({**SMALL, key: "anything"}) == ModelConfig.from_hf(SMALL)


def test_every_honoured_size_reaches_its_field():
    base = ModelConfig.from_hf({**SMALL, "intermediate_size": 64})
    for item in fields(ModelConfig):
        if item.type is int and item.name not in ("num_hidden_layers",):
            changed = ModelConfig.from_hf({**SMALL, item.name: getattr(base, item.name) * 2})
            assert getattr(changed, item.name) == getattr(base, item.name) * 2


def test_what_transformers_writes_is_read_and_its_defaults_are_ours():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3NextConfig()
    assert ModelConfig.from_hf(theirs.to_dict()) == ModelConfig.from_hf({}) == ModelConfig()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = transformers.Qwen3NextConfig(
        num_hidden_layers=4,
        full_attention_interval=2,
        dtype="bfloat16",
        rope_theta=5e6,
        rope_scaling=yarn,
        eos_token_id=[1, 2],
        tie_word_embeddings=True,
    )
    for written in (theirs.to_dict(), json.loads(theirs.to_json_string(use_diff=True))):
        config = ModelConfig.from_hf(written)
        assert config.rope == RopeConfig(5e6, 0.25, "yarn", 4.0, 8192)
        assert config.layer_types == ("linear_attention", "full_attention") * 2
        assert (config.dtype, config.eos_token_id) == ("bfloat16", (1, 2))


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_opens_what_we_write(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = preset(name)
    if name == "bench-nano":
        config = replace(
            config,
            rope=RopeConfig(1e6, 0.5, "yarn", 4.0, 8192, attention_factor=1.2),
            max_position_embeddings=32768,
        )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "Qwen3NextConfig"
    for item in fields(ModelConfig):
        if item.name in ("rope", "eos_token_id", "dtype", "quant_method"):
            continue
        expected = getattr(config, item.name)
        found = getattr(theirs, item.name)
        assert found == (list(expected) if isinstance(expected, tuple) else expected), item.name
    assert theirs.rope_parameters["rope_theta"] == config.rope.theta
    assert theirs.rope_parameters["rope_type"] == config.rope.rope_type
    assert theirs.rope_parameters["partial_rotary_factor"] == config.rope.partial_rotary_factor
    if config.rope.rope_type == "yarn":
        assert theirs.rope_parameters["attention_factor"] == 1.2
    assert ModelConfig.from_hf(theirs.to_dict()) == config
