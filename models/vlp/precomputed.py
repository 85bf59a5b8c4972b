"""Regions that a detector computed long before, as the original VLP keeps them: one array an image in HDF5 files.

    <prefix>_feat<NNN>.h5   image id -> features [100, 2048]                NNN: the id's last three characters
    <prefix>_cls<NNN>.h5    image id -> class probabilities [100, 1601]
    one file of boxes       image id -> x1, y1, x2, y2, class index, confidence [100, 6]

Flickr30k's features and classes are `<id>.npy` and `<id>_cls_prob.npy` instead. An image id is the name of the image's
file without folder and extension, so ids must be unique below one region folder: two files called IMG0001, in whatever
folders, are given the same regions. A file is one picture; its frames would share its id, and are refused.

Such a file is foreign input: it may lie about sizes, or be a door to other files.
"""

from __future__ import annotations

import io
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from models.device import translate_device_errors
from models.foreign import translate_errors
from models.vlp.regions import Regions, RegionSpec
from readroom.errors import BadCall, CheckpointMissing, ImageError
from readroom.records import ImageRef, Reason

Floats32 = NDArray[np.float32]

# Where the original's data sets keep their features (github.com/LuoweiZhou/VLP, its options and README): what the
# shards' names begin with (for Flickr30k the folder of the .npy files), and the file of boxes.
LAYOUTS = {
    "coco": (
        "feat_cls_1000/coco_detection_vg_100dets_gvd_checkpoint_trainval",
        "coco_detection_vg_thresh0.2_feat_gvd_checkpoint_trainvaltest.h5",
    ),
    "cc": (
        "feat_cls_1000_float16/cc_detection_vg_100dets_gvd_checkpoint_trainval",
        "bbox/cc_detection_vg_thresh0.2_feat_gvd_checkpoint_trainval.h5",
    ),
    "flickr30k": ("trainval", "flickr30k_detection_vg_thresh0.2_feat_gvd_checkpoint_trainvaltest.h5"),
}
# Of 2001 files. Each holds a descriptor and some megabytes of HDF5's own caches.
MAX_OPEN_FILES = 32
# An array of 100 x 2048 float64 is 1.6 MB; a chunk is unpacked whole, and may be far larger than its array.
MAX_CHUNK_BYTES = 64 * 2**20
NPY_HEADER_BYTES = 64 * 1024
# Fletcher32's, behind what it is computed of. Deflate makes noise a little longer than it was.
CHECKSUM_BYTES = 4
DEFLATE_SLACK = 64
# Pixels, on both sides of what a detector gives: boxes reach a little over a picture's edge. A float32 still has the
# hundredths of a pixel of the largest, and no product of two such numbers is infinite.
LEAST_PLACE, LARGEST = -1e4, 1e6
SURE = 1 + 1e-3  # a confidence that went through float16
EXTRACT_REMEDY = "Extract the regions of this image again, or leave it out."


@dataclass(frozen=True, slots=True)
class RegionArrays:
    """One image's regions on the host: features (R, F), classes (R, C), boxes (R, 6), float32 and finite."""

    features: Floats32
    classes: Floats32
    boxes: Floats32


class PrecomputedProvider:
    """Hands on what a detector computed long before; no picture is looked at."""

    def __init__(self, spec: RegionSpec, device: torch.device, reader: RegionReader) -> None:
        self.spec = spec
        self.device = device
        self.reader = reader

    def prepare(self, images: Sequence[Any]) -> Regions:
        """Stack what the reader gave, on the host. Raises BadCall for a picture."""
        if not all(isinstance(image, RegionArrays) for image in images):
            raise BadCall("this checkpoint reads precomputed regions by an image's file name; it cannot see pictures")
        return Regions(
            features=torch.from_numpy(np.stack([image.features for image in images])),
            classes=torch.from_numpy(np.stack([image.classes for image in images])),
            boxes=torch.from_numpy(np.stack([image.boxes for image in images])),
        )

    def compute(self, batch: Regions) -> Regions:
        """The same regions on the device. Raises OutOfMemory, DeviceBroken."""
        with translate_device_errors():
            return Regions(*(part.to(self.device) for part in (batch.features, batch.classes, batch.boxes)))

    def module(self) -> None:
        """Nothing here can be trained."""


