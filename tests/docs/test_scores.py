"""The page of scores shows what the bundled checkpoints' manifests claim, and which checkpoints those are."""

from __future__ import annotations

import re

import pytest

from models.checkpoint import read_manifest
from readroom.records import FAMILIES
from readroom.scoring import BEGIN, END, Evaluation, describe_command
from tests.docs.markdown import ROOT

PAGE = ROOT / "docs" / "evaluation.md"
CELL = re.compile(r"(\d\.\d{3}) \[(\d\.\d{3}), (\d\.\d{3})\]")
COUNTS = {"films", "scenes", "answers", "answer_floor"}  # of a manifest; the page has columns for these


@pytest.fixture(scope="module")
def written() -> str:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    return text[text.index(BEGIN) : text.index(END)]


@pytest.fixture(scope="module")
def rows(written: str) -> dict[str, list[str]]:
    """Cells of each score: n, a cell for each family, the floor."""
    assert f"| score | n | {' | '.join(FAMILIES)} | floor |" in written
    lines = re.findall(r"^\| `([\w:/]+)` \| (.+) \|$", written, flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in lines}


def test_page_names_the_command_that_writes_it(written: str) -> None:
    assert f"\n{describe_command(Evaluation(FAMILIES), PAGE.relative_to(ROOT))}\n" in written


@pytest.mark.parametrize("family", FAMILIES)
def test_page_is_about_the_bundled_checkpoint(family: str, written: str) -> None:
    assert f"- {family}: " in written
    assert read_manifest(ROOT / "models" / "bundled" / family).ref in written


@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_of_the_manifest_is_on_the_page_and_no_other(family: str, rows: dict[str, list[str]]) -> None:
    scores = read_manifest(ROOT / "models" / "bundled" / family).scores
    column = 1 + FAMILIES.index(family)
    shown = {name: CELL.fullmatch(cells[column]) for name, cells in rows.items() if cells[column] != "-"}
    assert len(shown) >= 20 and shown.keys() == scores.keys() - COUNTS
    for name, cell in shown.items():
        assert cell is not None, name
        value, low, high = map(float, cell.groups())
        assert value == pytest.approx(scores[name], abs=0.0006), name
        assert low <= value <= high, name


def test_floor_is_that_of_the_manifest(rows: dict[str, list[str]]) -> None:
    claimed = read_manifest(ROOT / "models" / "bundled" / "vlp").scores
    assert float(rows["answer_accuracy"][-1]) == pytest.approx(claimed["answer_floor"], abs=0.0006)
    assert int(rows["answer_accuracy"][0]) == claimed["answers"]
    assert [int(rows[name][0]) for name in ("cardiomegaly", "shape")] == [claimed["films"], claimed["scenes"]]
