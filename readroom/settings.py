"""Every setting, once: type, meaning, unit and default. docs/configuration.md is generated from this file.

Values come from `READROOM_*` environment variables or a `.env` file in the working folder. A secret may instead stand
in a file named by the same variable with `_FILE` behind it (as Docker secrets do).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from readroom.errors import SettingsError

PREFIX = "READROOM_"
SECRET_SETTINGS = ("broker_url", "database_url", "broker_password", "flower_password")
BROKER_SCHEMES = ("redis", "rediss", "redis+socket")
DATABASE_SCHEMES = ("postgresql", "postgres", "sqlite")
MEBIBYTE = 1024 * 1024
# 32 ids of 10 digits are 384 bytes of JSON, 512 in base64, 352 once more in Celery's description of the arguments;
# with 0.9 kB of headers a message stays below 2 kB.
MAX_IDS_PER_MESSAGE = 32


class Settings(BaseSettings):
    """What an installation of Readroom can be told."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    home: Path = Field(Path("~/.readroom"), description="Folder of all local state: store, broker, checkpoints, logs.")
    broker_url: SecretStr | None = Field(
        None, description="Redis or Valkey, `redis://:password@host:6379/0`. Unset: an embedded Valkey under the home."
    )
    database_url: SecretStr | None = Field(
        None,
        description="SQL store, `postgresql://user:password@host/readroom?sslmode=verify-full`. Unset: SQLite under "
        "the home.",
    )
    broker_password: SecretStr | None = Field(
        None, description="Password of the compose stack's Valkey. The embedded Valkey makes its own."
    )
    data_dir: Path | None = Field(None, description="Folder that holds data sets (`coco2017`, `mimic-cxr`).")

    blip_model: str | None = Field(
        None,
        description="BLIP captioner: a registered name, `bundled`, `dummy`, a folder or a hub id. Unset: the active "
        "checkpoint of the registry, else `Salesforce/blip-image-captioning-base`.",
    )
    vlp_model: str | None = Field(
        None,
        description="VLP captioner: a registered name, `bundled`, `dummy` or a folder. Unset: the active checkpoint of "
        "the registry. There is no VLP on any hub, so without both `--captioner vlp` says what to do.",
    )
    region_dir: Path | None = Field(
        None,
        description="Folder of region features that were computed beforehand, as VLP's authors released them "
        "(`region_feat_gvd_wo_bgd`). Only VLP checkpoints that read such features need it.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="Number format of the models' weights.")
    num_beams: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="Beams of the search. Unset: what the checkpoint's manifest says."
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=512)] | None = Field(
        None, description="Longest caption, tokens. Unset: what the checkpoint's manifest says."
    )
    max_loaded_models: int = Field(2, ge=1, le=16, description="Checkpoints a worker keeps in memory at once.")

    max_batch: int = Field(32, ge=1, le=1024, description="Images in one forward pass, at most.")
    batch_wait_ms: float = Field(50.0, ge=0, le=10_000, description="Longest wait for a batch to fill, milliseconds.")
    ids_per_message: int = Field(16, ge=1, le=MAX_IDS_PER_MESSAGE, description="Job ids in one message.")
    concurrency: int = Field(24, ge=1, le=256, description="Messages a worker holds in hand (threads).")
    decoder_processes: int = Field(2, ge=1, le=64, description="Child processes that decode images for a worker.")
    decoder_timeout_s: float = Field(60.0, gt=0, description="Longest time to decode one image, seconds.")
    decoder_memory_mb: int = Field(4096, ge=256, description="Address space of a decoding process, MiB.")

    lease_s: float = Field(120.0, gt=0, description="How long a claimed job stays claimed without renewal, seconds.")
    max_attempts: int = Field(3, ge=1, le=20, description="Attempts before a job becomes a dead letter.")
    batch_deadline_s: float = Field(900.0, gt=0, description="Longest forward pass before the worker exits, seconds.")
    stall_s: float = Field(120.0, gt=0, description="Idle time with work waiting before a worker exits, seconds.")
    rescue_interval_s: float = Field(15.0, gt=0, description="Time between two rounds of repair, seconds.")
    publish_grace_s: float = Field(
        60.0, gt=0, description="Age at which a queued job that no message holds is published again, seconds."
    )
    max_queue_depth: int = Field(20_000, ge=1, description="Messages on a queue at which its producers pause.")
    visibility_timeout_s: int = Field(3600, ge=5, description="Age at which Redis gives a message out again, seconds.")

    max_file_mb: int = Field(512, ge=1, description="Largest image file, MiB.")
    max_pixels: int = Field(120_000_000, ge=1, description="Largest picture, pixels over all frames.")
    max_archive_entries: int = Field(200_000, ge=1, description="Entries an archive may have.")
    max_archive_mb: int = Field(200_000, ge=1, description="Expanded size an archive may have, MiB.")
    max_archive_ratio: int = Field(200, ge=2, description="Expansion of one archive entry, times.")

    flower_host: str = Field("127.0.0.1", description="Address Flower listens on.")
    flower_port: int = Field(5555, ge=1, le=65535, description="Port Flower listens on.")
    flower_user: str = Field("readroom", description="User name for Flower.")
    flower_password: SecretStr | None = Field(None, description="Password for Flower. Unset: made at the first `up`.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")

    @field_validator("broker_url")
    @classmethod
    def check_broker_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Raise ValueError unless it is an address of Redis or Valkey; its text stays out of the message."""
        if value is not None and not _is_address(value, BROKER_SCHEMES):
            raise ValueError("an address like redis://:password@host:6379/0 (redis, rediss or redis+socket) is needed")
        return value

    @field_validator("database_url")
    @classmethod
    def check_database_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Raise ValueError unless it is an address of PostgreSQL or SQLite; its text stays out of the message."""
        if value is not None and not _is_address(value, DATABASE_SCHEMES, with_path=True):
            raise ValueError("an address like postgresql://user:password@host/database or sqlite:////path is needed")
        return value

    @field_validator("region_dir")
    @classmethod
    def expand_region_dir(cls, value: Path | None) -> Path | None:
        """The folder with `~` expanded, which no shell does for a line of `.env`."""
        return value.expanduser() if value is not None else None

    @property
    def home_dir(self) -> Path:
        """The home with `~` expanded; not created here."""
        return self.home.expanduser()

    def name_model(self, family: str) -> str | None:
        """The captioner that a family's setting names; None when it is unset."""
        return {"blip": self.blip_model, "vlp": self.vlp_model}[family] or None


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from environment, `_FILE` secrets and `.env`; `overrides` win.

    Raises SettingsError naming each wrong variable, never its value; also for a `.env` of another user.
    """
    _refuse_foreign_dotenv()
    try:
        return Settings(**{**_read_secret_files(), **overrides})
    except ValidationError as error:
        raise SettingsError(_explain(error), "See docs/configuration.md.") from None


def list_unknown() -> list[str]:
    """READROOM_ variables that mean nothing: typing errors, most likely."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    known |= {f"{PREFIX}{name.upper()}_FILE" for name in SECRET_SETTINGS}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def find_dotenv() -> Path | None:
    """The `.env` file that is read, if there is one."""
    path = Path(str(Settings.model_config.get("env_file") or ""))
    return path.resolve() if path.is_file() else None


def _refuse_foreign_dotenv() -> None:
    # Whoever works inside a folder that others fill (an export, a medium) must not take its store or broker from it.
    path = find_dotenv()
    if path is not None and path.stat().st_uid not in (0, os.geteuid()):
        raise SettingsError("the .env file here belongs to another user", "Work in another folder, or remove it.")


def _is_address(value: SecretStr, schemes: tuple[str, ...], with_path: bool = False) -> bool:
    try:
        parts = urlsplit(value.get_secret_value())
        scheme = parts.scheme if parts.scheme in schemes else parts.scheme.partition("+")[0]
        _ = parts.port  # raises ValueError beyond 65535
    except ValueError:
        return False
    return scheme in schemes and (not with_path or len(parts.path) > 1)


def _read_secret_files() -> dict[str, str]:
    found = {}
    for name in SECRET_SETTINGS:
        path = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
        if path:
            found[name] = _read_secret(name, Path(path))
    return found


def _read_secret(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{PREFIX}{name.upper()}_FILE cannot be read ({type(error).__name__})") from None


def _explain(error: ValidationError) -> str:
    lines = [f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors(include_input=False)]
    return "wrong settings: " + "; ".join(lines)
