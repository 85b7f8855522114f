"""Reading `generation_config.json`: defaults, stop ids, and keys we cannot serve."""

import json

import pytest

from qnext.config.generation import GenerationConfig


@pytest.mark.parametrize("variant,values", [("Instruct", (0.7, 0.8)), ("Thinking", (0.6, 0.95))])
def test_the_published_defaults_are_read(qnext_data, variant, values):
    folder = qnext_data / f"qwen/Qwen3-Next-80B-A3B-{variant}"
    text = (folder / "generation_config.reconstructed.json").read_text()
    config = GenerationConfig.from_hf(json.loads(text))
    assert (config.temperature, config.top_p) == values
    assert (config.top_k, config.min_p) == (20, 0.0)
    assert config.eos_token_id == (151645, 151643)
    assert GenerationConfig.from_hf(config.to_hf()) == config


def test_an_empty_file_gives_plain_sampling():
    assert GenerationConfig.from_hf({}) == GenerationConfig()
    assert GenerationConfig().temperature == 1.0


def test_do_sample_false_means_greedy():
    config = GenerationConfig.from_hf({"do_sample": False, "temperature": 0.7})
    assert config.temperature == 0.0
    assert GenerationConfig.from_hf(config.to_hf()) == config


def test_what_transformers_writes_is_read():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(
        temperature=0.7, top_k=20, do_sample=True, eos_token_id=[3, 4]
    )
    config = GenerationConfig.from_hf(theirs.to_dict())
    assert config == GenerationConfig(temperature=0.7, top_k=20, eos_token_id=(3, 4))
    opened = transformers.GenerationConfig(**config.to_hf())
    assert (opened.temperature, opened.eos_token_id) == (0.7, [3, 4])


@pytest.mark.parametrize(
    "source,words",
    [
        ({"temperature": -1}, ["temperature = -1", "at least 0"]),
        ({"top_p": 0}, ["top_p = 0", "above 0"]),
        ({"top_k": -2}, ["top_k = -2"]),
        ({"min_p": 2}, ["min_p = 2"]),
        ({"top_k": "20"}, ["top_k = '20'", "an integer"]),
        ({"eos_token_id": "x"}, ["eos_token_id = 'x'"]),
        ({"num_beams": 4}, ["num_beams = 4", "not supported"]),
        ({"watermarking_config": {}}, ["watermarking_config"]),
    ],
)
def test_a_value_we_cannot_serve_is_refused_by_name(source, words):
    with pytest.raises(ValueError) as caught:
        GenerationConfig.from_hf(source)
    for word in words:
        assert word in str(caught.value)
