"""The documents: links lead somewhere, figures are what their script draws."""

import re
import runpy
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO_ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_figures_are_what_their_script_draws():
    folder = REPO_ROOT / "docs" / "figures"
    module = runpy.run_path(str(folder / "draw.py"))
    for name, draw in module["FIGURES"].items():
        drawn = draw().render()
        stored = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == stored, f"{name}.svg is old; run python docs/figures/draw.py"
