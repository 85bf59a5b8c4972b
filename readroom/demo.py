"""`readroom demo`: the whole loop on this machine, on sample data with real junk in it.

Every part is the real one: the producers scan a PACS export and a COCO folder, an embedded Valkey carries the ids, a
separate worker process captions with the bundled BLIP and the bundled VLP, SQLite keeps the results. Only the pictures
are drawn, apart from a real chest radiograph and other real DICOM files that the package `pydicom-data` ships.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from readroom.errors import BadCall, ReadroomError
from readroom.intake import EXPECTED_REASONS, Intake, opened_store, run_intake
from readroom.records import FAMILIES, JobState, Priority, SubmissionCounts
from readroom.settings import Settings, load_settings
from readroom.sheet import SheetEntry, write_sheet

if TYPE_CHECKING:
    from db.results import ResultRecord

# Real files of pydicom-data: one chest film in two encodings; a shin bone, CT, MR, ultrasound, a screenshot's class, a
# segmentation.
REAL_CHEST = ("RG1_UNCR.dcm", "RG1_J2KR.dcm")
REAL_OTHERS = ("RG3_J2KR.dcm", "693_J2KR.dcm", "MR2_J2KR.dcm", "US1_J2KR.dcm", "SC_rgb.dcm", "liver.dcm")
SPLIT = "val2017"
SHOWN_CHARACTERS, TITLE_CHARACTERS = (
    34,
    22,
)  # of an item in a table: paths of exports are long, their ends tell them apart
WAIT_LIMIT_S = 300.0
SHEET_NOTE = (
    "AI drafts, not for diagnosis. Phantoms are drawn with known findings; the real radiograph is none of them."
)
MARKER = ".readroom-demo"


@dataclass(slots=True)
class Timings:
    """How long each part took, seconds, in order."""

    parts: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def measure(self, part: str, console: Console) -> Iterator[None]:
        """Announce a part, time it, remember it."""
        console.print(f"[dim]·[/] {part}")
        start = time.monotonic()
        yield
        self.parts.append((part, time.monotonic() - start))


def run_demo(output: Path, studies: int, scenes: int, seed: int, console: Console) -> int:
    """Run the demo under `output`; returns the exit status.

    Raises BadCall when `output` exists and is not an earlier demo's folder, ReadroomError when a part fails.
    """
    clear_output(output)
    settings = demo_settings(output)
    timings = Timings()
    console.print("[bold]Readroom demo[/] for research, not a medical device")
    families = find_families()
    with timings.measure("draw the samples", console):
        samples = draw_samples(output / "samples", studies, scenes, seed)
    with timings.measure("start the broker and a worker", console):
        worker = start_worker(settings, output)
    try:
        with timings.measure("enqueue the PACS export and the COCO folder", console):
            submissions = [
                submit_sample(settings, "pacs", samples.export, families),
                submit_sample(settings, "coco", samples.scenes, families),
            ]
        with timings.measure(f"caption with {' and '.join(map(str.upper, families))}", console):
            wait_for_jobs(settings, submissions, worker, console)
    finally:
        with timings.measure("stop the worker and the broker", console):
            stop_all(settings, worker)
    return show_outcome(settings, output, samples, submissions, timings, console)


def clear_output(output: Path) -> None:
    """Make the folder; an earlier demo's content is removed, anything else is left alone."""
    if output.exists() and any(output.iterdir()) and not (output / MARKER).exists():
        raise BadCall(f"{output} holds other files", "Choose another folder with --output.")
    for entry in output.iterdir() if output.exists() else ():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def demo_settings(output: Path) -> Settings:
    """Settings of the demo's own little installation, whatever the user's environment says.

    They are put into the environment, because the worker is a process of its own and reads them there.
    """
    for name in [name for name in os.environ if name.startswith("READROOM_")]:
        del os.environ[name]
    os.environ["READROOM_HOME"] = str((output / "home").resolve())
    for family in FAMILIES:
        os.environ[f"READROOM_{family.upper()}_MODEL"] = "bundled"
    os.environ["READROOM_LOG_LEVEL"] = "INFO"
    return load_settings(_env_file=None)