class RegionReader:
    """Reads the regions of one image after the other; any number of threads may ask."""

    def __init__(self, spec: RegionSpec, root: Path, max_open: int = MAX_OPEN_FILES) -> None:
        prefix, boxes = LAYOUTS[spec.layout.get("dataset", "coco")]
        self.spec = spec
        self.prefix = root / spec.layout.get("prefix", prefix)
        self.box_file = root / spec.layout.get("boxes", boxes)
        self.has_shards = spec.layout.get("dataset") != "flickr30k"
        self.files = OpenFiles(max_open)

    def read(self, ref: ImageRef) -> RegionArrays:
        """The regions of an image. Raises ImageError naming the image, and the array if it is its fault."""
        image_id = read_image_id(ref)
        return RegionArrays(
            features=self._read_part(image_id, "features", self.spec.feature_dim),
            classes=self._read_part(image_id, "classes", self.spec.class_count),
            boxes=self._read_dataset(self.box_file, Wanted(image_id, "boxes", (self.spec.count, 6))),
        )

    def close(self) -> None:
        """Close every file; a later `read` opens them again."""
        self.files.close()

    def _read_part(self, image_id: str, array: str, width: int) -> Floats32:
        wanted = Wanted(image_id, array, (self.spec.count, width))
        if self.has_shards:
            middle = {"features": "_feat", "classes": "_cls"}[array]
            return self._read_dataset(self.prefix.with_name(f"{self.prefix.name}{middle}{image_id[-3:]}.h5"), wanted)
        ending = {"features": ".npy", "classes": "_cls_prob.npy"}[array]
        return read_npy(self.prefix / f"{image_id}{ending}", wanted)

    def _read_dataset(self, path: Path, wanted: Wanted) -> Floats32:
        with self.files.borrow(path, wanted) as file:
            return wanted.convert(take_dataset(file, wanted))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which array of which image is read, and the shape it must have."""

    image_id: str
    array: str
    shape: tuple[int, int]

    def fail(self, reason: Reason, what: str, remedy: str = EXTRACT_REMEDY) -> ImageError:
        """The error that names both."""
        return ImageError(reason, f"{self.array} of {self.image_id}: {what}", remedy)

    def check_kind(self, shape: tuple[int, ...] | None, dtype: Any) -> None:
        """Raise ImageError unless an array, not read yet, has this shape and holds floating point numbers."""
        if shape != self.shape:
            found = " x ".join(map(str, shape)) if shape else "no array"
            expected = " x ".join(map(str, self.shape))
            raise self.fail(Reason.CORRUPT, f"its shape is {found}, not {expected}")
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise self.fail(Reason.CORRUPT, "no floating point numbers")

    def convert(self, values: NDArray[Any]) -> Floats32:
        """The values as float32. Raises ImageError when one is infinite, not a number, or nothing a detector says."""
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(values, dtype=np.float32)
        if not np.isfinite(numbers).all():
            raise self.fail(Reason.CORRUPT, "a number in it is infinite or not a number")
        if np.abs(numbers).max() >= LARGEST:
            raise self.fail(Reason.CORRUPT, f"a number in it is not below {LARGEST:.0f}")
        if self.array == "boxes":
            self._check_boxes(numbers)
        return numbers

    def _check_boxes(self, boxes: Floats32) -> None:
        """Raise ImageError for boxes (R, 6) that lie in no picture: a picture's size is taken from their maxima."""
        corners, confidence = boxes[:, :4], boxes[:, 5]
        if corners.min() < LEAST_PLACE:
            raise self.fail(Reason.CORRUPT, f"a corner lies below {LEAST_PLACE:.0f} pixels")
        if corners[:, ::2].max() <= 0 or corners[:, 1::2].max() <= 0:
            raise self.fail(Reason.CORRUPT, "no box reaches into the picture")
        if confidence.min() < 0 or confidence.max() > SURE:
            raise self.fail(Reason.CORRUPT, "a confidence is not between 0 and 1")


