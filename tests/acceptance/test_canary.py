"""Marked fake patient data goes through everything, and shows up nowhere but in the store."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from readroom.broker import start_broker, stop_broker
from readroom.settings import Settings, load_settings
from readroom.transport import make_celery, redis_client

MARK = "ZZMARK"
UID_MARK = "99887766554433"
DATE_MARK = "18870706"
MARKS = (MARK, MARK.lower(), UID_MARK, DATE_MARK)
STUDIES = 6
LIMIT_S = 180
FLOWER_USER, FLOWER_PASSWORD = "canary", "canary-password"


def mark_header(ds: Dataset, number: int) -> None:
    """Put a mark into everything that could name a patient, a doctor, a place or a study."""
    ds.PatientName, ds.PatientID = f"{MARK}NAME^{number}", f"{MARK}ID{number}"
    ds.PatientBirthDate = ds.StudyDate = ds.ContentDate = ds.AcquisitionDate = DATE_MARK
    ds.AccessionNumber = f"{MARK}ACC{number}"
    ds.ReferringPhysicianName = f"{MARK}DOCTOR^{number}"
    ds.InstitutionName, ds.StudyDescription = f"{MARK}HOSPITAL", f"{MARK} CHEST"
    ds.SeriesDescription, ds.ImageComments = f"{MARK} PA", f"{MARK} seen by nobody"
    ds.DeviceSerialNumber = f"{MARK}SERIAL"
    ds.StudyInstanceUID = f"1.2.826.0.1.{UID_MARK}.1.{number}"
    ds.SeriesInstanceUID = f"1.2.826.0.1.{UID_MARK}.2.{number}"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.{UID_MARK}.3.{number}"
    block = ds.private_block(0x0011, f"{MARK}VENDOR", create=True)
    block.add_new(0x01, "LO", f"{MARK}PRIVATE")


def write_export(root: Path) -> Path:
    """Films, a film whose pixels cannot be decoded, a cut one, a value of the wrong kind, all marked, also in paths."""
    from training.phantoms import write_pacs

    plain = root / "plain"
    records = write_pacs(plain, count=STUDIES, seed=77)
    films = [plain / record["path"] for record in records if record["expected"] == "accepted"][:STUDIES]
    export = root / f"{MARK}EXPORT"
    for number, film in enumerate(films):
        ds = pydicom.dcmread(film)
        mark_header(ds, number)
        target = export / f"{MARK}^PATIENT {number}" / f"{MARK}{number}.dcm"
        target.parent.mkdir(parents=True)
        ds.save_as(target)
    spoil_pixels(films[0], export / f"{MARK}BROKEN.dcm")
    whole = (export / f"{MARK}^PATIENT 1" / f"{MARK}1.dcm").read_bytes()
    (export / f"{MARK}CUT.dcm").write_bytes(whole[: len(whole) * 2 // 3])
    write_wrong_value(films[1], export / f"{MARK}VALUE.dcm")
    (export / f"{MARK}.txt").write_text(f"{MARK} letter")
    return export


def spoil_pixels(film: Path, target: Path) -> None:
    """A header that promises JPEG 2000 and a codestream that holds nothing of it: only the decoder notices."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEG2000Lossless

    ds = pydicom.dcmread(film)
    mark_header(ds, 901)
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([b"\xff\x4f\xff\x51" + f"{MARK}PIXELS".encode() * 4000])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.save_as(target)


def write_wrong_value(film: Path, target: Path) -> None:
    """A window that is a name: pydicom's exceptions and warnings would quote it."""
    ds = pydicom.dcmread(film)
    mark_header(ds, 902)
    content = target.with_suffix(".tmp")
    ds.WindowCenter, ds.WindowWidth = "1234567", "7654321"
    ds.save_as(content)
    target.write_bytes(content.read_bytes().replace(b"1234567", b"ZZMARKW").replace(b"7654321", b"ZZMARKX"))
    content.unlink()


