"""The one console command. Commands are thin: they read options, call a room, print. Imports stand inside them, so
that `readroom enqueue` on a machine beside the PACS never loads torch."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click

from readroom.errors import BadCall, ReadroomError, SettingsError
from readroom.records import FAMILIES
from readroom.settings import Settings, load_settings

if TYPE_CHECKING:
    from rich.console import Console

    from db.session import Store
    from models.checkpoint import CheckpointSource
    from readroom.records import SubmissionCounts
    from readroom.scoring import Scoreboard

P = ParamSpec("P")
R = TypeVar("R")

ITEMS_FAILED, BAD_CALL = 1, 2
NAMED_ITEMS = 20  # skipped items named on the terminal; all of them stand in the submission's file

EPILOG = """\b
Start here:   readroom demo                        the whole loop on sample data
Then:         readroom up                          broker, worker and Flower on this machine
              readroom enqueue pacs /path/export   images in
              readroom status --watch              how far it is
              readroom results SUBMISSION          captions out
Exit status:  0 done as asked, 1 some items failed (they are named), 2 a bad call."""


class ReadroomCommand(click.Group):
    """Turns our errors into one clear line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a ReadroomError ends it with its message, never with a traceback."""
        try:
            return super().invoke(ctx)
        except (BadCall, SettingsError) as error:
            fail(error, BAD_CALL)
        except ReadroomError as error:
            fail(error, ITEMS_FAILED)
        except BrokenPipeError:  # `readroom results ... | head` closed the pipe: that is no failure
            sys.stderr.close()
            sys.exit(0)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OSError as error:  # a full disk, a folder without permission: the machine's fault; no path is printed
            fail(ReadroomError(f"the system refused: {error.strerror or type(error).__name__}"), ITEMS_FAILED)
        except Exception:  # a bug of ours; Python's own traceback would print texts that may quote patients' files
            logging.getLogger("readroom").exception("a bug in Readroom: please report these lines")
            sys.exit(ITEMS_FAILED)


def fail(error: ReadroomError, status: int) -> None:
    """Print an error of ours and end."""
    click.secho(f"readroom: {error}", fg="red" if sys.stderr.isatty() else None, err=True)
    sys.exit(status)


def with_store(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command its settings and an open store as the first two arguments."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> R:
        from readroom.intake import opened_store

        settings = load_settings()
        with opened_store(settings) as store:
            return command(settings, store, *args, **kwargs)

    return wrapped


def terminal(stderr: bool = False) -> Console:
    """A rich console on standard output or standard error."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def show_name(name: str) -> str:
    """A file's name for a terminal: characters that would control it are written out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


@click.group(cls=ReadroomCommand, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="readroom", message="%(prog)s %(version)s")
def main() -> None:
    """Draft radiology reports in bulk: images in, captions and drafts in a SQL store.

    Settings come from READROOM_* variables or a .env file (docs/configuration.md). Without any, everything runs on
    this machine: an embedded Valkey and SQLite under ~/.readroom.

    For research. Not a medical device. Every text is an AI draft that a radiologist must review.
    """
    from readroom.log import set_up_logging

    set_up_logging("WARNING")


# ---------------------------------------------------------------------------------------------- the local stack


@main.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True,
              help="Folder for the sample inputs, the store and the contact sheet.")  # fmt: skip
@click.option("--studies", default=12, show_default=True, help="Phantom studies in the sample PACS export.")
@click.option("--scenes", default=9, show_default=True, help="Pictures in the sample COCO folder.")
@click.option("--seed", default=2026, show_default=True, help="Seed of the samples.")
def demo(output: Path, studies: int, scenes: int, seed: int) -> None:
    """The whole loop on sample data: no network, no GPU, about a minute.

    Draws a PACS export and a COCO folder, adds a real radiograph and junk, then runs producers, an embedded Valkey, a
    worker process and a SQLite store; prints the captions and writes a contact sheet.
    """
    from readroom.demo import run_demo

    sys.exit(run_demo(output, studies, scenes, seed, terminal()))


@main.command()
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Worker processes: one for each GPU."
)
@click.option("--queue", default="caption", show_default=True, type=click.Choice(["caption"]),
              help="Job kind the workers take.")  # fmt: skip
@click.option("--flower/--no-flower", default=True, show_default=True, help="Run the queue monitor.")
@click.option("--foreground", is_flag=True, help="Stay and supervise in this terminal until Ctrl-C.")
def up(workers: int, queue: str, flower: bool, foreground: bool) -> None:
    """Start the local stack: broker, workers, Flower. What dies is started again."""
    from readroom import stack
    from readroom.intake import opened_store, prepare_home

    settings = load_settings()
    prepare_home(settings)
    if foreground:
        stack.run_stack(settings, workers, queue, flower)
        return
    with opened_store(settings):
        pass  # a store that does not answer is said here, not in some worker's log
    state = stack.launch_stack(settings, workers, queue, flower)
    for service in state["services"]:
        click.echo(f"{service['name']:<10} process {service['pid']}, log {service['log']}")
    if flower:
        click.echo(f"Flower     http://{settings.flower_host}:{settings.flower_port} as {settings.flower_user}, "
                   f"password {describe_flower_password(settings)}")  # fmt: skip


def describe_flower_password(settings: Settings) -> str:
    """Where the password is to be found; it is not printed."""
    from readroom.stack import flower_password

    flower_password(settings)
    return "from READROOM_FLOWER_PASSWORD" if settings.flower_password else f"in {settings.home_dir}/flower-password"


@main.command()
def down() -> None:
    """End the local stack: workers finish the batch in hand, the broker stops last."""
    from readroom.stack import end_stack

    click.echo("the stack is down" if end_stack(load_settings()) else "nothing was up")


@main.command()
@click.option("--queue", "kinds", multiple=True, default=("caption",), show_default=True,
              type=click.Choice(["caption"]), help="Job kinds to take; may be given several times.")  # fmt: skip
@click.option("--concurrency", type=click.IntRange(1, 256), help="Messages in hand [READROOM_CONCURRENCY].")
@click.option("--drain", is_flag=True, help="End when the queues are empty.")
def worker(kinds: tuple[str, ...], concurrency: int | None, drain: bool) -> None:
    """Run a worker: one process for each GPU. Let a supervisor start it again: `readroom up`, systemd, compose.

    \b
    SIGTERM  finishes the batch in hand and gives the rest back at once.
    """
    from readroom.log import set_up_logging
    from worker.app import run_worker

    settings = load_settings()
    set_up_logging(settings.log_level)
    sys.exit(run_worker(settings, kinds=kinds, concurrency=concurrency, drain=drain))


@main.command()
def flower() -> None:
    """Run Flower, the queue monitor, behind a password (READROOM_FLOWER_*)."""
    from readroom.stack import run_flower

    run_flower(load_settings())


@main.command()
@with_store
def migrate(settings: Settings, store: Store) -> None:
    """Bring the store's tables up to this release. Safe to run again."""
    click.echo(f"the {store.dialect} store is up to date")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def doctor(as_json: bool) -> None:
    """Say what is configured, reachable, missing, unsafe. Exit status 1 when something is wrong."""
    from readroom.doctor import examine

    findings = examine(load_settings())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    sys.exit(ITEMS_FAILED if any(finding.level == "error" for finding in findings) else 0)