class OpenFiles:
    """HDF5 files kept open, the least recently used one closed for the next.

    One lock is held for the whole of a read: no file is closed under a reader, and nothing is lost, because h5py lets
    one thread at a time into the HDF5 library anyway.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.lock = threading.Lock()
        self.opened: OrderedDict[Path, Any] = OrderedDict()

    @contextmanager
    def borrow(self, path: Path, wanted: Wanted) -> Iterator[Any]:
        """An open file. Raises ImageError; errors of HDF5 inside the block become one too."""
        with self.lock, translate_errors(Reason.CORRUPT, wanted.fail(Reason.CORRUPT, "it cannot be read").detail):
            file = self.opened.pop(path, None) or open_hdf5(path, wanted)
            try:
                yield file
            except Exception:
                file.close()  # it may have been replaced since it was opened; the next read looks again
                raise
            self.opened[path] = file
            while len(self.opened) > self.max_open:
                self.opened.popitem(last=False)[1].close()

    def close(self) -> None:
        """Close all."""
        with self.lock:
            while self.opened:
                self.opened.popitem()[1].close()


# Steps ---------------------------------------------------------------------------------------------------------------


def open_precomputed(spec: RegionSpec, device: torch.device, region_dir: Path | None) -> PrecomputedProvider:
    """The provider of features below `region_dir`. Raises CheckpointMissing."""
    if region_dir is None or not region_dir.is_dir():
        raise CheckpointMissing(
            "this checkpoint reads precomputed regions, and no folder of them is there",
            "READROOM_REGION_DIR must name the folder region_feat_gvd_wo_bgd.",
        )
    reader = RegionReader(spec, region_dir)
    if not reader.box_file.is_file():
        raise CheckpointMissing(
            f"the folder of precomputed regions holds no {reader.box_file.name}",
            "READROOM_REGION_DIR must name the folder region_feat_gvd_wo_bgd of the checkpoint's data set.",
        )
    return PrecomputedProvider(spec, device, reader)


def read_image_id(ref: ImageRef) -> str:
    """The image's file name without folder and extension. Raises ImageError unless it is a plain name of one picture.

    HDF5 and the file system both read meaning into slashes and dots, and a name out of an archive may hold anything.
    """
    image_id = PurePosixPath(ref.member or ref.path).stem
    if not image_id.strip(".") or len(image_id) > 200 or not image_id.isprintable() or set(image_id) & set("/\\"):
        raise ImageError(Reason.UNSAFE_PATH, "its file's name cannot be an image id", "Rename the file.")
    if ref.frame:
        what = f"regions of {image_id}: they belong to a file, and frame {ref.frame} of it has none of its own"
        raise ImageError(Reason.MULTI_FRAME, what, "Keep one picture a file.")
    return image_id


def open_hdf5(path: Path, wanted: Wanted) -> Any:
    """Open a regular file for reading, without a lock: nobody writes it, and network file systems may refuse locks."""
    if not path.is_file():
        raise wanted.fail(Reason.MISSING, f"there is no {path.name}", "See that the region folder is complete.")
    return h5py.File(path, "r", locking=False)


def take_dataset(file: Any, wanted: Wanted) -> NDArray[Any]:
    """The array that a file holds itself under the image's id, checked before a byte of it is read."""
    link = file.get(wanted.image_id, getlink=True)
    if link is None:
        raise wanted.fail(Reason.MISSING, "the file has no such image")
    # A soft or external link, virtual or external storage would read another place, or another file of this machine.
    dataset = file[wanted.image_id] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise wanted.fail(Reason.CORRUPT, "no array of the file itself")
    wanted.check_kind(dataset.shape, dataset.dtype)
    if not dataset.id.get_storage_size():
        raise wanted.fail(Reason.CORRUPT, "it was never written")
    if dataset.chunks:
        check_chunks(dataset, wanted)
    return dataset[()]  # type: ignore[no-any-return]


