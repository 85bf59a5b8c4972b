"""Many rows in one statement, fast on both dialects."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Row,
    Table,
    bindparam,
    cast,
    column,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from db.tables import ForeignJson, ForeignText

IDS_PER_STATEMENT = 5000


def insert_new(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], returning: Sequence[Column[Any]]
) -> Sequence[Row[Any]]:
    """Insert the rows that collide with none; the columns asked for of those that were inserted.

    All rows name the same columns.
    """
    if not rows:
        return []
    if connection.dialect.name == "sqlite":
        # SQLAlchemy makes few statements of many rows out of the list.
        return connection.execute(sqlite_insert(table).on_conflict_do_nothing().returning(*returning), rows).all()
    # PostgreSQL gets the list as one parameter: pg8000 and the server's parser need ten times longer for thousands.
    statement = postgres_insert(table).from_select(list(rows[0]), _select_document(table, rows))
    return connection.execute(statement.on_conflict_do_nothing().returning(*returning)).all()


def among(key: Column[int], ids: Collection[int]) -> ColumnElement[bool]:
    """`key IN (1, 2, 3)` with the numbers written out: a parameter for each costs more than the search itself."""
    return key.in_(bindparam(None, list(ids), expanding=True, literal_execute=True, unique=True))


def choose_value(key: Column[int], values: Mapping[int, int]) -> ColumnElement[int]:
    """`CASE key WHEN 1 THEN 10 WHEN 2 THEN 20 END`, for an UPDATE that gives each row another number."""
    branches = " ".join(f"WHEN {int(number)} THEN {int(value)}" for number, value in values.items())
    return literal_column(f"CASE {key.table}.{key.name} {branches} END", key.type)


def slice_ids(ids: Collection[int]) -> Iterator[list[int]]:
    """The ids, sorted and each once, in lists of a size that suits one statement."""
    ordered = sorted(set(ids))
    for start in range(0, len(ordered), IDS_PER_STATEMENT):
        yield ordered[start : start + IDS_PER_STATEMENT]


def _select_document(table: Table, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = [table.c[name] for name in rows[0]]
    cleaners = {one.name: one.type.clean for one in columns if isinstance(one.type, ForeignText | ForeignJson)}
    cleaned = [{**row, **{name: clean(row[name]) for name, clean in cleaners.items()}} for row in rows]
    typed = [column(one.name, one.type) for one in columns]
    document = func.json_to_recordset(cast(bindparam(None, cleaned, JSON, unique=True), JSON))
    source = document.table_valued(*typed, name="document").render_derived(with_types=True)
    return select(*(source.c[one.name] for one in columns))
