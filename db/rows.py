"""Many rows in one statement, fast on both dialects."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    Connection,
    Row,
    Table,
    bindparam,
    cast,
    column,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

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


class ListedIds(FunctionElement[int]):
    """A subquery of the ids in a JSON array that is one parameter: the statement is compiled once for all lists."""

    inherit_cache = True
    type = BigInteger()


class AssignedValue(FunctionElement[int]):
    """What a JSON object that is one parameter has for a key: an UPDATE gives each row another value with it."""

    inherit_cache = True
    type = BigInteger()


def among(key: Column[int], ids: Collection[int]) -> ColumnElement[bool]:
    """`key IN (...)`, whatever the number of ids."""
    return key.bool_op("IN")(ListedIds(_as_document(list(ids))))


def choose_value(key: Column[int], values: Mapping[int, int]) -> ColumnElement[int]:
    """The value that the mapping has for the row's key."""
    return AssignedValue(key, _as_document({str(number): value for number, value in values.items()}))


def _as_document(value: Any) -> BindParameter[Any]:
    return bindparam(None, value, JSON, unique=True)


@compiles(ListedIds, "sqlite")
def _list_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return f"(SELECT value FROM json_each({compiler.process(element.clauses, **options)}))"  # noqa: S608 - a placeholder


@compiles(ListedIds, "postgresql")
def _list_postgres(element: Any, compiler: Any, **options: Any) -> str:
    document = compiler.process(element.clauses, **options)
    return f"(SELECT CAST(value AS BIGINT) FROM json_array_elements_text({document}))"  # noqa: S608 - a placeholder


@compiles(AssignedValue, "sqlite")
def _assign_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    key, document = (compiler.process(part, **options) for part in element.clauses)
    return f"json_extract({document}, '$.\"' || {key} || '\"')"


@compiles(AssignedValue, "postgresql")
def _assign_postgres(element: Any, compiler: Any, **options: Any) -> str:
    key, document = (compiler.process(part, **options) for part in element.clauses)
    return f"CAST(CAST({document} AS JSONB) ->> CAST({key} AS TEXT) AS BIGINT)"


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
