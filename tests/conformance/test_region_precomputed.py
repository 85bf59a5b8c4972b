"""HDF5 files in the original's layout are read back as they were written, and anything else names the image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from models.vlp import precomputed
from models.vlp.precomputed import LAYOUTS, PrecomputedProvider, RegionReader
from models.vlp.regions import RegionProvider, RegionSpec, locate_regions, open_provider
from readroom.errors import BadCall, ImageError
from readroom.records import ImageRef, Reason

CPU = torch.device("cpu")
SPEC = RegionSpec("precomputed", 100, 2048, 1601)
IDS = [f"COCO_val2014_{number:012d}" for number in (391895, 522418, 1391895, 7)]
FIRST = IDS[0]
PREFIX, BOXES = LAYOUTS["coco"]


def draw_arrays(image_id: str) -> dict[str, np.ndarray]:
    """What the original's detector wrote of an image: float16 features and classes, float32 boxes."""
    draw = np.random.default_rng(int(image_id[-12:]))
    corners = np.sort(draw.uniform(0, 640, (100, 2, 2)), axis=1).reshape(100, 4)
    confidence = np.sort(draw.uniform(0.2, 1, (100, 1)), axis=0)[::-1]
    return {
        "feat": draw.standard_normal((100, 2048)).astype(np.float16),
        "cls": draw.dirichlet(np.full(1601, 0.01), 100).astype(np.float16),
        "boxes": np.hstack([corners, draw.integers(1, 1601, (100, 1)), confidence]).astype(np.float32),
    }


def place_of(root: Path, array: str, image_id: str = FIRST, dataset: str = "coco") -> Path:
    prefix, boxes = LAYOUTS[dataset]
    return root / boxes if array == "boxes" else root / f"{prefix}_{array}{image_id[-3:]}.h5"


def write_layout(root: Path, ids: list[str], dataset: str = "coco") -> Path:
    for image_id in ids:
        for array, values in draw_arrays(image_id).items():
            path = place_of(root, array, image_id, dataset)
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "a") as file:
                file.create_dataset(image_id, data=values)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(tmp_path_factory.mktemp("coco") / "region_feat_gvd_wo_bgd", IDS)


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "region_feat_gvd_wo_bgd"))


def ref_of(image_id: str) -> ImageRef:
    return ImageRef(f"/pictures/val2014/{image_id}.jpg")


def fail_reading(root: Path, spec: RegionSpec = SPEC, image_id: str = FIRST) -> ImageError:
    reader = RegionReader(spec, root)
    try:
        with pytest.raises(ImageError) as caught:
            reader.read(ref_of(image_id))
    finally:
        reader.close()
    return caught.value