def environment(home: Path, port: int) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("READROOM_")}
    return own | {
        "READROOM_HOME": str(home),
        "READROOM_BLIP_MODEL": "bundled",
        "READROOM_LOG_LEVEL": "DEBUG",
        "READROOM_FLOWER_PORT": str(port),
        "READROOM_FLOWER_USER": FLOWER_USER,
        "READROOM_FLOWER_PASSWORD": FLOWER_PASSWORD,
        "READROOM_RESCUE_INTERVAL_S": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dump_redis(url: str) -> str:
    """Every key and value, message bodies decoded."""
    client = redis_client(url)
    parts: list[str] = []
    for key in client.scan_iter():
        kind = client.type(key)
        value: Any = {
            "string": lambda k: client.get(k),
            "list": lambda k: client.lrange(k, 0, -1),
            "set": lambda k: client.smembers(k),
            "hash": lambda k: client.hgetall(k),
            "zset": lambda k: client.zrange(k, 0, -1, withscores=True),
        }[kind](key)
        parts.append(f"{key} {value}")
        parts += [decode_body(item) for item in value if kind == "list"]
    return "\n".join(parts)


def decode_body(message: str) -> str:
    """The JSON inside kombu's base64."""
    return base64.b64decode(json.loads(message)["body"]).decode()


@contextmanager
def captured_events(settings: Settings, url: str) -> Iterator[list[dict[str, Any]]]:
    """All Celery events while the block runs."""
    app = make_celery(settings, url)
    events: list[dict[str, Any]] = []
    stop, ready = threading.Event(), threading.Event()

    def listen() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": events.append})
            consumer = receiver.itercapture(limit=None, timeout=0.5, wakeup=True)
            while not stop.is_set():
                try:
                    ready.set()
                    next(consumer)
                except (TimeoutError, OSError, StopIteration):
                    consumer = receiver.itercapture(limit=None, timeout=0.5, wakeup=False)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield events
    stop.set()
    thread.join(30)


def ask_flower(port: int, path: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    token = base64.b64encode(f"{FLOWER_USER}:{FLOWER_PASSWORD}".encode()).decode()
    request.add_header("Authorization", f"Basic {token}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def wait_for_flower(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until Flower answers; refused without a password."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "Flower ended"
        try:
            ask_flower(port, "/api/workers")
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)  # not listening yet: there is no event to wait for in another process
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/tasks", timeout=20)
    assert refused.value.code == 401


def find_marks(text: str) -> list[str]:
    return [mark for mark in MARKS if mark in text]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Run the marked export end to end with real processes; what each place then holds."""
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        monkeypatch.delenv(name)
    home, port = tmp_path / "home", free_port()
    env = environment(home, port)
    home.mkdir(mode=0o700)
    url = start_broker(home).url
    settings = load_settings(home=home)
    command = [sys.executable, "-m", "readroom.cli"]
    found: dict[str, str] = {}
    export = write_export(tmp_path)
    with (home / "flower.log").open("wb") as log:
        flower = subprocess.Popen([*command, "flower"], env=env, stdout=log, stderr=log, cwd=home)
    try:
        enqueued = subprocess.run([*command, "enqueue", "pacs", str(export), "--json"], env=env, cwd=home,
                                  capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
        found["enqueue result"] = enqueued.stdout
        found["enqueue stderr"] = enqueued.stderr
        found["redis before"] = dump_redis(url)
        wait_for_flower(port, flower)
        with captured_events(settings, url) as events:
            worked = subprocess.run([*command, "worker", "--drain"], env=env, cwd=home, capture_output=True, text=True,
                                    timeout=LIMIT_S)  # fmt: skip
        found["worker log"] = worked.stdout + worked.stderr
        found["events"] = json.dumps(events, default=str)
        found["redis after"] = dump_redis(url)
        for path in ("/api/tasks", "/api/workers?refresh=0", "/metrics"):
            found[f"flower {path}"] = ask_flower(port, path)
        found["failures"] = subprocess.run([*command, "failures", "list", "--json"], env=env, cwd=home, check=True,
                                           capture_output=True, text=True, timeout=LIMIT_S).stdout  # fmt: skip
    finally:
        flower.terminate()
        flower.wait(30)
        stop_broker(home)
    found["flower log"] = (home / "flower.log").read_text()
    for path in sorted((home / "broker").rglob("*")):
        if path.is_file():
            found[f"broker file {path.name}"] = path.read_bytes().decode("latin-1")
    found["store"] = (home / "readroom.sqlite3").read_bytes().decode("latin-1")
    yield found


def test_marked_patient_data_stays_in_the_store(places: dict[str, str]) -> None:
    result = json.loads(places.pop("enqueue result"))
    store = places.pop("store")
    failures = json.loads(places.pop("failures"))
    places["causes"] = json.dumps([[row["reason"], row["detail"]] for row in failures])

    # The run did what it should: otherwise there was nothing to leak.
    assert result["images"] == STUDIES + 2
    assert "truncated" in {item["reason"] for item in result["skipped"]}
    assert places["redis before"].count('"jobs"') >= 1
    assert len([e for e in json.loads(places["events"]) if e["type"] == "task-succeeded"]) >= 1
    assert json.loads(places["flower /api/tasks"])
    assert [row["reason"] for row in failures], "the spoiled film should have failed"
    assert UID_MARK in store, "the store is where identifiers belong"

    leaks = {place: marks for place, text in places.items() if (marks := find_marks(text))}
    assert leaks == {}
    assert len(places) >= 12


def test_the_search_for_marks_finds_a_planted_one() -> None:
    assert find_marks(f"... PatientName={MARK}NAME ...") == [MARK]
    assert find_marks(decode_body(json.dumps({"body": base64.b64encode(DATE_MARK.encode()).decode()}))) == [DATE_MARK]