def print_findings(findings: list[Any]) -> None:
    """The doctor's report as a table."""
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        # Text, not markup: `pip install 'readroom[embedded]'` is no style.
        text = Text.assemble(finding.text, "  ", (finding.remedy, "dim"))
        table.add_row(Text(finding.level, styles[finding.level]), finding.subject, text)
    terminal().print(table)


# ---------------------------------------------------------------------------------------------- images in


@main.group()
def enqueue() -> None:
    """Put images on the queues. Nothing is done twice: a rerun, also after a kill, goes on where it stood.

    \b
    Exit status 1 when items are damaged or refused (truncated, empty, uid_conflict, unsafe_path, too_large,
    encrypted, missing, unreadable, corrupt, multi_frame); what is left out by policy (not_dicom, not_image,
    other_modality, for_processing, secondary_capture, burned_in, not_chest, duplicate) leaves it 0. All of them stand
    with their reason in <home>/submissions/<id>/skipped.jsonl and in --json.
    """


def enqueue_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options that every `enqueue` has."""
    options = [
        click.argument("path", type=click.Path(path_type=Path)),
        click.option("--task", type=click.Choice(["caption"]), default="caption", show_default=True,
                     help="What is asked of each image."),
        click.option("--captioner", "captioners", type=click.Choice(FAMILIES), multiple=True, default=FAMILIES[:1],
                     show_default=True, help="Family of the captioning model; given twice, each image is captioned by "
                     "both."),
        click.option("--model", help="Checkpoint: a registered name, `bundled`, `dummy`, a folder or a hub id "
                     "[READROOM_BLIP_MODEL, READROOM_VLP_MODEL]; default the registry's active one."),
        click.option("--priority", type=click.Choice(["stat", "routine", "bulk"]), default="bulk", show_default=True,
                     help="Which queue the jobs go to."),
        click.option("--dry-run", is_flag=True, help="Only say what would be enqueued."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@enqueue.command("pacs")
@enqueue_options
def enqueue_pacs(path: Path, **options: Any) -> None:
    """A PACS export: a folder of any shape, a .zip or a .tar. Only headers are read."""
    submit("pacs", path, {}, **options)


@enqueue.command("coco")
@enqueue_options
@click.option("--split", default="val2017", show_default=True,
              help="`val2017`, `train2017` ...; with a Karpathy file `train`, `val` or `test`.")  # fmt: skip
@click.option("--karpathy", type=click.Path(path_type=Path), help="A Karpathy split file (dataset_coco.json).")
def enqueue_coco(path: Path, split: str, karpathy: Path | None, **options: Any) -> None:
    """A COCO folder: annotations/captions_SPLIT.json and the images of SPLIT."""
    extra = {"split": split, **({"karpathy": str(karpathy.resolve())} if karpathy else {})}
    submit("coco", path, extra, **options)


@enqueue.command("mimic")
@enqueue_options
@click.option("--split", help="Only `train`, `validate` or `test` of the official split.")
def enqueue_mimic(path: Path, split: str | None, **options: Any) -> None:
    """A MIMIC-CXR or MIMIC-CXR-JPG tree."""
    submit("mimic", path, {"split": split} if split else {}, **options)


@enqueue.command("images")
@enqueue_options
def enqueue_images(path: Path, **options: Any) -> None:
    """Image files: one file or a folder of JPEG, PNG, DICOM and so on."""
    submit("images", path, {}, **options)


def submit(kind: str, path: Path, extra: dict[str, Any], **options: Any) -> None:
    """Run one intake, show its progress, print what came of it, and end with the documented status."""
    from readroom.intake import Intake, damaged_items, run_intake
    from readroom.records import Priority

    intake = Intake(
        source_kind=kind,
        path=path,
        priority=Priority(options["priority"]),
        captioners=options["captioners"],
        model=options["model"],
        options=tuple(extra.items()),
        dry_run=options["dry_run"],
    )
    settings = load_settings()
    with intake_progress() as report:
        counts = run_intake(settings, intake, report)
    print_json(counts.as_json()) if options["as_json"] else print_counts(settings, counts, intake.dry_run)
    name_failed(counts)
    sys.exit(ITEMS_FAILED if damaged_items(counts.skipped) else 0)


def name_failed(counts: SubmissionCounts) -> None:
    """Say on standard error, beside JSON too, that some of these jobs failed earlier and stay so."""
    if counts.already_failed:
        click.echo(f"{counts.already_failed:,} of its jobs are dead letters and stay so; to try them again: "
                   f"readroom failures requeue --submission {counts.submission}", err=True)  # fmt: skip


@contextmanager
def intake_progress() -> Iterator[Callable[[str, int], None]]:
    """A spinner with counts on standard error, on a terminal only."""
    console = terminal(stderr=True)
    if not console.is_terminal:
        yield lambda event, items: None
        return
    with console.status("looking") as status:
        yield lambda event, items: status.update(describe_intake(event, items))


def describe_intake(event: str, items: int) -> str:
    """One line for a progress event of the producer."""
    if event == "waiting":
        return f"{items:,} messages wait: the queues are full, going on when workers have caught up"
    return f"{event}: {items:,} items"


def print_counts(settings: Settings, counts: SubmissionCounts, dry_run: bool) -> None:
    """What an `enqueue` found and did, for people."""
    from collections import Counter

    from readroom.intake import damaged_items

    title = "would be a submission" if dry_run else f"submission {counts.submission}"
    click.echo(f"{title}: found {counts.found:,}, queued {counts.queued:,}, already done {counts.already_done:,}, "
               f"skipped {len(counts.skipped):,} ({counts.studies:,} studies, {counts.images:,} images)")  # fmt: skip
    for reason, number in Counter(item.reason for item in counts.skipped).most_common():
        click.echo(f"  {number:>7,}  {reason}")
    damaged = damaged_items(counts.skipped)
    for item in damaged[:NAMED_ITEMS]:
        click.echo(f"  {item.reason}: {show_name(item.item)}{f' ({item.detail})' if item.detail else ''}")
    if counts.skipped and not dry_run:
        click.echo(f"each with its reason: {settings.home_dir / 'submissions' / counts.submission / 'skipped.jsonl'}")
    if counts.queued and not dry_run:
        click.echo(f"next: readroom status {counts.submission} --watch")


# ---------------------------------------------------------------------------------------------- how far, and out


@main.command()
@click.argument("submission", required=False)
@click.option("--watch", is_flag=True, help="Stay until nothing is left to do.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@with_store
def status(settings: Settings, store: Store, submission: str | None, watch: bool, as_json: bool) -> None:
    """Jobs by state, rate and time left, of one submission or of all."""
    from readroom.overview import measure_progress, render_progress

    if submission is not None:
        check_submission(store, submission)
    if watch:
        watch_progress(store, submission, quiet=as_json)
    if as_json:
        print_json(measure_progress(store, submission))
    elif not watch:
        terminal().print(render_progress(measure_progress(store, submission)))


def check_submission(store: Store, submission: str) -> None:
    """Raise BadCall when no such submission is known."""
    from db.submissions import get_submission

    if get_submission(store, submission) is None:
        raise BadCall(f"no submission {submission}", "`readroom submissions` lists them.")


def watch_progress(store: Store, submission: str | None, quiet: bool, interval_s: float = 1.0) -> None:
    """Show the progress until every job is final; `quiet` only waits."""
    import time

    from rich.live import Live

    from readroom.overview import is_finished, measure_progress, render_progress

    progress, console = measure_progress(store, submission), terminal()
    console.quiet = quiet
    with Live(render_progress(progress), console=console, refresh_per_second=4) as live:
        while not is_finished(progress):
            time.sleep(interval_s)
            progress = measure_progress(store, submission)
            live.update(render_progress(progress))
    if not (console.is_terminal or quiet):
        click.echo()  # there, rich leaves the last line open


@main.command()
@click.option("--limit", default=20, show_default=True, help="The latest ones, at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@with_store
def submissions(settings: Settings, store: Store, limit: int, as_json: bool) -> None:
    """List the latest submissions."""
    import time

    from db.submissions import list_submissions

    records = list_submissions(store, limit)
    if as_json:
        print_json([asdict(record) for record in records])
        return
    for record in records:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created_at))
        click.echo(f"{record.id}  {made}  {record.plan.source_kind:<6} {record.state:<10} found {record.found:,}")


@main.command()
@click.argument("submission")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv", "parquet"]), default="jsonl", show_default=True,
              help="jsonl: one JSON object a line.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File; default standard output.")
@with_store
def results(settings: Settings, store: Store, submission: str, form: str, output: Path | None) -> None:
    """One record for each result: identifiers, text, score, checkpoint.

    The records name studies: keep them inside the hospital.
    """
    from db.results import iter_results
    from readroom import export

    check_submission(store, submission)
    records = iter_results(store, submission)
    if form == "parquet":
        if output is None:
            raise BadCall("Parquet goes to a file", "Give -o FILE.")
        count = export.write_parquet(records, output)
    else:
        write = export.write_csv if form == "csv" else export.write_jsonl
        with export.open_output(output) as out:
            count = write(records, out)
    click.echo(f"{count:,} results", err=True)


@main.group()
def failures() -> None:
    """Dead letters: jobs that failed for good, with their cause."""


def failure_filters(command: Callable[P, R]) -> Callable[P, R]:
    """Which dead letters: by submission, by reason."""
    command = click.option("--submission", help="Only those of one submission.")(command)
    return click.option("--reason", help="Only those with this reason code.")(command)


@failures.command("list")
@failure_filters
@click.option("--limit", default=100, show_default=True, help="Rows, at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@with_store
def list_failures(
    settings: Settings, store: Store, submission: str | None, reason: str | None, limit: int, as_json: bool
) -> None:
    """List dead letters."""
    from db.jobs import list_failures as read_failures

    if submission is not None:
        check_submission(store, submission)
    rows = read_failures(store, submission=submission, reason=reason, limit=limit)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        click.echo(
            f"{row.job:>8}  {row.kind:<8} {row.captioner:<5} {row.attempt} attempts  {row.reason:<18} "
            f"{show_name(row.item)}  {row.detail}"
        )
    if not rows:
        click.echo("no dead letters")


@failures.command("show")
@click.argument("job", type=int)
@with_store
def show_failure(settings: Settings, store: Store, job: int) -> None:
    """Show one dead letter whole."""
    from db.jobs import get_failure

    row = get_failure(store, job)
    if row is None:
        raise BadCall(f"job {job} is no dead letter", "`readroom failures list` names them.")
    print_json(asdict(row))


def selection(jobs: tuple[int, ...], everything: bool, submission: str | None, reason: str | None) -> dict[str, Any]:
    """The chosen dead letters as arguments for the store; raises BadCall when nothing was chosen."""
    if not (jobs or everything or submission or reason):
        raise BadCall("say which dead letters", "Give job ids, --submission, --reason or --all.")
    return {"job_ids": list(jobs) or None, "submission": submission, "reason": reason}


@failures.command("requeue")
@click.argument("jobs", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@failure_filters
@with_store
def requeue_failures(
    settings: Settings,
    store: Store,
    jobs: tuple[int, ...],
    everything: bool,
    submission: str | None,
    reason: str | None,
) -> None:
    """Give dead letters a new start, with all their attempts."""
    from db.jobs import requeue_failures as requeue

    ids = requeue(store, **selection(jobs, everything, submission, reason))
    click.echo(f"{len(ids):,} jobs queued again; workers publish them within {settings.rescue_interval_s:.0f} s")


@failures.command("drop")
@click.argument("jobs", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@failure_filters
@with_store
def drop_failures(
    settings: Settings,
    store: Store,
    jobs: tuple[int, ...],
    everything: bool,
    submission: str | None,
    reason: str | None,
) -> None:
    """Give dead letters up: their jobs become cancelled."""
    from db.jobs import drop_failures as drop

    click.echo(f"{len(drop(store, **selection(jobs, everything, submission, reason))):,} jobs cancelled")


# ---------------------------------------------------------------------------------------------- one image, now


def model_options(option: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """The options of a command that runs a model on images now; `option` is what its family is called there."""

    def add(command: Callable[P, R]) -> Callable[P, R]:
        options = [
            click.option(option, "family", type=click.Choice(FAMILIES), default=FAMILIES[0], show_default=True,
                         help="Family of the model."),
            click.option("--model", help="Checkpoint: a registered name, `bundled`, a folder or a hub id "
                         "[READROOM_BLIP_MODEL, READROOM_VLP_MODEL]; default the registry's active one."),
            click.option("--json", "as_json", is_flag=True, help="One JSON document instead of lines."),
        ]  # fmt: skip
        for one in reversed(options):
            command = one(command)
        return command

    return add


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options("--captioner")
def caption(images: tuple[Path, ...], family: str, model: str | None, as_json: bool) -> None:
    """Caption images now, without any queue: files or folders of DICOM, JPEG, PNG and so on."""
    from readroom.captions import caption_now, choose_captioner

    settings = load_settings()
    source = choose_captioner(settings, family, model)
    warn_toy(source)
    print_texts(caption_now(settings, images, source), "caption", as_json)


@main.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@model_options("--answerer")
def ask(image: Path, question: str, family: str, model: str | None, as_json: bool) -> None:
    """Ask about an image now, without any queue: a file, or every picture of a folder.

    READROOM_BLIP_MODEL names a captioner: a BLIP that answers is another checkpoint, by default
    Salesforce/blip-vqa-base. A VLP may do both.
    """
    from readroom.captions import answer_now, choose_answerer

    settings = load_settings()
    source = choose_answerer(settings, family, model)
    warn_toy(source)
    print_texts(answer_now(settings, [image], question, source), "answer", as_json)


def warn_toy(source: CheckpointSource) -> None:
    """Say on standard error what has to be known of a checkpoint before its texts are read."""
    from readroom.captions import warn_captioner

    if note := warn_captioner(source):
        click.echo(note, err=True)


def print_texts(rows: list[dict[str, Any]], kind: str, as_json: bool) -> NoReturn:
    """Print the texts of images and end with the documented status."""
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['image']}: {row[kind] if row['error'] is None else 'failed: ' + row['error']}")
    sys.exit(ITEMS_FAILED if any(row["error"] for row in rows) else 0)


@main.group()
def train() -> None:
    """Train models: by the published recipes, or by one of your own."""


@train.command("vlp")
@click.option("--task", type=click.Choice(["caption", "vqa"]), default="caption", show_default=True,
              help="Learn to caption, or to answer questions.")  # fmt: skip
@click.option("--dataset", type=click.Choice(["coco", "phantoms"]), default="coco", show_default=True,
              help="COCO (with --task vqa: VQA v2), or pictures drawn here.")  # fmt: skip
@click.option("--data_dir", "--data-dir", type=click.Path(path_type=Path, file_okay=False),
              help="Folder that holds coco2017/ or the VQA v2 files [READROOM_DATA_DIR].")  # fmt: skip
@click.option("--region_dir", "--region-dir", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of precomputed regions [READROOM_REGION_DIR].")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False),
              help="Recipe, a TOML file; default: the task's own in training/configs/.")  # fmt: skip
@click.option("--init", help="VLP checkpoint to start from: `bundled`, a registered name or a folder.")
@click.option("--regions", type=click.Choice(["grid", "detector", "precomputed"]),
              help="What makes the regions of a fresh model; default: as the recipe says.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data [recipe].")
@click.option("--batch_size", "--batch-size", type=click.IntRange(1), help="Texts in one update [recipe].")
@click.option("--forward_size", "--forward-size", type=click.IntRange(1),
              help="Texts at once: a small device makes an update of several passes [recipe].")  # fmt: skip
@click.option("--learning_rate", "--learning-rate", type=click.FloatRange(0, min_open=True),
              help="Greatest rate [recipe].")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="The same seed trains the same model on one machine [recipe].")
@click.option("--limit", type=click.IntRange(2), help="Only the first N pictures (questions) of a training split.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where it runs [READROOM_DEVICE].")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False),
              help="Folder of the run; default: a new one in <home>/training.")  # fmt: skip
def train_vlp(device: str | None, **options: Any) -> None:
    """Train a VLP: captions of a COCO folder, or questions of VQA v2.

    \b
    Fine-tuning:   readroom train vlp --init NAME --data_dir /data
    Questions:     readroom train vlp --task vqa --init NAME --data_dir /data
    A first look:  readroom train vlp --dataset phantoms --epochs 1 --limit 300

    After each epoch a checkpoint stands in OUT/last, the one with the lowest validation loss in OUT/best. Pictures that
    cannot be read are named in OUT/skipped.jsonl, and the rest is learned; the exit status is 1 then.
    """
    from readroom.teaching import VlpOrder, teach_vlp

    settings = load_settings(**({"device": device} if device else {}))
    command = f"readroom train vlp {shlex.join(sys.argv[3:])}".strip()
    trained = teach_vlp(settings, VlpOrder(command=command, **options), click.echo)
    click.echo(f"the best checkpoint is that of epoch {trained.best.number}: {trained.folder}")
    click.echo(f"serve it:  readroom checkpoints add {shlex.quote(str(trained.folder))} --activate")
    for picture, reason in list(trained.skipped.items())[:NAMED_ITEMS]:
        click.echo(show_name(f"{picture}: {reason}"), err=True)
    if trained.skipped:
        run = trained.folder.parent
        click.echo(f"{len(trained.skipped):,} pictures could not be used: {run}/skipped.jsonl", err=True)
    sys.exit(ITEMS_FAILED if trained.skipped else 0)


@main.command()
@click.option("--model", "families", multiple=True, type=click.Choice(FAMILIES), default=FAMILIES[:1],
              show_default=True, help="Family of the model; given several times, they stand side by side.")  # fmt: skip
@click.option("--checkpoint", "checkpoints", multiple=True,
              help="One for all, or one for each --model. Default: READROOM_BLIP_MODEL, READROOM_VLP_MODEL; else on "
              "phantoms `bundled`, on other data the registry's active one.")  # fmt: skip
@click.option("--dataset", type=click.Choice(["phantoms", "coco", "vqa"]), default="phantoms", show_default=True,
              help="Held-out phantoms, captions of a COCO folder, or VQA v2.")  # fmt: skip
@click.option("--data_dir", "--data-dir", type=click.Path(path_type=Path), help="The data set [READROOM_DATA_DIR].")
@click.option("--split", help="Default val2017 of coco, val2014 of vqa.")
@click.option("--limit", type=click.IntRange(1), help="The first items only; of phantoms, films and scenes each.")
@click.option("--batch_size", "--batch-size", default=32, show_default=True, type=click.IntRange(1, 1024),
              help="Images in one forward pass.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File for all texts, JSON lines.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False),
              help="Page to write the scores into, between its markers.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def evaluate(output: Path | None, markdown: Path | None, as_json: bool, **asked: Any) -> None:
    """Score models on held-out data, side by side, each score with its 95 % interval. See docs/evaluation.md."""
    from readroom import scoring

    scoring.check_places(output, markdown)
    with evaluation_progress() as report:
        board = scoring.run_evaluation(load_settings(), scoring.Evaluation(**asked), report)
    if output:
        scoring.save_predictions(board, output)
    if markdown:
        scoring.write_markdown(board, markdown)
    print_json(board.as_json()) if as_json else print_scores(board)
    failed = board.list_failed()
    for line in failed[:NAMED_ITEMS]:
        click.echo(show_name(line), err=True)
    sys.exit(ITEMS_FAILED if failed else 0)


def print_scores(board: Scoreboard) -> None:
    """The scores as a table; into a file or pipe it is as wide as it is."""
    from readroom.scoring import list_notes, render_table

    console = terminal()
    if not console.is_terminal:
        console.width = 200
    console.print(render_table(board))
    click.echo("\n" + "\n".join(list_notes(board)))


@contextmanager
def evaluation_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each model on standard error, on a terminal only."""
    from rich.progress import Progress, TaskID

    console, bars = terminal(stderr=True), dict[str, TaskID]()
    with Progress(console=console, disable=not console.is_terminal) as progress:

        def report(label: str, done: int, total: int) -> None:
            bars[label] = bars[label] if label in bars else progress.add_task(label)
            progress.update(bars[label], completed=done, total=total)

        yield report


