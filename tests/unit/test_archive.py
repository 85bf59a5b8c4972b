"""Archives as exports: every kind is read like a folder, and nothing in one can do harm."""

from __future__ import annotations

import os
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from producer.archive import is_archive
from producer.pacs import scan_export
from readroom.records import FoundImage, SkippedItem
from readroom.settings import Settings, load_settings
from tests import exports

WRITERS = {
    "a.zip": exports.zip_bytes,
    "stored.zip": lambda files: exports.zip_bytes(files, zipfile.ZIP_STORED),
    "a.tar": exports.tar_bytes,
    "a.tar.gz": lambda files: exports.tar_bytes(files, "w:gz"),
    "a.tgz": lambda files: exports.tar_bytes(files, "w:gz"),
    "a.tar.bz2": lambda files: exports.tar_bytes(files, "w:bz2"),
    "a.tar.xz": lambda files: exports.tar_bytes(files, "w:xz"),
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(home=tmp_path / "home")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return exports.good_files() | {item: data for item, (data, _) in exports.bad_files().items()}


def write_archive(folder: Path, name: str, data: bytes) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(data)
    return folder / name


def dispose(path: Path, settings: Settings) -> dict[str, str | None]:
    return {
        found.item: None if isinstance(found, FoundImage) else str(found.reason)
        for found in scan_export(path, settings)
    }


def list_spool(settings: Settings) -> list[Path]:
    return sorted(path for path in (settings.home_dir / "spool").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_members_get_the_same_reasons_as_files_in_a_folder(
    name: str, files: dict[str, bytes], tmp_path: Path, settings: Settings
) -> None:
    path = write_archive(tmp_path / "in", name, WRITERS[name](files))
    expected = dict.fromkeys(exports.good_files()) | {i: reason for i, (_, reason) in exports.bad_files().items()}
    assert dispose(path, settings) == {f"{name}/{item}": reason for item, reason in expected.items()}


def test_accepted_members_are_kept_under_our_own_names_and_nothing_else_is(
    files: dict[str, bytes], tmp_path: Path, settings: Settings
) -> None:
    path = write_archive(tmp_path / "in", "a.zip", exports.zip_bytes(files))
    found = [one for one in scan_export(path, settings) if isinstance(one, FoundImage)]
    assert sorted(Path(one.ref.path) for one in found) == list_spool(settings)
    for one in found:
        kept = Path(one.ref.path)
        assert kept.name == one.ref.digest and kept.parent.name == one.ref.digest[:2]
        assert kept.read_bytes() == files[one.item.removeprefix("a.zip/")]
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.home_dir / "spool").stat().st_mode) == 0o700


def test_a_second_scan_of_an_archive_gives_the_same_files(
    files: dict[str, bytes], tmp_path: Path, settings: Settings
) -> None:
    path = write_archive(tmp_path / "in", "a.tar", exports.tar_bytes(files))
    first = list(scan_export(path, settings))
    before = {kept: kept.read_bytes() for kept in list_spool(settings)}
    assert list(scan_export(path, settings)) == first
    assert {kept: kept.read_bytes() for kept in list_spool(settings)} == before


def test_a_dry_run_extracts_nothing_and_says_the_same(
    files: dict[str, bytes], tmp_path: Path, settings: Settings
) -> None:
    path = write_archive(tmp_path / "in", "a.zip", exports.zip_bytes({**files, "again": files["A/IM000001"]}))
    wet = [(one.item, getattr(one, "reason", None)) for one in scan_export(path, settings)]
    dry_settings = load_settings(home=tmp_path / "dry")
    dry = [(one.item, getattr(one, "reason", None)) for one in scan_export(path, dry_settings, keep=False)]
    assert dry == wet and ("a.zip/again", "duplicate") in dry
    assert not (tmp_path / "dry").exists()


def test_archives_inside_a_folder_are_read_and_those_inside_archives_are_not(
    tmp_path: Path, settings: Settings
) -> None:
    inner = exports.zip_bytes({"IM1": exports.encode(exports.make_radiograph("inner"))})
    outer = {
        "patient1.zip": inner,
        "deep.tar.gz": exports.tar_bytes({"x": b"y"}, "w:gz"),
        "plain.tar": exports.tar_bytes({"x": b"y"}),
    }
    exports.write_files(tmp_path / "in", {"p1/patient.zip": inner, "p2/outer.zip": exports.zip_bytes(outer)})
    found = {one.item: one for one in scan_export(tmp_path / "in", settings)}
    assert isinstance(found.pop("p1/patient.zip/IM1"), FoundImage)
    assert set(found) == {f"p2/outer.zip/{name}" for name in outer}
    for one in found.values():
        assert isinstance(one, SkippedItem)
        assert one.reason == "not_dicom" and "nested archive" in one.detail


