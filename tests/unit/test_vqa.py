"""VQA v2 folders: questions with their answers and images, and what is missing."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from producer.vqa import read_vqa
from readroom.errors import BadCall
from readroom.records import SkippedItem

SPLIT = "val2014"


def write_vqa(root, questions, annotations, images=(7, 9), folder="", split=SPLIT):
    """A VQA v2 folder; `questions` are (question id, image id, text), `annotations` (question id, kind, answers)."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    asked = [{"image_id": image, "question": text, "question_id": key} for key, image, text in questions]
    known = [
        {"question_id": key, "answer_type": kind, "answers": [{"answer": text, "answer_id": 1} for text in answers]}
        for key, kind, answers in annotations
    ]
    head = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_subtype": split}
    (root / folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({**head, "questions": asked}))
    (root / folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({**head, "annotations": known}))
    (root / split).mkdir(exist_ok=True)
    for image in images:
        Image.new("RGB", (20, 20), (image, 0, 0)).save(root / split / f"COCO_{split}_{image:012d}.jpg")
    return root


QUESTIONS = [(71, 7, "Is it red?"), (72, 7, "How many dogs?"), (91, 9, "What is it?")]
ANNOTATIONS = [(91, "other", ["bus"] * 10), (71, "yes/no", ["yes"] * 9 + ["no"]), (72, "number", ["2"] * 10)]


@pytest.mark.parametrize("folder", ["", "annotations", "vqa"])
def test_questions_come_with_image_and_ten_answers_in_the_order_of_their_file(tmp_path, folder):
    found = list(read_vqa(write_vqa(tmp_path, QUESTIONS, ANNOTATIONS, folder=folder)))
    assert [(q.question_id, q.image_id, q.text, q.kind) for q in found] == [
        ("71", "7", "Is it red?", "yes/no"),
        ("72", "7", "How many dogs?", "number"),
        ("91", "9", "What is it?", "other"),
    ]
    assert found[0].answers == ("yes",) * 9 + ("no",)
    assert found[2].path.endswith("val2014/COCO_val2014_000000000009.jpg")


def test_first_questions_only_are_read_when_there_is_a_limit(tmp_path):
    assert [q.question_id for q in read_vqa(write_vqa(tmp_path, QUESTIONS, ANNOTATIONS), limit=2)] == ["71", "72"]


def test_missing_image_is_named_and_the_rest_goes_on(tmp_path):
    found = list(read_vqa(write_vqa(tmp_path, QUESTIONS, ANNOTATIONS, images=(9,))))
    lost = [one for one in found if isinstance(one, SkippedItem)]
    assert [(one.item, str(one.reason)) for one in lost] == [("val2014/COCO_val2014_000000000007.jpg", "missing")] * 2
    assert [one.question_id for one in found if not isinstance(one, SkippedItem)] == ["91"]


def test_images_need_not_be_there_when_only_their_names_are_wanted(tmp_path):
    found = list(read_vqa(write_vqa(tmp_path, QUESTIONS, ANNOTATIONS, images=()), by_name=True))
    assert [one.path for one in found] == [f"val2014/COCO_val2014_{image:012d}.jpg" for image in (7, 7, 9)]


def test_question_without_annotation_is_left_out(tmp_path):
    assert len(list(read_vqa(write_vqa(tmp_path, QUESTIONS, ANNOTATIONS[:2])))) == 2


def test_folder_without_the_files_is_refused_by_the_name_of_the_missing_one(tmp_path):
    with pytest.raises(BadCall, match=r"v2_OpenEnded_mscoco_val2014_questions\.json is not in that folder"):
        list(read_vqa(tmp_path))
    write_vqa(tmp_path, QUESTIONS, ANNOTATIONS)
    (tmp_path / f"v2_mscoco_{SPLIT}_annotations.json").unlink()
    with pytest.raises(BadCall, match=r"v2_mscoco_val2014_annotations\.json"):
        list(read_vqa(tmp_path))


@pytest.mark.parametrize("spoil", ["cut", "no answers", "no text"])
def test_malformed_file_is_refused(tmp_path, spoil):
    questions = [(71, 7, "" if spoil == "no text" else "Is it red?")]
    write_vqa(tmp_path, questions, [(71, "yes/no", [] if spoil == "no answers" else ["yes"])])
    if spoil == "cut":
        file = tmp_path / f"v2_mscoco_{SPLIT}_annotations.json"
        file.write_text(file.read_text()[:-30])
    with pytest.raises(BadCall):
        list(read_vqa(tmp_path))
