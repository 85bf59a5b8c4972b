"""Results of a submission as JSON lines, CSV or Parquet, streamed: memory does not grow with the submission."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from readroom.errors import BadCall

if TYPE_CHECKING:
    from db.results import ResultRecord

ROWS_PER_GROUP = 5_000  # a Parquet row group of about 5 MB
FORMATS = ("jsonl", "csv", "parquet")


def list_columns() -> list[str]:
    """The columns of an export, in order."""
    from dataclasses import fields

    from db.results import ResultRecord

    return [field.name for field in fields(ResultRecord)]


@contextmanager
def open_output(path: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that only its owner can read: the records name studies. Raises BadCall."""
    try:
        if path is None:
            yield sys.stdout
            sys.stdout.flush()
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as out:
                yield out
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadCall(f"the output cannot be written ({error.strerror})", "Choose another file with -o.") from None


def write_jsonl(records: Iterable[ResultRecord], out: IO[str]) -> int:
    """One JSON object a line; returns the number of lines."""
    count = 0
    for count, record in enumerate(records, start=1):  # noqa: B007 - the count outlives the loop
        out.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    return count


def write_csv(records: Iterable[ResultRecord], out: IO[str]) -> int:
    """CSV with a header line; returns the number of records.

    Texts that a spreadsheet would run as a formula are quoted with an apostrophe (OWASP, CSV injection).
    """
    writer = csv.DictWriter(out, list_columns())
    writer.writeheader()
    count = 0
    for count, record in enumerate(records, start=1):  # noqa: B007
        writer.writerow({name: defuse_cell(value) for name, value in asdict(record).items()})
    return count


def defuse_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def write_parquet(records: Iterable[ResultRecord], path: Path) -> int:
    """Parquet in row groups of `ROWS_PER_GROUP`; returns the number of records.

    Raises BadCall when pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadCall("Parquet needs pyarrow", "pip install 'readroom[parquet]', or use --format jsonl.") from None
    schema = parquet_schema(pyarrow)
    count = 0
    with open_output(path) as out, parquet.ParquetWriter(out.buffer, schema) as writer:  # type: ignore[attr-defined]
        for rows in group_rows(records):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def parquet_schema(pyarrow: Any) -> Any:
    """Column types: the same for every file, also when a whole column is empty."""
    kinds = {
        "job": pyarrow.int64(),
        "frame": pyarrow.int64(),
        "score": pyarrow.float64(),
        "created_at": pyarrow.float64(),
        "model_ms": pyarrow.float64(),
    }
    return pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in list_columns()])


def group_rows(records: Iterable[ResultRecord]) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most `ROWS_PER_GROUP` plain rows."""
    remaining = iter(records)
    while group := [asdict(record) for record in islice(remaining, ROWS_PER_GROUP)]:
        yield group
