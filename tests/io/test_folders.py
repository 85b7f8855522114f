"""Config files of a folder, companions that are copied along, and names that lead to a folder."""

import json

import pytest

from qnext.config.generation import GenerationConfig
from qnext.config.presets import preset
from qnext.io import hub
from qnext.io.hf_config import (
    copy_companions,
    read_generation_config,
    read_model_config,
    write_generation_config,
    write_model_config,
)
from qnext.io.hub import resolve_checkpoint


def test_configs_survive_the_way_through_a_folder(tmp_path):
    config, generation = preset("nano"), GenerationConfig(temperature=0.7, eos_token_id=(1, 2))
    write_model_config(tmp_path, config)
    write_generation_config(tmp_path, generation)
    assert read_model_config(tmp_path) == config
    assert read_generation_config(tmp_path) == generation


def test_stop_ids_come_from_the_model_where_the_generation_config_has_none(tmp_path):
    write_model_config(tmp_path, preset("next-80b-a3b"))
    assert read_generation_config(tmp_path).eos_token_id == (151645,)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    config = read_generation_config(tmp_path)
    assert (config.temperature, config.eos_token_id) == (0.5, (151645,))


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    with pytest.raises(ValueError, match=r"config\.json: hidden_act = 'gelu'"):
        read_model_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(ValueError, match=r"generation_config\.json: no valid JSON"):
        read_generation_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_p": 2}')
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p = 2"):
        read_generation_config(tmp_path)


def test_companions_are_copied_and_others_are_not(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "notes.txt"):
        (source / name).write_text(name)
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == {"tokenizer.json", "chat_template.jinja"}
    copy_companions(source, source)
    copy_companions(tmp_path / "absent", target)


def test_a_folder_resolves_to_itself_and_a_file_is_refused(tmp_path):
    assert resolve_checkpoint(tmp_path) == tmp_path
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resolve_checkpoint(tmp_path / "x")


def test_a_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(json.dumps(preset("nano").to_hf()))
    monkeypatch.setattr(hub, "_ASSETS", tmp_path)
    monkeypatch.chdir("/")
    assert resolve_checkpoint("tiny") == tmp_path / "tiny"


@pytest.mark.parametrize("name", ["", None, 7])
def test_what_cannot_be_a_name_is_refused(name):
    with pytest.raises(ValueError, match=f"model is {name!r}: a folder"):
        resolve_checkpoint(name)


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", "../nothing"])
def test_a_name_that_leads_nowhere_is_one_clear_error(name):
    with pytest.raises(ValueError, match="neither a folder, nor shipped"):
        resolve_checkpoint(name)


def test_a_hub_id_without_a_network_is_one_clear_error(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="'Qwen/Nothing'.*could not be fetched.*local folder"):
        resolve_checkpoint("Qwen/Nothing")
