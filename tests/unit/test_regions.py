"""What a spec of regions may say, and where regions are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.vlp.regions import DATASETS, RegionSpec, locate_regions, open_provider
from readroom.errors import CheckpointBroken, CheckpointMissing

CPU = torch.device("cpu")
GRID: dict[str, Any] = {
    "provider": "grid",
    "count": 144,
    "feature_dim": 128,
    "class_count": 0,
    "image_size": 96,
    "mean": [0.5, 0.25, 0.125],
    "std": [0.5, 0.25, 0.125],
    "layout": {},
}
PRECOMPUTED: dict[str, Any] = {
    "provider": "precomputed",
    "count": 100,
    "feature_dim": 2048,
    "class_count": 1601,
    "layout": {"dataset": "cc", "prefix": "shards/cc", "boxes": "cc.h5"},
}
DETECTOR: dict[str, Any] = {**GRID, "provider": "detector", "class_count": 92}

WRONG = [
    (GRID, "provider", "pixels"),
    (GRID, "provider", None),
    (GRID, "provider", ["grid"]),
    (GRID, "count", 0),
    (GRID, "count", 4097),
    (GRID, "count", 1.5),
    (GRID, "count", True),
    (GRID, "count", "144"),
    (GRID, "feature_dim", -1),
    (GRID, "feature_dim", 10**9),
    (GRID, "class_count", 5),
    (GRID, "class_count", None),
    (DETECTOR, "class_count", 0),
    (DETECTOR, "class_count", 1),
    (GRID, "image_size", 0),
    (GRID, "image_size", 2049),
    (GRID, "count", 10**400),
    (PRECOMPUTED, "image_size", 224),
    (GRID, "mean", [0.5, 0.5]),
    (GRID, "mean", [0.5, 0.5, float("nan")]),
    (GRID, "mean", "0.5"),
    (GRID, "std", [0.5, 0.5, 0]),
    (GRID, "std", [0.5, 0.5, float("inf")]),
    (GRID, "std", [0.5, 0.5, True]),
    (GRID, "std", [0.5, 0.5, 1e-300]),
    (GRID, "std", [0.5, 0.5, 10**400]),
    (GRID, "mean", [0.5, 0.5, -(10**400)]),
    (GRID, "mean", [0.5, 0.5, 1e6]),
    (GRID, "mean", [0.5, 0.5, False]),
    (GRID, "layout", {"prefix": "shards/cc"}),
    (PRECOMPUTED, "layout", ["cc"]),
    (PRECOMPUTED, "layout", {"shards": "cc"}),
    (PRECOMPUTED, "layout.dataset", {"dataset": "imagenet"}),
    (PRECOMPUTED, "layout.prefix", {"prefix": "../outside"}),
    (PRECOMPUTED, "layout.prefix", {"prefix": ""}),
    (PRECOMPUTED, "layout.prefix", {"prefix": 7}),
    (PRECOMPUTED, "layout.boxes", {"boxes": "/etc/boxes.h5"}),
    (PRECOMPUTED, "layout.boxes", {"boxes": "a\\b.h5"}),
    (PRECOMPUTED, "layout.boxes", {"boxes": "a\0.h5"}),
]


@pytest.mark.parametrize("document", [GRID, PRECOMPUTED, DETECTOR], ids=lambda document: document["provider"])
def test_a_spec_is_read_back_as_it_was_written(document: dict[str, Any]) -> None:
    spec = RegionSpec.from_json(document)
    written = json.loads(json.dumps(spec.as_json()))
    assert written == spec.as_json()
    assert {key: written[key] for key in document} == document
    assert RegionSpec.from_json(written) == spec


@pytest.mark.parametrize(("document", "field", "value"), WRONG)
def test_a_spec_with_a_wrong_field_is_refused_and_the_field_named(
    document: dict[str, Any], field: str, value: Any
) -> None:
    with pytest.raises(CheckpointBroken, match=f"regions: {field} is not usable"):
        RegionSpec.from_json({**document, field.partition(".")[0]: value})


@pytest.mark.parametrize("field", ["provider", "count", "feature_dim", "class_count"])
def test_a_spec_without_a_needed_field_is_refused_and_the_field_named(field: str) -> None:
    with pytest.raises(CheckpointBroken, match=f"regions: {field} is not usable"):
        RegionSpec.from_json({key: value for key, value in GRID.items() if key != field})


@pytest.mark.parametrize("document", [{**GRID, "stride": 8}, ["grid"], None])
def test_a_spec_that_says_more_or_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(CheckpointBroken, match=r"regions: (stride|regions) is not usable"):
        RegionSpec.from_json(document)


def locate_by_hand(boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """SPEC section 3, a region at a time in float64."""
    width = max(max(box[0], box[2]) for box in boxes) + 1e-5
    height = max(max(box[1], box[3]) for box in boxes) + 1e-5
    rows = []
    for (x1, y1, x2, y2, _, confidence), probabilities in zip(boxes, classes, strict=True):
        left, top, right, bottom = x1 / width, y1 / height, x2 / width, y2 / height
        area = max(0.0, (bottom - top) * (right - left))
        geometry = np.array([left, top, right, bottom, area, confidence])
        rows.append(np.concatenate([norm_by_hand(part) for part in (geometry, probabilities) if len(part)]))
    return np.stack(rows)


def norm_by_hand(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


def draw_regions(images: int, count: int, class_count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(5)
    corners = draw.uniform(0, 600, (images, count, 4))
    rest = draw.uniform(0, 1, (images, count, 2))
    classes = draw.dirichlet(np.ones(class_count), (images, count)) if class_count else np.zeros((images, count, 0))
    return np.concatenate([corners, rest], axis=-1), classes


@pytest.mark.parametrize("class_count", [0, 7, 1601])
def test_regions_are_located_as_by_hand(class_count: int) -> None:
    # Corners are in no order, so that some boxes have a negative area.
    boxes, classes = draw_regions(3, 20, class_count)
    found = locate_regions(torch.tensor(boxes, dtype=torch.float32), torch.tensor(classes, dtype=torch.float32))
    expected = np.stack([locate_by_hand(*pair) for pair in zip(boxes, classes, strict=True)])
    assert found.shape == (3, 20, 6 + class_count) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_class_index_has_no_part_in_a_place() -> None:
    boxes, classes = (torch.tensor(part, dtype=torch.float32) for part in draw_regions(2, 9, 4))
    renamed = boxes.clone()
    renamed[..., 4] = 17
    assert torch.equal(locate_regions(boxes, classes), locate_regions(renamed, classes))


def test_boxes_of_no_size_get_finite_places() -> None:
    places = locate_regions(torch.zeros(1, 5, 6), torch.full((1, 5, 3), 1 / 3))
    assert places.isfinite().all()


def test_the_boxes_given_are_left_as_they_are() -> None:
    boxes, classes = (torch.tensor(part, dtype=torch.float32) for part in draw_regions(1, 9, 4))
    before = boxes.clone(), classes.clone()
    locate_regions(boxes, classes)
    assert torch.equal(boxes, before[0]) and torch.equal(classes, before[1])


@pytest.mark.parametrize("region_dir", [None, "gone"])
def test_precomputed_regions_without_their_folder_name_the_setting(tmp_path: Path, region_dir: str | None) -> None:
    with pytest.raises(CheckpointMissing, match="READROOM_REGION_DIR must name the folder"):
        place = tmp_path / region_dir if region_dir else None
        open_provider(tmp_path, RegionSpec.from_json(PRECOMPUTED), CPU, torch.float32, place)


def test_precomputed_regions_of_another_data_set_name_the_box_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"holds no cc\.h5"):
        open_provider(tmp_path, RegionSpec.from_json(PRECOMPUTED), CPU, torch.float32, tmp_path)


def test_precomputed_regions_without_h5py_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "models.vlp.precomputed", raising=False)
    with pytest.raises(CheckpointMissing, match=r"readroom\[regions\]"):
        open_provider(tmp_path, RegionSpec.from_json(PRECOMPUTED), CPU, torch.float32, tmp_path)


@pytest.mark.parametrize("document", [GRID, DETECTOR], ids=lambda document: document["provider"])
def test_a_provider_without_its_files_is_missing(tmp_path: Path, document: dict[str, Any]) -> None:
    with pytest.raises(CheckpointMissing, match=r"holds no regions\.json"):
        open_provider(tmp_path, RegionSpec.from_json(document), CPU, torch.float32)


def test_every_data_set_has_a_layout() -> None:
    from models.vlp.precomputed import LAYOUTS

    assert tuple(LAYOUTS) == DATASETS and len(DATASETS) == 3
