"""The TOML loader: what it builds, and what its errors name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from qnext.config.toml import from_table, load_toml, to_table


@dataclass(frozen=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    name: Literal["general", "long"]
    tokens: int
    sources: tuple[Source, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int | None = None

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens = {self.tokens}: it must be at least 1")


@dataclass(frozen=True)
class Run:
    title: str
    is_fast: bool = False
    stages: tuple[Stage, ...] = ()
    best: Stage | None = None
    limits: dict[str, int] = field(default_factory=dict)


TEXT = """
title = "first"
is_fast = true
limits = { steps = 3 }
[[stages]]
name = "general"
tokens = 5
betas = [0.8, 1]
sources = [{ path = "a/b", weight = 2 }, { path = "c" }]
[best]
name = "long"
tokens = 7
seed = 3
"""


def test_a_file_becomes_nested_dataclasses(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    run = load_toml(path, Run)
    assert run == Run(
        title="first",
        is_fast=True,
        stages=(Stage("general", 5, (Source(Path("a/b"), 2.0), Source(Path("c"))), (0.8, 1.0)),),
        best=Stage("long", 7, seed=3),
        limits={"steps": 3},
    )
    assert isinstance(run.stages[0].betas[1], float)


def test_a_config_survives_the_way_to_a_table_and_back(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    run = load_toml(path, Run)
    assert from_table(Run, to_table(run)) == run


def test_overrides_are_laid_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    run = load_toml(path, Run, ["best.tokens=9", "title=plain words", "best.seed = 4"])
    assert (run.title, run.best.tokens, run.best.seed) == ("plain words", 9, 4)


def test_an_override_reaches_a_table_in_a_list(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    run = load_toml(path, Run, ["stages.0.tokens=9", "stages.0.sources.1.weight=3"])
    assert run.stages[0].tokens == 9
    assert run.stages[0].sources[1].weight == 3
    with pytest.raises(ValueError, match=r"stages\.4"):
        load_toml(path, Run, ["stages.4.tokens=9"])


@pytest.mark.parametrize(
    "table,words",
    [
        ({"title": "x", "colour": 1}, ["colour = 1", "unknown", "title", "stages"]),
        ({}, ["title is missing"]),
        ({"title": 3}, ["title = 3", "a string"]),
        ({"title": "x", "is_fast": 1}, ["is_fast = 1", "true or false"]),
        ({"title": "x", "best": {"name": "big", "tokens": 1}}, ["best.name = 'big'", "'general'"]),
        ({"title": "x", "best": {"name": "long", "tokens": True}}, ["best.tokens", "an integer"]),
        ({"title": "x", "best": {"name": "long", "tokens": 1.5}}, ["best.tokens = 1.5"]),
        ({"title": "x", "best": {"name": "long", "tokens": 0}}, ["best.tokens = 0", "at least 1"]),
        ({"title": "x", "stages": [{"name": "long", "tokens": 1, "n": 2}]}, ["stages[0].n = 2"]),
        ({"title": "x", "stages": 4}, ["stages = 4", "a list of"]),
        ({"title": "x", "limits": {"a": "b"}}, ["limits.a = 'b'", "an integer"]),
        ({"title": "x", "best": {"name": "long", "tokens": 1, "betas": [1]}}, ["a list of 2"]),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(table, words):
    with pytest.raises(ValueError) as caught:
        from_table(Run, table)
    for word in words:
        assert word in str(caught.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("a = = 3")
    with pytest.raises(ValueError, match=r"broken\.toml"):
        load_toml(path, Run)
    with pytest.raises(ValueError, match=r"absent\.toml"):
        load_toml(tmp_path / "absent.toml", Run)
    path.write_text("title = 4")
    with pytest.raises(ValueError, match=r"broken\.toml: title = 4"):
        load_toml(path, Run)
    with pytest.raises(ValueError, match="override 'title'"):
        load_toml(path, Run, ["title"])