def replace_dataset(path: Path, **made: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[FIRST]
        file.create_dataset(FIRST, **made)


# As the original wrote them ------------------------------------------------------------------------------------------


def test_the_shards_are_named_as_the_original_names_them(written: Path) -> None:
    assert (written / "feat_cls_1000/coco_detection_vg_100dets_gvd_checkpoint_trainval_feat895.h5").is_file()
    assert (written / "feat_cls_1000/coco_detection_vg_100dets_gvd_checkpoint_trainval_cls418.h5").is_file()
    assert (written / "coco_detection_vg_thresh0.2_feat_gvd_checkpoint_trainvaltest.h5").is_file()


@pytest.mark.parametrize("dataset", ["coco", "cc"])
def test_the_original_layout_is_read_back_as_float32(tmp_path: Path, dataset: str) -> None:
    write_layout(tmp_path, IDS, dataset)
    layout = {} if dataset == "coco" else {"dataset": dataset}
    spec = RegionSpec("precomputed", 100, 2048, 1601, layout=layout)
    provider: RegionProvider = open_provider(tmp_path, spec, CPU, torch.bfloat16, tmp_path)
    assert provider.reader is not None and provider.module() is None
    regions = provider.compute(provider.prepare([provider.reader.read(ref_of(image_id)) for image_id in IDS]))
    assert len(regions.features) == len(IDS) == 4
    for row, image_id in enumerate(IDS):
        expected = draw_arrays(image_id)
        found = {"feat": regions.features[row], "cls": regions.classes[row], "boxes": regions.boxes[row]}
        for array, values in expected.items():
            assert found[array].dtype == torch.float32
            np.testing.assert_array_equal(found[array].numpy(), values.astype(np.float32))
    assert locate_regions(regions.boxes, regions.classes).shape == (4, 100, 1607)


def test_other_names_of_files_are_read_where_the_spec_names_them(root: Path) -> None:
    (root / "feat_cls_1000").rename(root / "mine")
    (root / BOXES).rename(root / "mine" / "boxes.h5")
    layout = {"prefix": f"mine/{Path(PREFIX).name}", "boxes": "mine/boxes.h5"}
    arrays = RegionReader(RegionSpec("precomputed", 100, 2048, 1601, layout=layout), root).read(ref_of(FIRST))
    np.testing.assert_array_equal(arrays.boxes, draw_arrays(FIRST)["boxes"])


def test_other_sizes_are_read_where_the_spec_names_them(tmp_path: Path) -> None:
    for array, shape in {"feat": (7, 5), "cls": (7, 3), "boxes": (7, 6)}.items():
        path = place_of(tmp_path, array)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:  # big-endian float64, packed and resizable
            file.create_dataset(
                FIRST,
                data=np.arange(np.prod(shape)).reshape(shape) / 64,
                dtype=">f8",
                compression="gzip",
                maxshape=(None, 9),
            )
    arrays = RegionReader(RegionSpec("precomputed", 7, 5, 3), tmp_path).read(ref_of(FIRST))
    assert arrays.features.dtype == np.float32 and arrays.features[6, 4] == 34 / 64 and arrays.boxes.shape == (7, 6)


def test_an_entry_of_an_archive_is_found_by_its_own_name(written: Path) -> None:
    reader = RegionReader(SPEC, written)
    inside = reader.read(ImageRef("/pictures/val2014.zip", member=f"val2014/{FIRST}.jpg"))
    np.testing.assert_array_equal(inside.features, reader.read(ref_of(FIRST)).features)


def write_flickr(root: Path) -> tuple[Path, RegionSpec]:
    arrays = draw_arrays("000000000007")
    (root / "trainval").mkdir()
    np.save(root / "trainval" / "1000092795.npy", arrays["feat"].astype(np.float32))
    np.save(root / "trainval" / "1000092795_cls_prob.npy", arrays["cls"])
    with h5py.File(root / LAYOUTS["flickr30k"][1], "w") as file:
        file.create_dataset("1000092795", data=arrays["boxes"])
    return root, RegionSpec("precomputed", 100, 2048, 1601, layout={"dataset": "flickr30k"})


def test_the_older_form_of_flickr30k_is_read_back_too(tmp_path: Path) -> None:
    root, spec = write_flickr(tmp_path)
    found = RegionReader(spec, root).read(ref_of("1000092795"))
    expected = draw_arrays("000000000007")
    np.testing.assert_array_equal(found.features, expected["feat"].astype(np.float32))
    np.testing.assert_array_equal(found.classes, expected["cls"].astype(np.float32))
    np.testing.assert_array_equal(found.boxes, expected["boxes"])
    assert {found.features.dtype, found.classes.dtype, found.boxes.dtype} == {np.dtype(np.float32)}


# What is wrong names the image and the array -------------------------------------------------------------------------

NAMES = {"feat": "features", "cls": "classes", "boxes": "boxes"}
ARRAYS = list(NAMES)


@pytest.mark.parametrize("array", ARRAYS)
def test_a_missing_array_names_the_image(root: Path, array: str) -> None:
    with h5py.File(place_of(root, array), "a") as file:
        del file[FIRST]
    error = fail_reading(root)
    assert error.reason == Reason.MISSING
    assert error.detail == f"{NAMES[array]} of {FIRST}: the file has no such image" and error.remedy


@pytest.mark.parametrize("array", ARRAYS)
def test_a_missing_file_names_the_image_and_no_folder(root: Path, array: str) -> None:
    path = place_of(root, array)
    path.unlink()
    error = fail_reading(root)
    assert error.reason == Reason.MISSING
    assert error.detail == f"{NAMES[array]} of {FIRST}: there is no {path.name}"
    assert str(root) not in str(error) and "feat_cls_1000" not in str(error)


@pytest.mark.parametrize(("array", "shape"), [("feat", (99, 2048)), ("cls", (100, 1600)), ("boxes", (100, 5))])
def test_a_short_array_names_the_image_and_both_shapes(root: Path, array: str, shape: tuple[int, int]) -> None:
    replace_dataset(place_of(root, array), data=np.zeros(shape, np.float16))
    error = fail_reading(root)
    full = {"feat": "100 x 2048", "cls": "100 x 1601", "boxes": "100 x 6"}[array]
    assert error.reason == Reason.CORRUPT
    assert error.detail == f"{NAMES[array]} of {FIRST}: its shape is {shape[0]} x {shape[1]}, not {full}"


def test_an_array_larger_than_any_memory_is_refused_by_its_header(root: Path) -> None:
    replace_dataset(place_of(root, "feat"), shape=(10**9, 10**6), dtype="f4", chunks=(1, 1024))
    assert "its shape is 1000000000 x 1000000, not 100 x 2048" in fail_reading(root).detail


def test_a_chunk_larger_than_its_array_is_refused_before_it_is_unpacked(root: Path) -> None:
    replace_dataset(
        place_of(root, "feat"),
        data=np.zeros((100, 2048), np.float32),
        chunks=(16_384, 2048),
        maxshape=(None, 2048),
        compression="gzip",
    )
    error = fail_reading(root)
    assert error.reason == Reason.TOO_LARGE and FIRST in error.detail


# How a file may be packed, and what it may not hold then -------------------------------------------------------------

PACKINGS: dict[str, dict[str, Any]] = {
    "not at all": {},
    "chunks": {"chunks": (7, 100)},
    "gzip": {"compression": "gzip"},
    "gzip in chunks": {"compression": "gzip", "chunks": (33, 2048), "compression_opts": 0},
    "all": {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (100, 64)},
    "a checksum": {"fletcher32": True},
    "shuffled": {"shuffle": True},
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_arrays_are_read_back(root: Path, packing: str) -> None:
    values = draw_arrays(FIRST)["feat"]
    replace_dataset(place_of(root, "feat"), data=values, **PACKINGS[packing])
    with RegionReaderOpen(root) as reader:
        np.testing.assert_array_equal(reader.read(ref_of(FIRST)).features, values.astype(np.float32))


def pack_checksum_first(path: Path, values: np.ndarray) -> None:
    """The checksum is made of the plain chunk and packed with it; h5py's own way is the other one."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(values.shape)
    settings.set_fletcher32()
    settings.set_deflate(4)
    with h5py.File(path, "a") as file:
        del file[FIRST]
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, FIRST.encode(), kind, space, settings).write(space, space, values)


def test_a_checksum_below_the_packing_is_read_back(root: Path) -> None:
    values = draw_arrays(FIRST)["feat"]
    pack_checksum_first(place_of(root, "feat"), values)
    with RegionReaderOpen(root) as reader:
        np.testing.assert_array_equal(reader.read(ref_of(FIRST)).features, values.astype(np.float32))


CHUNK = 100 * 2048 * 4


def write_chunk(path: Path, stored: bytes, mask: int = 0, **made: Any) -> None:
    """One chunk whose stored bytes are anybody's."""
    replace_dataset(path, shape=(100, 2048), dtype="f4", chunks=(100, 2048), **made)
    with h5py.File(path, "a") as file:
        file[FIRST].id.write_direct_chunk((0, 0), stored, mask)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """Half a gigabyte of nothing in fewer bytes than an honest chunk may take."""
    packer, piece = zlib.compressobj(), b"\0" * 2**20
    stored = b"".join(packer.compress(piece) for _ in range(512)) + packer.flush()
    assert len(stored) < CHUNK
    return stored


READ_AND_MEASURE = """
import resource, sys
from pathlib import Path
from models.vlp.precomputed import RegionReader
from models.vlp.regions import RegionSpec
from readroom.errors import ImageError
from readroom.records import ImageRef
reader = RegionReader(RegionSpec("precomputed", 100, 2048, 1601), Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    reader.read(ImageRef(sys.argv[2]))
except ImageError as error:
    print(error.reason, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_chunk_that_unpacks_to_half_a_gigabyte_is_never_unpacked(root: Path, bomb: bytes) -> None:
    write_chunk(place_of(root, "feat"), bomb, compression="gzip")
    # in a process of its own: the most that it ever took is measured
    command = [sys.executable, "-c", READ_AND_MEASURE, str(root), f"{FIRST}.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    reason, mebibytes = done.stdout.split()
    assert reason == Reason.TOO_LARGE and int(mebibytes) < 64
    assert fail_reading(root).detail == f"features of {FIRST}: a chunk is more than the {CHUNK} bytes it should be"


GZIP = {"compression": "gzip"}
WRONG_CHUNKS: dict[str, tuple[bytes, int, dict[str, Any], Reason, str]] = {
    "a byte too many": (
        zlib.compress(b"\0" * (CHUNK + 1)),
        0,
        {"compression": "gzip"},
        Reason.TOO_LARGE,
        "is more than",
    ),
    "a byte too few": (zlib.compress(b"\0" * (CHUNK - 1)), 0, GZIP, Reason.CORRUPT, "is less than"),
    "stored too long": (b"\0" * (CHUNK * 2), 0, GZIP, Reason.TOO_LARGE, "takes more than"),
    "unpacked": (b"\0" * CHUNK, 1, GZIP, Reason.CORRUPT, "not packed like the others"),
    "shuffled, short": (b"\0" * 100, 0, {"shuffle": True}, Reason.CORRUPT, "is less than"),
}


@pytest.mark.parametrize("case", WRONG_CHUNKS)
def test_a_chunk_that_is_not_as_large_as_it_says_names_the_image(root: Path, case: str) -> None:
    stored, mask, made, reason, words = WRONG_CHUNKS[case]
    write_chunk(place_of(root, "feat"), stored, mask, **made)
    error = fail_reading(root)
    assert error.reason == reason and error.detail.startswith(f"features of {FIRST}: ") and words in error.detail


@pytest.mark.parametrize("compression", ["lzf", "gzip twice", "shuffled last", "scaled"])
def test_an_array_packed_in_another_way_is_refused(root: Path, compression: str) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((100, 2048))
    if compression == "lzf":
        settings.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL)
    elif compression == "scaled":
        settings.set_scaleoffset(h5py.h5z.SO_FLOAT_DSCALE, 3)
    else:
        settings.set_deflate(4)
        settings.set_deflate(4) if compression == "gzip twice" else settings.set_shuffle()
    with h5py.File(place_of(root, "feat"), "a") as file:
        del file[FIRST]
        space = h5py.h5s.create_simple((100, 2048))
        made = h5py.h5d.create(file.id, FIRST.encode(), h5py.h5t.NATIVE_FLOAT, space, settings)
        made.write(space, space, np.ones((100, 2048), np.float32))
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT
    assert error.detail == f"features of {FIRST}: it is packed otherwise than by gzip" and error.remedy


# Numbers that no detector gives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (2, 3e38, "not below 1000000"),
        (1, 1e6, "not below 1000000"),
        (4, -3e38, "not below 1000000"),
        (5, 3e38, "not below 1000000"),
        (0, -10_001, "a corner lies below -10000 pixels"),
        (5, -0.1, "a confidence is not between 0 and 1"),
        (5, 1.01, "a confidence is not between 0 and 1"),
    ],
)
def test_a_box_that_no_detector_gives_names_the_image(root: Path, column: int, value: float, words: str) -> None:
    with h5py.File(place_of(root, "boxes"), "a") as file:
        file[FIRST][50, column] = value
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT and error.detail.startswith(f"boxes of {FIRST}: ") and words in error.detail


@pytest.mark.parametrize("columns", [[0, 2], [1, 3]])
@pytest.mark.parametrize("value", [-1e-5, 0.0])
def test_boxes_that_all_lie_outside_the_picture_name_the_image(root: Path, columns: list[int], value: float) -> None:
    with h5py.File(place_of(root, "boxes"), "a") as file:
        boxes = file[FIRST][()]
        boxes[:, columns] = value
        file[FIRST][...] = boxes
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT and error.detail == f"boxes of {FIRST}: no box reaches into the picture"


def test_boxes_a_little_over_the_edge_and_quite_sure_get_finite_places(root: Path) -> None:
    with h5py.File(place_of(root, "boxes"), "a") as file:
        file[FIRST][0] = [-3.5, -9_999, 640.5, 999_999, 7, 1.0005]
    with RegionReaderOpen(root) as reader:
        arrays = reader.read(ref_of(FIRST))
    assert arrays.boxes[0, 3] == 999_999
    places = locate_regions(torch.tensor(arrays.boxes)[None], torch.tensor(arrays.classes)[None])
    assert places.isfinite().all()


@pytest.mark.parametrize("array", ["feat", "cls"])
def test_a_feature_of_a_million_names_the_image(root: Path, array: str) -> None:
    values = draw_arrays(FIRST)[array].astype(np.float32)
    values[9, 9] = -1e6
    replace_dataset(place_of(root, array), data=values)
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT
    assert error.detail == f"{NAMES[array]} of {FIRST}: a number in it is not below 1000000"


@pytest.mark.parametrize("member", [None, f"val2014/{FIRST}.jpg"])
def test_a_later_frame_of_a_file_is_not_given_the_regions_of_the_first(written: Path, member: str | None) -> None:
    with RegionReaderOpen(written) as reader:
        path = f"/pictures/{FIRST}.dcm" if member is None else "/pictures/val2014.zip"
        assert reader.read(ImageRef(path, frame=0, member=member)).features.shape == (100, 2048)
        with pytest.raises(ImageError) as caught:
            reader.read(ImageRef(path, frame=1, member=member))
    assert caught.value.reason == Reason.MULTI_FRAME and FIRST in caught.value.detail
    assert caught.value.remedy == "Keep one picture a file."


# Numbers that are none, and what is no array -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("array", ARRAYS)
def test_a_number_that_is_none_names_the_image(root: Path, array: str, value: float) -> None:
    with h5py.File(place_of(root, array), "a") as file:
        file[FIRST][99, 3] = value
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT
    assert error.detail == f"{NAMES[array]} of {FIRST}: a number in it is infinite or not a number"


def test_a_number_too_large_for_float32_is_none(root: Path) -> None:
    values = np.zeros((100, 2048))
    values[3, 3] = 1e300
    replace_dataset(place_of(root, "feat"), data=values)
    assert "infinite or not a number" in fail_reading(root).detail


def test_an_array_that_was_never_written_names_the_image(root: Path) -> None:
    replace_dataset(place_of(root, "feat"), shape=(100, 2048), dtype="f2")
    assert fail_reading(root).detail == f"features of {FIRST}: it was never written"


OBJECTS = {
    "texts": h5py.string_dtype(),
    "references": h5py.ref_dtype,
    "lists": h5py.vlen_dtype(np.float32),
    "whole numbers": np.dtype("i4"),
    "complex numbers": np.dtype("c8"),
    "records": np.dtype([("a", "f4")]),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_an_array_of_anything_but_floats_is_refused(root: Path, kind: str) -> None:
    replace_dataset(place_of(root, "feat"), shape=(100, 2048), dtype=OBJECTS[kind])
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT and error.detail == f"features of {FIRST}: no floating point numbers"


def write_secret(root: Path) -> Path:
    """Another file of this machine, with an array that would fit."""
    path = root.parent / "secret.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("inside", data=np.ones((100, 2048), np.float32))
    return path


def link_outside(file: Any, secret: Path) -> None:
    file[FIRST] = h5py.ExternalLink(str(secret), "/inside")


def link_inside(file: Any, secret: Path) -> None:
    file.create_dataset("inside", data=np.ones((100, 2048), np.float32))
    file[FIRST] = h5py.SoftLink("/inside")


def compose_outside(file: Any, secret: Path) -> None:
    layout = h5py.VirtualLayout((100, 2048), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "inside", (100, 2048))
    file.create_virtual_dataset(FIRST, layout)


def store_outside(file: Any, secret: Path) -> None:
    file.create_dataset(FIRST, (100, 2048), np.float32, external=[(str(secret), 0, 100 * 2048 * 4)])


def nest_group(file: Any, secret: Path) -> None:
    file.create_group(FIRST)


@pytest.mark.parametrize("spoil", [link_outside, link_inside, compose_outside, store_outside, nest_group])
def test_an_array_that_the_file_does_not_hold_itself_is_not_read(root: Path, spoil: Any) -> None:
    with h5py.File(place_of(root, "feat"), "a") as file:
        del file[FIRST]
        spoil(file, write_secret(root))
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT and error.detail == f"features of {FIRST}: no array of the file itself"


def test_an_array_without_a_shape_is_refused(root: Path) -> None:
    replace_dataset(place_of(root, "feat"), data=h5py.Empty("f4"))
    assert "its shape is no array, not 100 x 2048" in fail_reading(root).detail


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty_out(path: Path) -> None:
    os.truncate(path, 0)


def overwrite_head(path: Path) -> None:
    path.write_bytes(b"\0" * 4096 + path.read_bytes()[4096:])


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut_short, empty_out, overwrite_head])
@pytest.mark.parametrize("array", ARRAYS)
def test_a_damaged_file_names_the_image(root: Path, array: str, damage: Any) -> None:
    damage(place_of(root, array))
    error = fail_reading(root)
    assert error.reason == Reason.CORRUPT
    assert error.detail == f"{NAMES[array]} of {FIRST}: it cannot be read" and str(root) not in str(error)


@pytest.mark.parametrize("damage", [replace_with_folder, replace_with_pipe])
@pytest.mark.parametrize("array", ARRAYS)
def test_what_is_no_file_is_missing_and_waited_for_by_nobody(root: Path, array: str, damage: Any) -> None:
    path = place_of(root, array)
    damage(path)
    error = fail_reading(root)
    assert error.reason == Reason.MISSING and error.detail == f"{NAMES[array]} of {FIRST}: there is no {path.name}"


def test_a_damaged_chunk_names_the_image(root: Path) -> None:
    path = place_of(root, "feat")
    replace_dataset(path, data=np.ones((100, 2048), np.float32), compression="gzip", chunks=(100, 2048))
    with h5py.File(path) as file:
        where = file[FIRST].id.get_chunk_info(0)
    with path.open("r+b") as stream:
        stream.seek(where.byte_offset)
        stream.write(b"\xff" * where.size)
    assert fail_reading(root).detail == f"features of {FIRST}: it cannot be read"


def test_an_image_after_a_broken_one_is_read(root: Path) -> None:
    cut_short(place_of(root, "feat"))
    with RegionReaderOpen(root) as reader:
        with pytest.raises(ImageError):
            reader.read(ref_of(FIRST))
        np.testing.assert_array_equal(reader.read(ref_of(IDS[1])).boxes, draw_arrays(IDS[1])["boxes"])


def test_a_file_put_back_in_its_place_is_read(root: Path) -> None:
    path = place_of(root, "feat")
    path.rename(path.with_suffix(".away"))
    with RegionReaderOpen(root) as reader:
        with pytest.raises(ImageError):
            reader.read(ref_of(FIRST))
        path.with_suffix(".away").rename(path)
        assert reader.read(ref_of(FIRST)).features.shape == (100, 2048)


@pytest.mark.parametrize(
    "path", ["/pictures/..jpg", "/pictures/...", "", "/", "/pictures/a\\b.jpg", "/p/a\nb.jpg", f"/p/{'a' * 300}.jpg"]
)
def test_a_name_that_is_no_image_id_never_reaches_the_files(written: Path, path: str) -> None:
    with pytest.raises(ImageError) as caught:
        RegionReader(SPEC, written).read(ImageRef(path))
    assert caught.value.reason == Reason.UNSAFE_PATH and caught.value.detail == "its file's name cannot be an image id"


def test_a_folder_in_a_name_never_reaches_the_files(root: Path) -> None:
    with h5py.File(place_of(root, "feat"), "a") as file:
        file.create_dataset(f"group/{IDS[2]}", data=np.ones((100, 2048), np.float32))
    arrays = RegionReader(SPEC, root).read(ImageRef(f"../../group/{IDS[2]}.jpg"))
    np.testing.assert_array_equal(arrays.features, draw_arrays(IDS[2])["feat"].astype(np.float32))


# The older form ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".npy", "_cls_prob.npy"])
def test_a_wrong_npy_file_names_the_image(tmp_path: Path, ending: str) -> None:
    root, spec = write_flickr(tmp_path)
    path = root / "trainval" / f"1000092795{ending}"
    array = {".npy": "features", "_cls_prob.npy": "classes"}[ending]
    sound = path.read_bytes()
    cases = {
        "its shape is 100 x 7, not 100 x": lambda: np.save(path, np.zeros((100, 7), np.float32)),
        "no floating point numbers": lambda: np.save(path, np.full(np.load(path).shape, 7, np.int64)),
        "a number in it is infinite": lambda: np.save(path, np.full(np.load(path).shape, np.nan)),
        "it cannot be read": lambda: path.write_bytes(sound[:-100]),
        "there is no 1000092795": path.unlink,
        "its file is larger than": lambda: path.write_bytes(sound + b"\0" * 2_000_000),
    }
    for words, spoil in cases.items():
        spoil()
        error = fail_reading(root, spec, "1000092795")
        assert error.detail.startswith(f"{array} of 1000092795: {words}")
        path.write_bytes(sound)
    assert len(cases) == 6


def test_an_npy_file_with_objects_is_never_unpickled(tmp_path: Path) -> None:
    root, spec = write_flickr(tmp_path)
    touched = tmp_path / "touched"

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (touched,)

    path = root / "trainval" / "1000092795.npy"
    holder = np.empty((100, 2048), dtype=object)
    holder[0, 0] = Touch()
    np.save(path, holder, allow_pickle=True)
    assert fail_reading(root, spec, "1000092795").detail == "features of 1000092795: no floating point numbers"
    assert not touched.exists()
    np.load(path, allow_pickle=True)  # the file would have done it
    assert touched.exists()


# Files and threads ---------------------------------------------------------------------------------------------------


class RegionReaderOpen:
    """A reader that closes its files at the end of a block."""

    def __init__(self, root: Path, max_open: int = 32) -> None:
        self.reader = RegionReader(SPEC, root, max_open)

    def __enter__(self) -> RegionReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def count_open(root: Path) -> int:
    """Files of a folder that this process has open, as the kernel says."""
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(entry.readlink()))
        except FileNotFoundError:
            continue
    return sum(target.startswith(str(root)) for target in targets)


def test_files_stay_open_up_to_the_bound_and_the_oldest_are_closed(root: Path) -> None:
    with RegionReaderOpen(root, max_open=3) as reader:
        for image_id in IDS:
            reader.read(ref_of(image_id))
            assert count_open(root) == len(reader.files.opened) == 3
        assert root / BOXES in reader.files.opened  # used by every image, so never the oldest
        assert [path.name[-6:] for path in reader.files.opened] == ["007.h5", "007.h5", "est.h5"]
    assert count_open(root) == 0


def test_a_file_is_opened_once_for_all_images_of_its_shard(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def count_and_open(path: Path, wanted: Any) -> Any:
        opened.append(path.name)
        return h5py.File(path, "r")

    monkeypatch.setattr(precomputed, "open_hdf5", count_and_open)
    with RegionReaderOpen(written) as reader:
        for image_id in [IDS[0], IDS[2]] * 3:  # both end in 895
            reader.read(ref_of(image_id))
    assert len(opened) == len(set(opened)) == 3


@pytest.mark.parametrize("max_open", [1, 2, 32])
def test_many_threads_read_what_one_reads(written: Path, max_open: int) -> None:
    expected = {image_id: draw_arrays(image_id) for image_id in IDS}
    with RegionReaderOpen(written, max_open) as reader, ThreadPoolExecutor(8) as threads:
        asked = IDS * 12
        found = list(threads.map(lambda image_id: reader.read(ref_of(image_id)), asked))
        assert len(reader.files.opened) <= max_open
    assert len(found) == 48
    for image_id, arrays in zip(asked, found, strict=True):
        np.testing.assert_array_equal(arrays.features, expected[image_id]["feat"].astype(np.float32))
        np.testing.assert_array_equal(arrays.classes, expected[image_id]["cls"].astype(np.float32))
        np.testing.assert_array_equal(arrays.boxes, expected[image_id]["boxes"])


def test_many_threads_leave_no_file_open_beside_the_kept_ones(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    open_hdf5 = precomputed.open_hdf5

    def remember_opened(path: Path, wanted: Any) -> Any:
        opened.append(open_hdf5(path, wanted))
        return opened[-1]

    monkeypatch.setattr(precomputed, "open_hdf5", remember_opened)
    with RegionReaderOpen(written, max_open=2) as reader, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda image_id: reader.read(ref_of(image_id)), [FIRST, IDS[1]] * 30))
        assert sum(map(bool, opened)) == len(reader.files.opened) == 2
    assert len(opened) >= 5 and not any(opened)


def test_a_picture_in_the_place_of_arrays_is_a_wrong_call(written: Path) -> None:
    provider = open_provider(written, SPEC, CPU, torch.float32, written)
    assert isinstance(provider, PrecomputedProvider)
    with pytest.raises(BadCall, match="cannot see pictures"):
        provider.prepare([np.zeros((8, 8, 3), np.uint8)])


def test_a_file_that_another_process_holds_locked_is_read(written: Path) -> None:
    """HDF5 would refuse a file that is locked for writing; a feature set on a network share often looks so."""
    import fcntl

    with place_of(written, "feat").open("r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with RegionReaderOpen(written) as reader:
            assert reader.read(ref_of(FIRST)).features.shape == (100, 2048)
