"""The folders phantoms are written as: exact names, honest headers, and pictures that survive the display pipeline."""

import csv
import gzip
import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from models.pixels import render_file, to_model_input
from readroom.records import Reason
from training.data import fit_picture
from training.instances import make_instance, sample_visit
from training.phantoms import draw_radiograph, write_coco, write_mimic, write_pacs


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pacs")
    return root, write_pacs(root, 12, seed=3)


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    root = tmp_path_factory.mktemp("mimic")
    return root, write_mimic(root, 12, seed=3)


def _read_rows(path):
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def test_coco_folder_has_five_captions_for_each_picture(tmp_path):
    write_coco(tmp_path, 6, seed=1)
    document = json.loads((tmp_path / "coco2017/annotations/captions_val2017.json").read_text())
    names = [image["file_name"] for image in document["images"]]
    assert names[0] == "000000000001.jpg" and len(names) == 6
    assert all((tmp_path / "coco2017/val2017" / name).is_file() for name in names)
    assert len(document["annotations"]) == 30 == len({a["id"] for a in document["annotations"]})
    assert {a["image_id"] for a in document["annotations"]} == {image["id"] for image in document["images"]}


def test_coco_writer_uses_a_coco2017_folder_as_it_is(tmp_path):
    write_coco(tmp_path / "coco2017", 1, seed=1, split="train2017")
    assert (tmp_path / "coco2017/train2017/000000000001.jpg").is_file()
    assert (tmp_path / "coco2017/annotations/captions_train2017.json").is_file()


def test_pacs_export_holds_every_file_of_its_manifest(pacs):
    root, records = pacs
    assert json.loads((root / "phantoms.json").read_text()) == json.loads(json.dumps(records))
    written = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert written == {record["path"] for record in records} | {"phantoms.json"}


def test_pacs_export_mixes_folder_shapes_and_hazards(pacs):
    _, records = pacs
    accepted = [record for record in records if record["expected"] == "accepted"]
    assert len({record["study_instance_uid"] for record in accepted}) == 12
    assert len({record["path"].split("/")[0] for record in accepted}) > 4
    assert any(record["path"].endswith(".dcm") for record in accepted)
    assert any("." not in record["path"] for record in accepted)
    assert {r["expected"] for r in records} - {"accepted"} == {
        Reason.NOT_DICOM, Reason.EMPTY, Reason.DUPLICATE, Reason.SECONDARY_CAPTURE,
    }  # fmt: skip


def test_pacs_export_is_the_same_when_written_twice(tmp_path):
    write_pacs(tmp_path / "a", 3, seed=5)
    write_pacs(tmp_path / "b", 3, seed=5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) >= 7
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_pacs_companions_share_the_study_and_differ_in_instance(pacs):
    root, records = pacs
    accepted = [record for record in records if record["expected"] == "accepted"]
    headers = [dcmread(root / record["path"], stop_before_pixels=True) for record in accepted]
    assert [ds.SOPInstanceUID for ds in headers] == [record["sop_instance_uid"] for record in accepted]
    assert len({ds.SOPInstanceUID for ds in headers}) == len(headers)
    assert any(ds.get("ViewPosition") == "LL" for ds in headers)


def test_instances_are_as_varied_as_real_headers():
    pixels = draw_radiograph(1, 64).pixels
    seen = []
    for seed in range(80):
        content = make_instance(pixels, sample_visit(seed), "PA")
        ds = dcmread(BytesIO(content))
        voi = "lut" if "VOILUTSequence" in ds else "window" if "WindowCenter" in ds else "none"
        seen.append((ds.PhotometricInterpretation, ds.BitsStored, voi, "ViewPosition" in ds, ds.Modality))
    photometric, bits, voi, view, modality = (set(column) for column in zip(*seen, strict=True))
    assert photometric == {"MONOCHROME1", "MONOCHROME2"} and modality == {"CR", "DX"}
    assert {12, 15} <= bits and voi == {"lut", "window", "none"} and view == {True, False}


def test_instance_displays_as_the_drawn_picture_whatever_its_header(tmp_path):
    plain = 0
    for seed in range(40):
        drawn = draw_radiograph(20_900_000 + seed, 160).pixels
        path = tmp_path / f"{seed}.dcm"
        path.write_bytes(make_instance(drawn, sample_visit(seed), "PA"))
        shown = render_file(path)
        if _is_plain(path):  # readers choose the range themselves: the same picture, somewhat stretched
            assert np.corrcoef(shown.ravel(), drawn.ravel())[0, 1] > 0.99, seed
            plain += 1
            continue
        assert np.abs(shown.astype(int) - drawn).max() <= 3, seed
        served = to_model_input(shown, 96).transpose(2, 0, 1).astype(int)
        assert np.abs(served - fit_picture(Image.fromarray(drawn), 96)).max() <= 3, seed
    assert 1 <= plain <= 15


def _is_plain(path):
    ds = dcmread(path, stop_before_pixels=True)
    return "WindowCenter" not in ds and "VOILUTSequence" not in ds


def test_mimic_trees_have_the_published_names(mimic):
    root, records = mimic
    pattern = r"files/p1\d/p1\d{7}/s5\d{7}/[0-9a-f]{8}(-[0-9a-f]{8}){4}"
    assert len(records) >= 12
    for record in records:
        assert re.fullmatch(pattern, record["path"])
        assert (root / "mimic-cxr/2.0.0" / f"{record['path']}.dcm").is_file()
        assert (root / "mimic-cxr-jpg/2.0.0" / f"{record['path']}.jpg").is_file()
        assert (root / "mimic-cxr/2.0.0" / f"{record['path'].rsplit('/', 1)[0]}.txt").is_file()


def test_mimic_tables_agree_with_the_files_and_split_by_subject(mimic):
    root, records = mimic
    jpg = root / "mimic-cxr-jpg/2.0.0"
    splits = _read_rows(jpg / "mimic-cxr-2.0.0-split.csv.gz")
    assert {row["dicom_id"] for row in splits} == {record["dicom_id"] for record in records}
    owners = {(row["subject_id"], row["split"]) for row in splits}
    assert len(owners) == len({subject for subject, _ in owners})
    assert {split for _, split in owners} == {"train", "validate", "test"}
    labels = _read_rows(jpg / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert len(labels) == 12
    assert {row["Pleural Effusion"] for row in labels} <= {"1.0", "0.0", "-1.0", ""}
    listed = _read_rows(root / "mimic-cxr/2.0.0/cxr-record-list.csv.gz")
    assert all((root / "mimic-cxr/2.0.0" / row["path"]).is_file() for row in listed)


def test_mimic_reports_keep_the_published_habits(mimic):
    root, _ = mimic
    reports = [path.read_text() for path in (root / "mimic-cxr/2.0.0").rglob("s5*.txt")]
    assert len(reports) == 12
    for text in reports:
        lines = text.splitlines()
        assert lines[0] == " " * 33 + "FINAL REPORT"
        assert all(line.startswith(" ") and len(line) < 80 for line in lines)
    assert any(re.search(r"\n FINDINGS: ", text) for text in reports)
    assert any(re.search(r"\n IMPRESSION: ", text) for text in reports)