@main.group()
def checkpoints() -> None:
    """The registry the workers serve from."""


@checkpoints.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@with_store
def list_checkpoints(settings: Settings, store: Store, as_json: bool) -> None:
    """List the registered checkpoints."""
    from db.checkpoints import list_checkpoints as read_checkpoints

    records = read_checkpoints(store)
    if as_json:
        print_json([asdict(record) for record in records])
        return
    for record in records:
        click.echo(f"{record.state:<10} {record.family:<6} {record.ref[:24]:<24} {record.name}")
    if not records:
        click.echo("none yet: `readroom checkpoints add NAME` registers one")


@checkpoints.command("show")
@click.argument("name")
@with_store
def show_checkpoint(settings: Settings, store: Store, name: str) -> None:
    """Show one checkpoint with its manifest. NAME: its name, or the start of its ref (8 characters or more)."""
    from db.checkpoints import find_checkpoint

    record = find_checkpoint(store, name)
    if record is None:
        raise BadCall(f"no checkpoint {name} is registered", "`readroom checkpoints list` names them.")
    print_json(asdict(record))


@checkpoints.command("add")
@click.argument("source")
@click.option("--name", help="Name in the registry; default the manifest's or the folder's.")
@click.option("--activate", is_flag=True, help="Serve it: new jobs of its family use it from now on.")
@click.option("--convert", is_flag=True,
              help="SOURCE holds pickled weights (.pth, .bin, folder, hub id): its tensors are read.")  # fmt: skip
