import json
import subprocess
import sys

import pytest

from qnext.cli.main import main
from tests.data.corpus import NANO, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(
        tmp_path / "a.jsonl",
        [{"text": f"A story of {i} cats and {i * i} mice.", "lang": "en"} for i in range(40)],
    )


def test_prepare_then_inspect(corpus, tmp_path, capsys):
    output = tmp_path / "shards"
    common = ["--tokenizer", str(NANO), "--output", str(output)]
    assert main(["data", "prepare", "--input", corpus, *common, "--license", "CC0"]) == 0
    assert "text: 40 documents" in capsys.readouterr().out
    assert main(["data", "inspect", str(output), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "licenses: CC0 40" in shown
    assert "every file has the hash" in shown
    assert main(["data", "inspect", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["documents"] == 40


def test_prepare_from_a_config(corpus, tmp_path, capsys):
    config = tmp_path / "c.toml"
    config.write_text(
        f'tokenizer = "{NANO}"\noutput = "unused"\n[[source]]\nname = "cats"\ninputs = ["{corpus}"]'
    )
    output = tmp_path / "out"
    assert main(["data", "prepare", str(config), "--output", str(output)]) == 0
    assert (output / "cats/shard-00000.tokens.npy").is_file()
    assert f"wrote {output}" in capsys.readouterr().out


def test_a_vocabulary_is_trained_and_saved(corpus, tmp_path, capsys):
    template = NANO / "chat_template.jinja"
    options = ["--vocab-size", "280", "--output", str(tmp_path / "tok")]
    options += ["--chat-template", str(template)]
    assert main(["data", "tokenizer", "--input", corpus, *options]) == 0
    assert "280 entries" in capsys.readouterr().out
    assert (tmp_path / "tok/chat_template.jinja").read_text() == template.read_text()
    config = tmp_path / "v.toml"
    output = tmp_path / "again"
    config.write_text(f'vocab_size = 280\noutput = "{output}"\n[[source]]\ninputs = ["{corpus}"]\n')
    assert main(["data", "tokenizer", str(config)]) == 0
    same = [(folder / "tokenizer.json").read_bytes() for folder in (output, tmp_path / "tok")]
    assert same[0] == same[1]


def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    assert main(["data", "prepare"]) == 2
    assert "give either a CONFIG.toml or --input" in capsys.readouterr().err
    assert main(["data", "prepare", "--input", corpus, "--output", "x"]) == 2
    assert "--tokenizer is missing" in capsys.readouterr().err
    assert main(["data", "tokenizer", "--input", corpus, "--output", "x"]) == 2
    assert "--vocab-size is missing" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_no_torch_is_imported(corpus, tmp_path):
    code = (
        "import sys; from qnext.cli.main import main; "
        f"main(['data', 'prepare', '--input', {corpus!r}, '--tokenizer', {str(NANO)!r}, "
        f"'--output', {str(tmp_path / 'o')!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