def find_families() -> tuple[str, ...]:
    """The families with a bundled checkpoint in this checkout. Raises CheckpointMissing where there is none at all."""
    from models.checkpoint import BUNDLED, list_bundled, resolve_checkpoint

    return tuple(bundled.family for bundled in list_bundled()) or (resolve_checkpoint(BUNDLED).family,)


@dataclass(frozen=True, slots=True)
class Samples:
    """Where the samples are, and what each drawn picture really shows, by its path relative to its folder."""

    export: Path
    scenes: Path
    truths: dict[str, str]


def draw_samples(folder: Path, studies: int, scenes: int, seed: int) -> Samples:
    """A PACS export with junk in it, and a COCO folder."""
    from training.phantoms import write_coco, write_pacs

    export, pictures = folder / "pacs-export", folder / "coco"
    records = write_pacs(export, count=studies, seed=seed) + write_coco(pictures, count=scenes, seed=seed)
    add_junk(export)
    truths = {record["path"]: record["caption"] for record in records if "caption" in record}
    return Samples(export, pictures / "coco2017", truths)


def add_junk(export: Path) -> None:
    """What real exports hold besides films: a real radiograph, other modalities, damaged files, viewer files."""
    real = find_real_files()
    (export / "REAL").mkdir()
    for path in real.values():
        shutil.copy(path, export / "REAL" / path.name)
    (export / "README.TXT").write_text("A viewer for these images is on the disc.\n")
    (export / "THUMBS.DB").write_bytes(bytes(range(256)) * 8)
    (export / "REAL" / "EMPTY").touch()
    whole = real[REAL_CHEST[0]].read_bytes()
    (export / "REAL" / "CUT.dcm").write_bytes(whole[: len(whole) // 2])


def find_real_files() -> dict[str, Path]:
    """The real sample files by name. Raises BadCall when pydicom-data is not installed."""
    try:
        import data_store
    except ImportError:
        raise BadCall("the demo needs the package pydicom-data", "pip install 'readroom[demo]'") from None
    folder = Path(next(iter(data_store.__path__))) / "data"
    return {name: folder / name for name in (*REAL_CHEST, *REAL_OTHERS)}


def start_worker(settings: Settings, output: Path) -> subprocess.Popen[bytes]:
    """Start the broker, then a worker process of its own; its log is `<output>/worker.log`."""
    from readroom.broker import start_broker

    settings.home_dir.mkdir(mode=0o700, parents=True)
    start_broker(settings.home_dir)
    with (output / "worker.log").open("wb") as log:
        command = [sys.executable, "-m", "readroom.cli", "worker", "--queue", "caption"]
        # In another folder than the user's, so that no `.env` of theirs reaches the worker.
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=settings.home_dir, start_new_session=True)


def submit_sample(settings: Settings, kind: str, path: Path, families: tuple[str, ...]) -> SubmissionCounts:
    """Enqueue one sample folder: one submission, each image captioned by each family."""
    priority = Priority.STAT if kind == "pacs" else Priority.BULK
    options = (("split", SPLIT),) if kind == "coco" else ()
    return run_intake(settings, Intake(kind, path, priority, captioners=families, options=options))


def wait_for_jobs(
    settings: Settings, submissions: list[SubmissionCounts], worker: subprocess.Popen[bytes], console: Console
) -> None:
    """Show a bar until every job is final. Raises ReadroomError when the worker ends or time is up."""
    from db.submissions import count_jobs
    from readroom.records import FINAL_STATES

    total = sum(counts.queued for counts in submissions)
    deadline = time.monotonic() + WAIT_LIMIT_S
    columns = (TextColumn("  captions"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    with opened_store(settings) as store, bars as progress:
        bar = progress.add_task("captions", total=total)
        while (done := sum(n for s, n in count_jobs(store, None).items() if s in FINAL_STATES)) < total:
            progress.update(bar, completed=done)
            check_worker(worker, deadline)
            time.sleep(0.2)


def check_worker(worker: subprocess.Popen[bytes], deadline: float) -> None:
    """Raise when the worker has ended or the demo takes too long."""
    if worker.poll() is not None:
        raise ReadroomError(f"the worker ended with status {worker.returncode}", "Its log is worker.log.")
    if time.monotonic() > deadline:
        raise ReadroomError(f"captions took longer than {WAIT_LIMIT_S:.0f} s", "The worker's log is worker.log.")


def stop_all(settings: Settings, worker: subprocess.Popen[bytes]) -> None:
    """Warm shutdown of the worker, then the broker."""
    from readroom.broker import stop_broker

    worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(30)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    stop_broker(settings.home_dir)


def show_outcome(
    settings: Settings,
    output: Path,
    samples: Samples,
    submissions: list[SubmissionCounts],
    timings: Timings,
    console: Console,
) -> int:
    """Print captions, reasons and times, write the sheet; returns 0 when every job succeeded."""
    from db.jobs import list_failures
    from db.results import iter_results
    from db.submissions import count_jobs

    with opened_store(settings) as store:
        films, scenes = (list(iter_results(store, counts.submission)) for counts in submissions)
        counts = count_jobs(store, None)
        failed = list_failures(store)
    console.print(caption_table([*films, *scenes]), skipped_table(submissions))
    for row in failed:
        console.print(f"[red]job {row.job} failed: {row.reason} {row.detail}[/]")
    start = time.monotonic()
    png, page = write_sheet(draw_entries(samples, films, scenes), output, "Readroom demo", SHEET_NOTE)
    timings.parts.append(("draw the contact sheet", time.monotonic() - start))
    console.print(timing_table(timings))
    console.print(f"Contact sheet: [bold]{page}[/] and {png}")
    return 0 if counts.get(JobState.SUCCEEDED, 0) == sum(c.queued for c in submissions) else 1


def caption_table(records: list[ResultRecord]) -> Table:
    """Image, view, model, caption, score: a row for each caption, those of an image together."""
    table = Table(title="Captions", title_justify="left", show_lines=False)
    for column in ("image", "view", "model", "caption", "score"):
        table.add_column(column, overflow="fold")
    for said in group_images(records):
        for number, record in enumerate(said):
            image = (shorten_item(record.item), record.view or "") if number == 0 else ("", "")
            score = "" if record.score is None else f"{record.score:.2f}"
            table.add_row(*map(Text, (*image, record.captioner.upper(), record.text, score)))
    return table


def group_images(records: list[ResultRecord]) -> list[list[ResultRecord]]:
    """The results of each image, by family, in the order in which the images were found."""
    images: dict[str, list[ResultRecord]] = {}
    for record in records:
        images.setdefault(record.item, []).append(record)
    return [sorted(said, key=lambda record: FAMILIES.index(record.captioner)) for said in images.values()]


def skipped_table(submissions: list[SubmissionCounts]) -> Table:
    """What was left out, and why; damage in red."""
    table = Table(title="Left out", title_justify="left")
    for column in ("item", "reason", "detail"):
        table.add_column(column, overflow="fold")
    for item in (item for counts in submissions for item in counts.skipped):
        style = "" if item.reason in EXPECTED_REASONS else "red"
        table.add_row(*map(Text, (shorten_item(item.item), item.reason, item.detail)), style=style)
    return table


def timing_table(timings: Timings) -> Table:
    """Seconds for each part, and their sum."""
    table = Table(title="Time", title_justify="left", show_header=False)
    for part, seconds in timings.parts:
        table.add_row(part, f"{seconds:6.1f} s")
    table.add_section()
    table.add_row("all", f"{sum(seconds for _, seconds in timings.parts):6.1f} s")
    return table


def draw_entries(samples: Samples, films: list[ResultRecord], scenes: list[ResultRecord]) -> list[SheetEntry]:
    """A card for each image: its picture, each model's caption, and the truth where it was drawn."""
    from PIL import Image

    from models.pixels import render_file

    entries = []
    for folder, prefix, records in ((samples.export, "", films), (samples.scenes / SPLIT, f"{SPLIT}/", scenes)):
        for said in group_images(records):
            item = said[0].item
            truth = samples.truths.get(prefix + item)
            detail = f"truth: {truth}" if truth else "a real film: its truth is not known"
            picture = Image.fromarray(render_file(folder / item))
            texts = {record.captioner.upper(): record.text for record in said}
            entries.append(SheetEntry(picture, shorten_item(item, TITLE_CHARACTERS), texts, detail))
    return entries


def shorten_item(item: str, longest: int = SHOWN_CHARACTERS) -> str:
    """The end of a long path."""
    return item if len(item) <= longest else "…" + item[1 - longest :]
