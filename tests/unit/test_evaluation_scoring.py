"""Models side by side: which checkpoint, which items, what the table and the page say."""

from __future__ import annotations

import io
import json
import os

import pytest
from rich.console import Console

from readroom import scoring
from readroom.errors import BadCall, CheckpointBroken, CheckpointMissing
from readroom.records import GenerationSettings
from readroom.scoring import (
    BEGIN,
    END,
    Column,
    Evaluation,
    Scoreboard,
    run_evaluation,
    save_predictions,
    write_markdown,
)
from readroom.settings import load_settings
from tests.unit.test_vqa import ANNOTATIONS, QUESTIONS, write_vqa
from training.intervals import Score
from training.phantoms import write_coco
from training.predictions import Prediction

DUMMY = ("dummy",)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("READROOM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return load_settings()


@pytest.fixture
def scenes(tmp_path):
    write_coco(tmp_path / "data", 5, seed=31)
    return tmp_path / "data"


# Which checkpoint ----------------------------------------------------------------------------------------------------


def test_phantoms_are_shown_to_the_bundled_checkpoints(settings):
    sources = scoring.choose_sources(settings, Evaluation(("blip", "vlp")))
    assert [(source.family, source.name) for source in sources] == [("blip", "bundled"), ("vlp", "bundled:vlp")]


def test_setting_wins_over_the_bundled_checkpoint_and_the_option_over_the_setting(settings, monkeypatch):
    monkeypatch.setenv("READROOM_BLIP_MODEL", "dummy:base_ms=1")
    settings = load_settings()
    assert scoring.choose_sources(settings, Evaluation(("blip",)))[0].name == "dummy:base_ms=1"
    assert scoring.choose_sources(settings, Evaluation(("blip",), ("bundled",)))[0].name == "bundled"


def test_bundled_means_each_models_own(settings):
    sources = scoring.choose_sources(settings, Evaluation(("vlp", "blip"), ("bundled",)))
    assert [source.family for source in sources] == ["vlp", "blip"]


def test_each_model_may_have_its_own_checkpoint(settings):
    sources = scoring.choose_sources(settings, Evaluation(("blip", "blip"), ("bundled", "dummy")))
    assert [source.name for source in sources] == ["bundled", "dummy"]
    with pytest.raises(BadCall, match="2 checkpoints for 3 models"):
        scoring.choose_sources(settings, Evaluation(("blip", "vlp", "blip"), ("bundled", "dummy")))


def test_missing_bundled_checkpoint_is_named_before_anything_runs(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("models.checkpoint.BUNDLED_DIR", tmp_path)
    with pytest.raises(CheckpointMissing, match="the bundled vlp is not in this checkout"):
        run_evaluation(settings, Evaluation(("vlp",)))


def test_real_data_is_never_shown_to_a_bundled_checkpoint_unasked(settings, scenes):
    with pytest.raises(CheckpointMissing, match="READROOM_VLP_MODEL"):
        run_evaluation(settings, Evaluation(("vlp",), dataset="coco", data_dir=scenes))
    source = scoring.choose_sources(settings, Evaluation(("blip",), dataset="vqa"))[0]
    assert source.ref.startswith("hub:Salesforce/blip-vqa-base")


def test_checkpoint_of_another_family_or_task_is_refused(settings):
    with pytest.raises(BadCall, match="of the family blip, and vlp was asked for"):
        scoring.choose_sources(settings, Evaluation(("vlp",), ("bundled:blip",)))
    with pytest.raises(CheckpointBroken, match="answers no questions"):
        scoring.choose_sources(settings, Evaluation(("blip",), ("bundled",), "vqa"))


# On what -------------------------------------------------------------------------------------------------------------


def test_coco_captions_are_scored_against_all_captions_of_their_image(settings, scenes):
    heard = []
    board = run_evaluation(settings, Evaluation(("blip",), DUMMY, "coco", scenes), lambda *event: heard.append(event))
    assert list(board.columns[0].scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]
    assert {score.n for score in board.columns[0].scores.values()} == {5}
    assert {len(one.references) for one in board.columns[0].predictions} == {5}
    assert board.protocol["split"] == "val2017" and board.protocol["items"] == 5
    assert heard == [("blip", 5, 5)] and board.list_failed() == []


def test_data_set_is_where_the_setting_says_or_the_call_is_bad(settings, scenes, monkeypatch):
    with pytest.raises(BadCall, match="READROOM_DATA_DIR"):
        run_evaluation(settings, Evaluation(("blip",), DUMMY, "coco"))
    monkeypatch.setenv("READROOM_DATA_DIR", str(scenes))
    board = run_evaluation(load_settings(), Evaluation(("blip",), DUMMY, "coco", limit=2))
    assert [one.item for one in board.columns[0].predictions] == ["1", "2"]


def test_images_that_are_missing_or_damaged_are_named_and_the_rest_is_scored(settings, scenes):
    pictures = scenes / "coco2017" / "val2017"
    (pictures / "000000000002.jpg").unlink()
    whole = (pictures / "000000000004.jpg").read_bytes()
    (pictures / "000000000004.jpg").write_bytes(whole[: len(whole) // 2])
    board = run_evaluation(settings, Evaluation(("blip",), DUMMY, "coco", scenes))
    assert board.columns[0].scores["cider"].n == 3
    assert len(board.list_failed()) == 2
    assert board.list_failed()[0] == "000000000002.jpg: missing"


def test_pictures_without_captions_cannot_be_scored(settings, scenes):
    with pytest.raises(BadCall, match="no captions to compare with"):
        run_evaluation(settings, Evaluation(("blip",), DUMMY, "coco", scenes / "coco2017" / "val2017"))


def test_vqa_questions_are_scored_by_kind_of_answer(settings, tmp_path):
    root = write_vqa(tmp_path / "vqa", QUESTIONS, ANNOTATIONS)
    board = run_evaluation(settings, Evaluation(("blip",), DUMMY, "vqa", root))
    scores = board.columns[0].scores
    assert {name: score.n for name, score in scores.items()} == {
        "answer_accuracy": 3, "answer:number": 1, "answer:other": 1, "answer:yes/no": 1,
    }  # fmt: skip
    assert [one.question for one in board.columns[0].predictions] == [text for _, _, text in QUESTIONS]


def test_predictions_are_saved_as_json_lines_with_their_checkpoint(settings, scenes, tmp_path):
    board = run_evaluation(settings, Evaluation(("blip", "blip"), DUMMY, "coco", scenes, limit=2))
    save_predictions(board, tmp_path / "said.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [(line["model"], line["item"]) for line in lines] == [
        ("blip 1", "1"), ("blip 1", "2"), ("blip 2", "1"), ("blip 2", "2"),
    ]  # fmt: skip
    assert lines[0]["checkpoint"].startswith("dummy:") and lines[0]["text"] and len(lines[0]["references"]) == 5


# Showing -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def board():
    said = Prediction("film:1", "film:1", "film", "", ("x",), "x")
    scores = {"view": Score(0.9, 20, 0.8, 1.0), "nodule_f1": Score(0.5, 3, 0.25, 0.75)}
    answers = {"answer_accuracy": Score(0.7, 160, 0.6, 0.8), "answer:view": Score(0.0, 0, 0.0, 0.0)}
    columns = (
        Column("blip", "bundled", "sha256:1", GenerationSettings(), scores, [said]),
        Column("vlp", "bundled:vlp", "sha256:2", GenerationSettings(), {**scores, **answers}, [said]),
    )
    protocol = {"dataset": "phantoms", "films": 20, "scenes": 20, "first_seed": 9, "questions_a_picture": 8}
    return Scoreboard(Evaluation(("blip", "vlp")), protocol, columns, {"view": Score(0.4, 20, 0.2, 0.6)}, ())


def test_table_shows_each_score_with_interval_and_number_of_items(board):
    out = io.StringIO()
    Console(file=out, width=100).print(scoring.render_table(board))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines == [
        ["score", "n", "blip", "vlp", "floor"],
        ["view", "20", "0.900", "[0.800,", "1.000]", "0.900", "[0.800,", "1.000]", "0.400"],
        ["answer_accuracy", "160", "-", "0.700", "[0.600,", "0.800]", "-"],
        ["F1", "of", "each", "finding"],
        ["nodule_f1", "3", "0.500", "[0.250,", "0.750]", "0.500", "[0.250,", "0.750]", "-"],
        ["Answers", "by", "kind", "of", "question"],
        ["view", "0", "-", "-", "-"],
    ]


def test_scores_are_written_between_the_markers_of_a_page_again_and_again(board, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    write_markdown(board, page)
    once = page.read_text()
    write_markdown(board, page)
    assert page.read_text() == once
    assert once.startswith("# Before\n") and once.endswith("\nAfter\n") and "old" not in once
    assert f"python evaluate.py --model blip --model vlp --markdown {page}" in once
    assert "| `view` | 20 | 0.900 [0.800, 1.000] | 0.900 [0.800, 1.000] | 0.400 |" in once
    assert "- vlp: bundled:vlp, sha256:2" in once


def test_page_without_markers_is_left_alone(board, tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(BadCall, match="does not exist"):
        write_markdown(board, page)
    page.write_text("# A page\n")
    with pytest.raises(BadCall, match="no place for scores"):
        write_markdown(board, page)
    assert page.read_text() == "# A page\n"
