"""Every error Readroom raises on purpose.

    ReadroomError
    ├── BadCall                 a command or function was called wrongly (exit status 2)
    ├── SettingsError           the configuration cannot be used
    ├── ItemError               one item cannot be processed; the rest goes on
    │   ├── ImageError          its picture cannot be had
    │   └── SourceError         its place in an export, archive or data set is wrong
    ├── CheckpointError         weights cannot be used
    │   ├── CheckpointMissing   not found under that name
    │   └── CheckpointBroken    found, but not what its manifest says
    ├── StoreError              the SQL store refuses
    │   └── StoreUnavailable    it does not answer, is busy or full just now; the same call may pass later
    ├── BrokerError             Redis/Valkey does not answer or refuses
    └── EngineError             a model run went wrong
        ├── OutOfMemory         the batch was too large for the device
        ├── DeviceBroken        the device is lost; only a new process helps
        └── LossNotFinite       training went astray

Foreign errors are translated at the edge where they appear. No text of these errors may hold a path, a name, an
identifier or any other value that came out of a patient's file: they travel to logs.
"""

from __future__ import annotations


class ReadroomError(Exception):
    """Readroom could not do what was asked."""

    remedy: str

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}. {self.remedy}" if self.remedy else message


class BadCall(ReadroomError):
    """A command or function was called with arguments that make no sense."""


class SettingsError(ReadroomError):
    """A setting is missing, malformed or unsafe."""


class ItemError(ReadroomError):
    """One item cannot be processed; the others are not concerned.

    `reason` is a code of `readroom.records.Reason` (a short lower-case word that users filter by); `detail` says more
    in words that name no patient.
    """

    def __init__(self, reason: str, detail: str = "", remedy: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason, remedy)
        self.reason = str(reason)
        self.detail = detail


class ImageError(ItemError):
    """A picture cannot be decoded, is too large, or is not a picture."""


class SourceError(ItemError):
    """An entry of an export, archive or annotation file cannot be used."""


class CheckpointError(ReadroomError):
    """A checkpoint cannot be used."""


class CheckpointMissing(CheckpointError):
    """No checkpoint is known under that name, folder or hub id."""


class CheckpointBroken(CheckpointError):
    """A checkpoint's files are not what its manifest says."""


class StoreError(ReadroomError):
    """The SQL store does not answer, is full, or refuses a write."""


class StoreUnavailable(StoreError):
    """The SQL store is busy, full, restarting or out of reach; the same call may succeed later."""


class BrokerError(ReadroomError):
    """Redis or Valkey does not answer or refuses a command."""


class EngineError(ReadroomError):
    """A model run failed."""


class OutOfMemory(EngineError):
    """The device had too little memory for a batch; a smaller one may pass."""


class DeviceBroken(EngineError):
    """The device is in a state that only a new process can leave."""


class LossNotFinite(EngineError):
    """The training loss became infinite or not a number; the run stops and publishes nothing."""
