"""The script that trains a recipe on several sets of kernels."""

import json

import pytest

from benchmarks.recipe import main, parse
from tests.data.corpus import prepare_corpus
from tests.train.test_loop import run_table, to_toml


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    shards, *_ = prepare_corpus(folder)
    file = folder / "train.toml"
    file.write_text(to_toml(run_table(shards, folder / "never")))
    return file


def test_each_contender_is_trained_and_leaves_nothing_behind(recipe, capsys):
    options = ["--minutes", "2", "--contenders", "torch:eager", "reference:eager"]
    assert main([str(recipe), *options, "--set", "log.every_steps=1"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in record["measurements"]}
    assert rows.keys() == {"torch:eager", "reference:eager"}
    assert all(len(row["values"]) == 12 and min(row["values"]) > 0 for row in rows.values())
    assert not (recipe.parent / "never").exists()


def test_a_run_that_fails_is_named_with_its_reason(recipe, capsys):
    options = ["--contenders", "torch:eager", "--set", "stage.0.context=0"]
    assert main([str(recipe), *options]) == 1
    (skipped,) = json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]
    assert skipped["name"] == "torch:eager"
    assert "context = 0" in skipped["reason"]


@pytest.mark.parametrize("contender", ["torch", "cuda:eager", "torch:fast"])
def test_unknown_contenders_are_refused(contender, capsys):
    with pytest.raises(SystemExit):
        parse(["x.toml", "--contenders", contender])
    assert contender in capsys.readouterr().err
