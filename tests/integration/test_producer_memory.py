"""A producer's memory does not grow with the export: real processes, their peak resident set size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import exports
from tests.unit.test_coco import picture, write_json

FEW, MANY = 1_000, 20_000


def measure_peak(kind: str, folder: Path, home: Path) -> tuple[int, int]:
    """Items queued and peak kB of a process that enqueues `folder`."""
    home.mkdir()
    out = subprocess.run(
        [sys.executable, "-m", "tests.integration.enqueue_child", kind, str(folder), str(home)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    ).stdout
    counts = json.loads(out.splitlines()[-1])
    return counts["queued"], counts["peak_kb"]


def write_scenes(folder: Path, count: int) -> None:
    """A COCO folder of tiny pictures that all differ (bytes behind the end of a JPEG are ignored)."""
    data = picture(9)
    for number in range(count):
        path = folder / "val2017" / f"{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + number.to_bytes(4, "big"))
    entries = [{"id": n, "file_name": f"{n:012d}.jpg", "coco_url": "http://x/" + "y" * 60} for n in range(count)]
    captions = [{"id": n, "image_id": n // 5, "caption": f"a caption of {n}"} for n in range(5 * count)]
    write_json(folder / "annotations" / "captions_val2017.json", {"images": entries, "annotations": captions})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "write"), [("pacs", exports.write_many), ("coco", write_scenes)])
def test_memory_stays_flat_from_1000_to_20000_files(kind: str, write, tmp_path: Path, record_property) -> None:
    peaks = {}
    for count in (FEW, MANY):
        write(tmp_path / str(count), count)
        queued, peaks[count] = measure_peak(kind, tmp_path / str(count), tmp_path / f"home{count}")
        assert queued == count
    record_property("peaks_kb", peaks)
    print(f"{kind}: peak RSS {peaks[FEW] / 1024:.1f} MiB at {FEW}, {peaks[MANY] / 1024:.1f} MiB at {MANY} files")
    assert peaks[MANY] <= peaks[FEW] * 1.10