@pytest.mark.parametrize(
    "name",
    ["../evil.dcm", "a/../../evil.dcm", "/etc/evil.dcm", "C:\\evil.dcm", "..\\evil.dcm", "\\\\host\\evil.dcm"],
)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_names_that_climb_out_are_refused(name: str, kind: str, tmp_path: Path, settings: Settings) -> None:
    data = exports.encode(exports.make_radiograph("evil"))
    path = write_archive(tmp_path / "in", kind, WRITERS[kind]({name: data, "good": exports.good_files()["A/dx.dcm"]}))
    found = dispose(path, settings)
    assert found == {f"{kind}/{name}": "unsafe_path", f"{kind}/good": None}
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path, settings: Settings) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    path = write_archive(tmp_path / "in", "a.tar", exports.tar_bytes({"x": b""}, change=change))
    assert dispose(path, settings) == {"a.tar/x": "unsafe_path"}


def test_a_link_in_a_zip_is_refused(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    assert dispose(path, settings) == {"a.zip/link": "unsafe_path"}


def test_encrypted_entries_are_named(tmp_path: Path, settings: Settings) -> None:
    data = exports.encrypt_flags(exports.zip_bytes({"a": b"x" * 50, "b": b"y" * 50}))
    assert dispose(write_archive(tmp_path, "a.zip", data), settings) == {
        "a.zip/a": "encrypted",
        "a.zip/b": "encrypted",
    }


def test_a_zip_bomb_is_stopped_by_its_ratio(tmp_path: Path, settings: Settings) -> None:
    bomb = exports.make_radiograph("bomb", Rows=4096, Columns=4096)
    bomb[0x7FE00010].value = bytes(2 * 4096 * 4096)
    good = exports.good_files()["A/dx.dcm"]
    files = {"bomb": exports.encode(bomb), "good": good}
    expected = {"a.zip/bomb": "too_large", "a.zip/good": None}
    assert dispose(write_archive(tmp_path, "a.zip", exports.zip_bytes(files)), settings) == expected
    assert len(list_spool(settings)) == 1
    found = dispose(write_archive(tmp_path, "a.tar.gz", exports.tar_bytes(files, "w:gz")), settings)
    assert found["a.tar.gz/bomb"] == "too_large" and None not in found.values()


def test_limits_on_entries_and_expanded_bytes_end_an_archive_with_a_reason(tmp_path: Path) -> None:
    files = {f"f{number}": os.urandom(600_000) for number in range(6)}
    for name in ("a.zip", "a.tar"):
        path = write_archive(tmp_path, name, WRITERS[name](files))
        few = dispose(path, load_settings(home=tmp_path, max_archive_entries=4))
        assert few == {**{f"{name}/f{number}": "not_dicom" for number in range(4)}, name: "too_large"}
        images = {
            f"f{n}": exports.encode(
                exports.make_radiograph(str(n), Rows=600, Columns=500, PixelData=os.urandom(600_000))
            )
            for n in range(4)
        }
        path = write_archive(tmp_path, name, WRITERS[name](images))
        found = dispose(path, load_settings(home=tmp_path, max_archive_mb=1))
        assert list(found.values()) == [None, "too_large", "too_large", "too_large"]


def test_an_entry_that_lies_about_its_size_is_held_to_the_file_limit(tmp_path: Path) -> None:
    big = exports.make_radiograph("big", Rows=1024, Columns=1024, PixelData=os.urandom(2 * 1024 * 1024))
    data = bytearray(exports.zip_bytes({"big": exports.encode(big)}))
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path = write_archive(tmp_path, "a.zip", bytes(data))
    assert dispose(path, load_settings(home=tmp_path / "home", max_file_mb=1)) == {"a.zip/big": "too_large"}


@pytest.mark.parametrize("name", WRITERS)
def test_an_archive_cut_anywhere_yields_what_is_whole_and_a_reason(
    name: str, tmp_path: Path, settings: Settings
) -> None:
    files = {f"IM{n}": exports.encode(exports.make_radiograph(f"cut{n}")) for n in range(4)}
    whole = WRITERS[name](files)
    for cut in range(97, len(whole) - 1100, 97):
        path = write_archive(tmp_path / "in", name, whole[:cut])
        found = dispose(path, settings)
        assert set(found.values()) <= {None, "truncated", "corrupt"}
        if name.endswith(".zip") or "tar." in name or "tgz" in name:
            assert set(found.values()) - {None}, cut


def test_a_file_that_is_no_archive_despite_its_name_is_one_item_and_the_rest_goes_on(
    tmp_path: Path, settings: Settings
) -> None:
    radiograph = exports.good_files()["A/dx.dcm"]
    broken = {f"{name}": b"this is no archive" * 40 for name in WRITERS}
    exports.write_files(tmp_path / "in", {**broken, "empty.zip": b"", "empty.tar": b"", "z.dcm": radiograph})
    found = dispose(tmp_path / "in", settings)
    assert found.pop("z.dcm") is None
    assert {found[name] for name in broken} == {"corrupt"}
    assert (found["empty.zip"], found["empty.tar"]) == ("empty", "empty")


def test_damaged_entries_are_named_and_the_rest_goes_on(tmp_path: Path, settings: Settings) -> None:
    files = {f"IM{n}": exports.encode(exports.make_radiograph(f"d{n}")) for n in range(3)}
    data = bytearray(exports.zip_bytes(files))
    at = data.find(b"IM1") + 400
    data[at : at + 8] = b"\xff" * 8
    found = dispose(write_archive(tmp_path, "a.zip", bytes(data)), settings)
    assert found == {"a.zip/IM0": None, "a.zip/IM1": "corrupt", "a.zip/IM2": None}


def test_zip64_and_a_program_before_the_archive_are_read(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "big.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open("IM1", "w", force_zip64=True) as entry:
        entry.write(exports.good_files()["A/dx.dcm"])
    assert dispose(path, settings) == {"big.zip/IM1": None}
    exe = write_archive(
        tmp_path, "sfx.zip", b"MZ" + bytes(500) + exports.zip_bytes({"IM1": exports.good_files()["A/dx.dcm"]})
    )
    assert dispose(exe, settings) == {"sfx.zip/IM1": None}


def test_many_entries_take_little_memory(tmp_path: Path, settings: Settings) -> None:
    peaks = [
        measure_peak(write_archive(tmp_path, f"{n}.zip", exports.zip_bytes(many_texts(n))), settings)
        for n in (500, 5_000)
    ]
    peaks += [
        measure_peak(write_archive(tmp_path, f"{n}.tar", exports.tar_bytes(many_texts(n))), settings)
        for n in (500, 5_000)
    ]
    assert peaks[1] < peaks[0] + 300_000 and peaks[3] < peaks[2] + 300_000


def many_texts(count: int) -> dict[str, bytes]:
    return {f"folder/{n:06d}.txt": b"no image" for n in range(count)}


def measure_peak(path: Path, settings: Settings) -> int:
    tracemalloc.start()
    try:
        for _ in scan_export(path, settings):
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "expected"), [("a.ZIP", True), ("x.tar.GZ", True), ("x.jar", False), ("x.gz", False)])
def test_archives_are_known_by_name(name: str, expected: bool) -> None:
    assert is_archive(name) is expected


