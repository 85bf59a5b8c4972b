"""COCO folders, Karpathy's and BLIP's files, plain images, and a MIMIC-CXR tree."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from producer.annotations import iter_elements
from producer.coco import read_coco
from producer.images import scan_images
from producer.mimic import scan_mimic
from producer.pacs import Found
from readroom.errors import BadCall
from readroom.records import FoundImage, SkippedItem
from readroom.settings import Settings, load_settings
from tests import exports


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home", max_pixels=1_000_000)


def picture(shade: int = 0, size: tuple[int, int] = (12, 8), kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(out, kind)
    return out.getvalue()


def write_coco(base: Path, names: list[str], extra: list[dict[str, Any]] | None = None, split: str = "val2017") -> None:
    exports.write_files(base / split, {name: picture(20 * n) for n, name in enumerate(names)})
    images = [{"id": 100 + n, "file_name": name, "height": 8, "width": 12} for n, name in enumerate(names)]
    captions = [{"id": n, "image_id": 100 + n // 2, "caption": f"caption {n}"} for n in range(2 * len(names))]
    document = {"info": {"year": 2017}, "licenses": [{"id": 1}], "images": [*images, *(extra or [])]}
    write_json(base / "annotations" / f"captions_{split}.json", document | {"annotations": captions[::-1]})


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def split_found(found: Iterator[Found]) -> tuple[list[FoundImage], dict[str, str]]:
    images, skipped = [], {}
    for one in found:
        if isinstance(one, SkippedItem):
            skipped[one.item] = str(one.reason)
        else:
            images.append(one)
    return images, skipped


@pytest.mark.parametrize("inner", ["", "coco2017", "coco"])
def test_a_coco_folder_is_read_from_itself_or_from_above(inner: str, tmp_path: Path, settings: Settings) -> None:
    write_coco(tmp_path / "data" / inner, ["000000000139.jpg", "000000000285.jpg"])
    images, skipped = split_found(read_coco(tmp_path / "data", settings))
    assert skipped == {}
    assert [(one.item, one.source_id) for one in images] == [("000000000139.jpg", "100"), ("000000000285.jpg", "101")]
    assert images[0].reference_texts == ("caption 1", "caption 0")
    assert (images[0].rows, images[0].columns, images[0].study_instance_uid) == (8, 12, None)
    assert images[0].ref.path == str(tmp_path / "data" / inner / "val2017" / "000000000139.jpg")


def test_a_split_without_year_is_found(tmp_path: Path, settings: Settings) -> None:
    write_coco(tmp_path, ["COCO_val2014_000000391895.jpg"], split="val2014")
    images, _ = split_found(read_coco(tmp_path, settings, split="val"))
    assert [one.item for one in images] == ["COCO_val2014_000000391895.jpg"]


def test_entries_that_cannot_be_used_are_listed_and_the_rest_goes_on(tmp_path: Path, settings: Settings) -> None:
    base = tmp_path / "data"
    exports.write_files(tmp_path, {"secret.jpg": picture()})
    extra: list[Any] = [
        {"id": 1, "file_name": "gone.jpg"},
        {"id": 2, "file_name": "../../secret.jpg"},
        {"id": 3, "file_name": "/etc/passwd"},
        {"id": 100, "file_name": "a.jpg"},
        {"id": 4, "file_name": "link.jpg"},
        {"id": 5, "file_name": "text.jpg"},
        {"id": 6, "file_name": "empty.jpg"},
        {"id": 7, "file_name": "large.png"},
        {"id": 8, "file_name": "cut.jpg"},
        {"id": 9, "file_name": "\ud800.jpg"},
        {"id": 10},
        "nonsense",
    ]
    write_coco(base, ["a.jpg", "b.jpg"], extra)
    files = {"text.jpg": b"hello", "empty.jpg": b"", "cut.jpg": picture()[:30]}
    exports.write_files(base / "val2017", files | {"large.png": picture(0, (2000, 1000), "PNG")})
    (base / "val2017" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    images, skipped = split_found(read_coco(base, settings))
    assert [one.item for one in images] == ["a.jpg", "b.jpg"]
    assert skipped == {
        "gone.jpg": "missing",
        "../../secret.jpg": "unsafe_path",
        "/etc/passwd": "unsafe_path",
        "a.jpg": "duplicate",
        "link.jpg": "unsafe_path",
        "text.jpg": "not_image",
        "empty.jpg": "empty",
        "large.png": "too_large",
        "cut.jpg": skipped["cut.jpg"],
        "\\ud800.jpg": "missing",
        "images[12]": "corrupt",
        "images[13]": "corrupt",
    }
    assert skipped["cut.jpg"] in {"not_image", "corrupt"}


def test_a_karpathy_file_gives_its_split_and_restval_is_train(tmp_path: Path, settings: Settings) -> None:
    exports.write_files(tmp_path / "val2014", {f"{n}.jpg": picture(n) for n in range(4)})
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "cocoid": 7000 + n,
            "imgid": n,
            "split": split,
            "sentences": [{"raw": f"text {n}", "tokens": ["text", str(n)]}],
        }
        for n, split in enumerate(["train", "restval", "val", "test"])
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    train, _ = split_found(read_coco(tmp_path, settings, split="train"))
    test, _ = split_found(read_coco(tmp_path, settings, split="test"))
    assert [(one.source_id, one.reference_texts) for one in train] == [("7000", ("text 0",)), ("7001", ("text 1",))]
    assert [one.item for one in test] == ["val2014/3.jpg"]
    moved = tmp_path / "elsewhere" / "splits.json"
    moved.parent.mkdir()
    (tmp_path / "dataset_coco.json").rename(moved)
    named, _ = split_found(read_coco(tmp_path, settings, split="val", karpathy=moved))
    assert [one.source_id for one in named] == ["7002"]


def test_a_blip_list_names_an_image_once_with_all_its_captions(tmp_path: Path, settings: Settings) -> None:
    exports.write_files(tmp_path / "val2014", {"a.jpg": picture(1), "b.jpg": picture(2)})
    entries = [
        {"caption": f"c{n}", "image": f"val2014/{'ab'[n % 2]}.jpg", "image_id": f"coco_{n % 2}"} for n in range(6)
    ]
    write_json(tmp_path / "annotations" / "coco_karpathy_train.json", entries)
    images, skipped = split_found(read_coco(tmp_path, settings, split="train"))
    assert skipped == {}
    assert [(one.source_id, one.reference_texts) for one in images] == [
        ("coco_0", ("c0", "c2", "c4")),
        ("coco_1", ("c1", "c3", "c5")),
    ]
    write_json(
        tmp_path / "annotations" / "coco_karpathy_test.json", [{"image": "val2014/b.jpg", "caption": ["x", "y"]}]
    )
    images, _ = split_found(read_coco(tmp_path, settings, split="karpathy_test"))
    assert [one.reference_texts for one in images] == [("x", "y")]


def test_a_folder_without_annotations_is_plain_images(tmp_path: Path, settings: Settings) -> None:
    exports.write_files(tmp_path / "coco2017" / "val2017", {"a.jpg": picture(1)})
    images, _ = split_found(read_coco(tmp_path, settings))
    assert [one.item for one in images] == ["a.jpg"]


def test_a_folder_with_nothing_of_the_split_is_a_bad_call(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "train2017").mkdir()
    with pytest.raises(BadCall, match="annotations"):
        read_coco(tmp_path, settings)
    with pytest.raises(BadCall):
        read_coco(tmp_path / "not-there", settings)


@pytest.mark.parametrize("cut", [2, 30, 200, 300])
def test_a_cut_annotation_file_is_a_bad_call_without_its_path(cut: int, tmp_path: Path, settings: Settings) -> None:
    write_coco(tmp_path, ["a.jpg", "b.jpg"])
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text()[:-cut])
    with pytest.raises(BadCall, match="annotation file") as caught:
        list(read_coco(tmp_path, settings))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "hello", "[1, 2", '{"images": [}', '{"images": 5', "\x00", '{"a": {"b": ', "[" * 5000]
)
def test_what_is_no_json_is_a_bad_call(text: str) -> None:
    with pytest.raises(BadCall):
        list(iter_elements(io.StringIO(text), "images"))


def test_elements_are_found_whatever_stands_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "other": [[1, 2], {"images": [9]}],
        "n": 12345,
        "t": None,
        "images": [{"id": n, "s": 'a "quoted" ]}, text \u00e9'} for n in range(50)],
        "z": {"images": 3},
    }
    for chunk in (1, 3, 7, 64, 10_000):
        monkeypatch.setattr("producer.annotations.CHUNK_CHARACTERS", chunk)
        for indent in (None, 2):
            found = list(iter_elements(io.StringIO(json.dumps(document, indent=indent)), "images"))
            assert found == document["images"]
    assert list(iter_elements(io.StringIO(json.dumps([1, {"a": 2}, None])), "images")) == [{}, {"a": 2}, {}]
    assert list(iter_elements(io.StringIO('{"images": []}'), "images")) == []
    assert list(iter_elements(io.StringIO('{"no": [1]}'), "images")) == []


def test_an_annotation_file_four_times_as_large_takes_the_same_memory(tmp_path: Path, settings: Settings) -> None:
    peaks = []
    for count in (3_000, 12_000):
        entries = [{"id": n, "file_name": f"{n:012d}.jpg", "flickr_url": "x" * 100} for n in range(count)]
        captions = [{"id": n, "image_id": n, "caption": "y" * 50} for n in range(count)]
        write_json(tmp_path / "annotations" / "captions_val2017.json", {"images": entries, "annotations": captions})
        (tmp_path / "val2017").mkdir(exist_ok=True)
        tracemalloc.start()
        assert sum(one.reason == "missing" for one in read_coco(tmp_path, settings)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000  # bytes


# ------------------------------------------------------------------------------------------------- images and MIMIC


def test_images_are_found_in_any_folder_and_junk_is_listed(tmp_path: Path, settings: Settings) -> None:
    files = {
        "a/1.jpg": picture(1),
        "a/2.png": picture(2, kind="PNG"),
        "b/no-extension": picture(3, kind="WEBP"),
        "film.dcm": exports.encode(exports.make_radiograph("film")),
        "ct.dcm": exports.encode(exports.make_radiograph("ct", SOPClassUID=exports.STORAGE + "2", Modality="CT")),
        "notes.txt": b"hello",
        "empty.png": b"",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    exports.write_files(tmp_path / "in", files)
    images, skipped = split_found(scan_images(tmp_path / "in", settings))
    assert [one.item for one in images] == ["a/1.jpg", "a/2.png", "b/no-extension", "film.dcm"]
    assert skipped == {
        "ct.dcm": "other_modality",
        "notes.txt": "not_image",
        "empty.png": "empty",
        "script.eps": "not_image",
    }
    one, _ = split_found(scan_images(tmp_path / "in" / "a" / "1.jpg", settings))
    assert [found.item for found in one] == ["1.jpg"]


STUDY = "files/p10/p10000032/s50414267"


def test_a_mimic_tree_gives_study_subject_view_and_split(tmp_path: Path, settings: Settings) -> None:
    first, second = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014", "174413ec-4ec4c1f7-34ea26b7-c5f994f8-79ef1962"
    base = tmp_path / "mimic-cxr-jpg" / "2.0.0"
    tables = {
        "mimic-cxr-2.0.0-metadata.csv.gz": gzip.compress(
            f"dicom_id,Extra,ViewPosition\n{first},x,PA\n{second},x,\n".encode()
        ),
        "mimic-cxr-2.0.0-split.csv.gz": gzip.compress(
            f"dicom_id,study_id,split\n{first},5,train\n{second},5,test\n".encode()
        ),
    }
    images = {f"{STUDY}/{first}.jpg": picture(1), f"{STUDY}/{second}.jpg": picture(2), "files/odd.bin": b"x"}
    exports.write_files(base, tables | images | {f"{STUDY}.txt": b"FINAL REPORT", "files/index.html": b""})
    found, skipped = split_found(scan_mimic(tmp_path / "mimic-cxr-jpg", settings))
    assert skipped == {"odd.bin": "not_image"}
    assert [(one.source_id, one.study_instance_uid, one.patient_id, one.view, one.view_rank) for one in found] == [
        (first, "s50414267", "p10000032", "PA", 0),
        (second, "s50414267", "p10000032", None, 2),
    ]
    assert (found[0].flags, found[1].flags) == ((), ("view_unknown",))
    only, _ = split_found(scan_mimic(base, settings, split="test"))
    assert [one.source_id for one in only] == [second]


def test_a_mimic_dicom_keeps_its_own_identifiers(tmp_path: Path, settings: Settings) -> None:
    data = exports.encode(exports.make_radiograph("film", PatientID=None, ViewPosition="LATERAL"))
    exports.write_files(tmp_path, {f"{STUDY}/abc.dcm": data})
    (one,), _ = split_found(scan_mimic(tmp_path, settings))
    assert one.study_instance_uid == exports.name_uid("study", "film")
    assert (one.patient_id, one.view, one.source_id) == ("p10000032", "LATERAL", "abc")


def test_a_mimic_tree_that_is_none_is_a_bad_call(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(BadCall, match="MIMIC"):
        scan_mimic(tmp_path, settings)
    (tmp_path / "files").mkdir()
    with pytest.raises(BadCall, match="split"):
        scan_mimic(tmp_path, settings, split="train")
