"""What the demo shows of each image, and which models it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from db.results import ResultRecord
from models import checkpoint
from readroom.demo import Samples, caption_table, draw_entries, find_families, group_images
from readroom.errors import CheckpointMissing
from readroom.records import JobKind


def make_record(job: int, item: str, captioner: str, text: str) -> ResultRecord:
    names = (None, None, None, None, None, item, "PA", "d" * 64, 0, "")
    return ResultRecord("s", job, JobKind.CAPTION, *names, text, -0.25, captioner, f"sha256:{captioner}", 0.0)


@pytest.fixture
def records() -> list[ResultRecord]:
    """As the store gives them: by job, each captioner's images together."""
    said = [("vlp", "a.png", "a red circle"), ("vlp", "b.png", "a dog"), ("blip", "a.png", "a circle")]
    return [make_record(job, item, captioner, text) for job, (captioner, item, text) in enumerate(said)]


def test_both_captions_of_an_image_stand_together_and_in_the_same_order(records: list[ResultRecord]) -> None:
    grouped = group_images(records)
    assert [[(one.item, one.captioner) for one in said] for said in grouped] == [
        [("a.png", "blip"), ("a.png", "vlp")], [("b.png", "vlp")],
    ]  # fmt: skip


def test_a_card_shows_one_picture_with_every_models_caption(records: list[ResultRecord], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), (200, 10, 10)).save(tmp_path / name)
    samples = Samples(tmp_path, tmp_path, {"a.png": "a red circle"})
    first, second = draw_entries(samples, records, [])
    assert (first.texts, first.detail) == ({"BLIP": "a circle", "VLP": "a red circle"}, "truth: a red circle")
    assert (second.title, second.texts) == ("b.png", {"VLP": "a dog"})
    assert first.picture.size == (20, 10)


def test_the_table_names_an_image_once_and_each_model_beside_its_caption(records: list[ResultRecord]) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(caption_table(records))
    lines = [line for line in capture.get().splitlines() if "circle" in line or "dog" in line]
    assert [line.count("a.png") for line in lines] == [1, 0, 0]
    assert [model for line in lines for model in ("BLIP", "VLP") if model in line] == ["BLIP", "VLP", "VLP"]


def test_the_demo_runs_the_families_that_are_bundled_and_never_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "blip").symlink_to(checkpoint.BUNDLED_DIR / "blip")
    monkeypatch.setattr(checkpoint, "BUNDLED_DIR", tmp_path)
    assert find_families() == ("blip",)
    (tmp_path / "blip").unlink()
    with pytest.raises(CheckpointMissing, match="bundled blip is not in this checkout"):
        find_families()
