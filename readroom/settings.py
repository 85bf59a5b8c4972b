"""Every setting, once: type, meaning, unit and default. docs/configuration.md is generated from this file.

Values come from `READROOM_*` environment variables or a `.env` file in the working folder. A secret may instead stand
in a file named by the same variable with `_FILE` behind it (as Docker secrets do).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from readroom.errors import SettingsError

PREFIX = "READROOM_"
SECRET_SETTINGS = ("broker_url", "database_url", "broker_password", "flower_password")
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
        None, description="SQL store, `postgresql://user:password@host/readroom`. Unset: SQLite under the home."
    )
    broker_password: SecretStr | None = Field(
        None, description="Password of the compose stack's Valkey. The embedded Valkey makes its own."
    )
    data_dir: Path | None = Field(None, description="Folder that holds data sets (`coco2017`, `mimic-cxr`).")

    blip_model: str | None = Field(
        None,
        description="BLIP captioner: `bundled`, `dummy`, a folder or a hub id. Unset: the active checkpoint of the "
        "registry, else `Salesforce/blip-image-captioning-base`.",
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

    @property
    def home_dir(self) -> Path:
        """The home with `~` expanded; not created here."""
        return self.home.expanduser()


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from environment, `_FILE` secrets and `.env`; `overrides` win.

    Raises SettingsError naming each wrong variable, never its value.
    """
    try:
        return Settings(**{**_read_secret_files(), **overrides})
    except ValidationError as error:
        raise SettingsError(_explain(error), "See docs/configuration.md.") from None


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