@with_store
def add_checkpoint(
    settings: Settings, store: Store, source: str, name: str | None, activate: bool, convert: bool
) -> None:
    """Register a checkpoint: `bundled`, `bundled:vlp`, a folder (copied under the home and verified), or a hub id.

    Nothing is ever unpickled, except what you convert explicitly, and then its tensors only. An original BLIP .pth
    needs the vocab.txt of bert-base-uncased beside it; an original VLP .bin that of bert-base-cased, and answers.json,
    the list of its answers, when it was trained on questions.
    """
    from readroom.registry import register_checkpoint

    record = register_checkpoint(settings, store, source, name=name, activate=activate, convert=convert)
    click.echo(f"{record.state} {record.family} {record.name} {record.ref}")


@main.command()
@click.argument("layout", type=click.Choice(["coco", "pacs", "mimic"]))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--count", default=16, show_default=True, type=click.IntRange(1), help="Pictures (coco) or studies.")
@click.option("--seed", default=0, show_default=True, help="The same seed draws the same pictures.")
def phantoms(layout: str, out: Path, count: int, seed: int) -> None:
    """Draw sample data with known truth: chest radiograph phantoms, or simple scenes in the COCO layout."""
    from training import phantoms as drawing

    writers: dict[str, Callable[..., Any]] = {
        "coco": drawing.write_coco,
        "pacs": drawing.write_pacs,
        "mimic": drawing.write_mimic,
    }
    writers[layout](out, count=count, seed=seed)
    click.echo(f"{count} drawn under {out}; try: readroom enqueue {layout} {out} --dry-run")


if __name__ == "__main__":
    main()