def check_chunks(dataset: Any, wanted: Wanted) -> None:
    """Raise ImageError unless each chunk is, unpacked, as large as the file says.

    HDF5 unpacks whatever a chunk's stream holds: a megabyte of it may be a gigabyte, and too few bytes it reads past.
    """
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if size > MAX_CHUNK_BYTES:
        raise wanted.fail(Reason.TOO_LARGE, f"chunks larger than {MAX_CHUNK_BYTES} bytes")
    filters = read_filters(dataset, wanted)
    needed = math.prod(-(-length // side) for length, side in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() > needed:
        raise wanted.fail(Reason.CORRUPT, "it has more chunks than its shape")
    chunks: list[Any] = []
    dataset.id.chunk_iter(chunks.append)
    most = size + size // 100 + DEFLATE_SLACK if h5py.h5z.FILTER_DEFLATE in filters else size + CHECKSUM_BYTES
    for chunk in chunks:
        if chunk.filter_mask:
            raise wanted.fail(Reason.CORRUPT, "a chunk was not packed like the others")
        if chunk.size > most:
            raise wanted.fail(Reason.TOO_LARGE, f"a chunk of {size} bytes takes more than {most}")
        check_chunk(dataset, chunk, size, filters, wanted)


def read_filters(dataset: Any, wanted: Wanted) -> list[int]:
    """What a chunk goes through when it is written. Raises ImageError unless it is shuffle, gzip and a checksum.

    Each at most once, and nothing but the checksum behind gzip: so that what is stored begins with gzip's own stream.
    """
    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(index)[0] for index in range(settings.get_nfilters())]
    deflate, checksum = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32
    known = set(filters) <= {deflate, checksum, h5py.h5z.FILTER_SHUFFLE} and len(set(filters)) == len(filters)
    if not known or (deflate in filters and filters[filters.index(deflate) + 1 :] not in ([], [checksum])):
        raise wanted.fail(Reason.CORRUPT, "it is packed otherwise than by gzip", "Pack it by gzip, or not at all.")
    return filters


def check_chunk(dataset: Any, chunk: Any, size: int, filters: list[int], wanted: Wanted) -> None:
    """Raise ImageError unless a chunk is unpacked to `size` bytes; never unpacks more than one byte beyond."""
    found, expected = chunk.size, size
    if h5py.h5z.FILTER_FLETCHER32 in filters:
        expected += CHECKSUM_BYTES
    if h5py.h5z.FILTER_DEFLATE in filters:
        if filters[-1] == h5py.h5z.FILTER_FLETCHER32:
            expected = size  # the checksum is of what gzip made, behind its stream
        _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
        found = len(zlib.decompressobj().decompress(stored, expected + 1))
    if found > expected:
        raise wanted.fail(Reason.TOO_LARGE, f"a chunk is more than the {expected} bytes it should be")
    if found < expected:
        raise wanted.fail(Reason.CORRUPT, f"a chunk is less than the {expected} bytes it should be")


def read_npy(path: Path, wanted: Wanted) -> Floats32:
    """The array of a `.npy` file, which holds no objects. Raises ImageError."""
    with translate_errors(Reason.CORRUPT, wanted.fail(Reason.CORRUPT, "it cannot be read").detail):
        if not path.is_file():
            raise wanted.fail(Reason.MISSING, f"there is no {path.name}")
        most = NPY_HEADER_BYTES + math.prod(wanted.shape) * 8
        if path.stat().st_size > most:
            raise wanted.fail(Reason.TOO_LARGE, f"its file is larger than {most} bytes")
        stream = io.BytesIO(path.read_bytes())
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        wanted.check_kind(shape, dtype)
        stream.seek(0)
        return wanted.convert(np.load(stream, allow_pickle=False))