def test_an_absurd_extended_header_is_not_read_into_memory(tmp_path: Path, settings: Settings) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8 * 2**30
    path = write_archive(tmp_path, "a.tar", info.tobuf() + bytes(4096))
    assert dispose(path, settings) == {"a.tar": "corrupt"}


def test_what_killed_producers_left_half_written_is_swept(tmp_path: Path, settings: Settings) -> None:
    old, fresh = settings.home_dir / "spool" / "old.part", settings.home_dir / "spool" / "fresh.part"
    exports.write_files(settings.home_dir / "spool", {"old.part": b"x", "fresh.part": b"x"})
    os.utime(old, (1, 1))
    list(scan_export(write_archive(tmp_path, "a.zip", exports.zip_bytes({})), settings))
    assert not old.exists() and fresh.exists()


def test_a_spool_that_leads_elsewhere_is_not_written_to(tmp_path: Path, settings: Settings) -> None:
    data = exports.good_files()["A/dx.dcm"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (settings.home_dir / "spool").mkdir(parents=True)
    for first in range(256):
        (settings.home_dir / "spool" / f"{first:02x}").symlink_to(elsewhere)
    assert dispose(write_archive(tmp_path, "a.zip", exports.zip_bytes({"x": data})), settings) == {
        "a.zip/x": "unsafe_path"
    }
    assert not list(elsewhere.iterdir())
