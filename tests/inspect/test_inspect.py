"""`qnext inspect`: numbers, drawings and checks, of presets and of folders, without torch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import zstandard
from rich.console import Console

from qnext.cli.main import main
from qnext.config.presets import PRESETS, preset
from qnext.inspect import summary
from qnext.inspect.html import render_page
from qnext.inspect.names import compare_shapes, read_names
from qnext.inspect.stack import headline, render
from qnext.inspect.summary import blocks_of, repeated_blocks, summarise
from qnext.inspect.text import format_bytes
from qnext.io.header import encode_header, tensor_bytes
from qnext.io.hf_config import write_model_config
from qnext.io.names import checkpoint_shapes

SMALL = replace(
    preset("bench-nano"), vocab_size=64, num_hidden_layers=4, layer_types=(), num_experts=4
)


def write_checkpoint(folder, config, *, has_mtp=True, layout="per_expert", dtype="BF16", drop=()):
    shapes = checkpoint_shapes(config, has_mtp=has_mtp, layout=layout)
    shapes = {name: shape for name, shape in shapes.items() if name not in drop}
    size = sum(tensor_bytes(dtype, shape) for shape in shapes.values())
    write_model_config(folder, config)
    header = encode_header({name: (dtype, shape) for name, shape in shapes.items()})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return size


def draw(summary, width=100):
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(headline(summary))
        console.print(render(summary))
    return captured.get()


def test_the_real_list_of_names_is_verified_without_weights_or_torch(qnext_data):
    names = qnext_data / "qwen/weight_names_bf16.tsv.zst"
    code = (
        "import sys; from qnext.cli.main import main\n"
        f"code = main(['inspect', 'next-80b-a3b', '--check', {str(names)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "75,944 names and shapes agree" in result.stdout
    assert "81,324,862,720 parameters" in result.stdout


def test_a_list_that_differs_is_shown_and_fails(tmp_path, capsys):
    shapes = checkpoint_shapes(preset("bench-nano"), has_mtp=True)
    lines = ["name\tshape"]
    lines += [f"{name}\t[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
    lines[1] = "model.embed_tokens.weight\t[8192,255]"
    lines[2] = "model.other\t[]"
    path = tmp_path / "names.tsv.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    assert main(["inspect", "bench-nano", "--check", str(path)]) == 1
    text = capsys.readouterr().out
    for words in ("differ from", "missing: model.other", "[8192, 256] found, [8192, 255] expected"):
        assert words in text
    assert main(["inspect", "bench-nano", "--check", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert len(report["check"]["differences"]) == 3


@pytest.mark.parametrize(
    "content,words",
    [
        (b"a\tb\n", "line 1"),
        (b"name\tshape\nx\n", "line 2"),
        (b"name\tshape\nx\t[2,a]\n", "line 2"),
    ],
)
def test_a_list_that_is_none_is_refused_by_name_and_line(tmp_path, content, words):
    path = tmp_path / "names.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"names.tsv: {words}"):
        read_names(path)
    (tmp_path / "names.zst").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="names.zst: no valid zstd"):
        read_names(tmp_path / "names.zst")


def test_many_differences_are_cut_with_their_number():
    comparison = compare_shapes({f"t{i}": (1,) for i in range(50)}, {})
    lines = list(comparison.lines())
    assert len(lines) == 21
    assert lines[-1] == "missing: and 30 more"
    assert not compare_shapes({"a": (1,)}, {"a": (1,)})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_drawn(name):
    summary = summarise(name, 4096)
    text = draw(summary)
    assert f"{summary.counts.total:,} parameters" in text
    assert f"{summary.counts.active:,}" in text
    assert "Gated Attention" in text
    assert ("Gated DeltaNet" in text) == (summary.config.num_linear_layers > 0)
    assert "4,096 tokens" in text


def test_the_drawing_of_the_real_model_shows_its_twelve_blocks():
    text = draw(summarise("next-80b-a3b"))
    for words in ("12 ×", "3 ×", "10 of 512 experts × 512 + 1 shared", "81,324,862,720", "72 MiB"):
        assert words in text


def test_patterns_are_found_whatever_they_are():
    config = preset("next-80b-a3b")
    times, blocks = repeated_blocks(config)
    assert times == 12
    assert [(block.num_layers, block.is_attention) for block in blocks] == [(3, False), (1, True)]
    assert repeated_blocks(preset("nano-dense"))[0] == 8
    odd = replace(config, num_hidden_layers=5, layer_types=(), mlp_only_layers=(0,))
    times, blocks = repeated_blocks(odd)
    assert times == 1
    assert blocks == blocks_of(odd)
    assert [block.num_layers for block in blocks] == [1, 2, 1, 1]


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_a_folder_is_measured_by_its_headers(tmp_path, layout, capsys):
    size = write_checkpoint(tmp_path, SMALL, has_mtp=False, layout=layout)
    summary = summarise(str(tmp_path))
    assert not summary.has_mtp
    assert summary.weight_bytes() == {"BF16": size}
    assert sum(map(math.prod, summary.shapes.values())) == summary.counts.total
    assert main(["inspect", str(tmp_path)]) == 0
    assert "as config.json asks" in capsys.readouterr().out


def test_a_folder_whose_weights_do_not_fit_its_config_is_shown_and_fails(tmp_path, capsys):
    write_checkpoint(tmp_path, SMALL, drop=["mtp.fc.weight"])
    assert main(["inspect", str(tmp_path)]) == 1
    assert "missing: mtp.fc.weight" in capsys.readouterr().out


def test_a_config_without_weights_is_enough(qnext_data, capsys):
    folder = qnext_data / "qwen/Qwen3-Next-80B-A3B-Instruct-FP8"
    assert main(["inspect", str(folder), "--context", "1000"]) == 0
    text = capsys.readouterr().out
    assert "Quantised by 'fp8'" in text
    assert "81,324,862,720" in text


@pytest.mark.parametrize("name,has_mtp", [("mtp.norm.weight", True), ("model.norm.weight", False)])
def test_a_hub_model_is_shown_from_its_config_and_index(tmp_path, monkeypatch, name, has_mtp):
    write_model_config(tmp_path, SMALL)
    index = {"weight_map": {name: "model-00001-of-00041.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(summary, "resolve_checkpoint", lambda name, with_weights: tmp_path)
    found = summarise("someone/something")
    assert (found.has_mtp, found.stored_bytes) == (has_mtp, None)


def test_json_holds_the_numbers(capsys):
    assert main(["inspect", "next-80b-a3b", "--json", "--context", "1024"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["total"] == 81_324_862_720
    assert report["recurrent_state_bytes"] == 72 << 20
    assert report["kv_bytes"] == 1024 * 26 * 1024
    assert report["weight_bytes"]["bfloat16"] == 162_649_725_440


@pytest.mark.parametrize("args", [["nothing-of-this-name"], ["nano", "--context", "0"]])
def test_a_mistake_is_one_line_and_code_two(args, capsys):
    assert main(["inspect", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qnext inspect: error:")
    assert error.count("\n") == 1


class Tags(HTMLParser):
    """Counts cells of the grid and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.spans, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.spans += [dict(attrs).get("class") for _ in [0] if tag == "span"]
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_is_whole_loads_nothing_and_has_the_expert_grid(name, tmp_path):
    path = tmp_path / "model.html"
    assert main(["inspect", name, "--html", str(path)]) == 0
    page = Tags()
    page.feed(path.read_text())
    config = preset(name)
    assert not page.open
    assert not page.links
    assert page.spans.count("on") == config.num_experts_per_tok
    assert page.spans.count("shared") == int(config.num_experts > 0)
    grid = page.spans.count(None) + page.spans.count("on")
    assert grid == config.num_experts


def test_names_are_escaped_in_the_page():
    page = render_page(replace(summarise("nano"), name="<script>x</script>"))
    assert "<script>" not in page


@pytest.mark.parametrize(
    "size,text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.50 KiB"), (72 << 20, "72 MiB")],
)
def test_bytes_are_written_for_people(size, text):
    assert format_bytes(size) == text
