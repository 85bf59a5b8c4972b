"""Machines whose clocks differ share one store: leases are judged by the server's clock alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import event

from db.jobs import claim_jobs, renew_leases, return_expired
from db.session import Store, open_store
from readroom.errors import StoreUnavailable
from tests.fakes.items import add_jobs, read_columns, set_columns

SKEW_S = 125.0


class Clock:
    """This machine's clock, set wrongly by some seconds."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def open_skewed(postgres_store: Store, postgres_tables: str) -> Iterator[Callable[[Clock], Store]]:
    opened: list[Store] = []

    def open_another(clock: Clock) -> Store:
        opened.append(open_store(postgres_tables, create=False, clock=clock))
        return opened[-1]

    yield open_another
    for store in opened:
        store.close()


@pytest.mark.parametrize("ahead_s", [SKEW_S, -SKEW_S])
def test_the_jobs_of_a_living_worker_stay_its_own_whatever_another_machines_clock_says(
    postgres_store: Store, open_skewed: Callable[[Clock], Store], ahead_s: float
) -> None:
    ids = add_jobs(postgres_store, 3)
    others = open_skewed(Clock(ahead_s))
    claim_jobs(postgres_store, ids[:2], "here", 120)
    claim_jobs(others, ids[2:], "there", 120)
    for judge in (postgres_store, others):
        assert renew_leases(postgres_store, ids, "here", 120) == 2
        assert renew_leases(others, ids, "there", 120) == 1
        assert return_expired(judge, 1) == ([], [])
    leases = [read_columns(postgres_store, job).lease_until for job in ids]
    assert max(leases) - min(leases) < 60
    set_columns(postgres_store, ids[:1], lease_until=time.time() - 1)
    assert return_expired(others, 3) == (ids[:1], [])


def test_a_clock_that_is_set_while_the_store_is_open_changes_nothing(
    postgres_store: Store, open_skewed: Callable[[Clock], Store]
) -> None:
    clock = Clock()
    others = open_skewed(clock)
    assert abs(others.now() - time.time()) < 1
    clock.ahead_s = SKEW_S
    assert abs(others.now() - time.time()) < 1


def test_the_server_is_asked_for_the_time_once_in_ten_minutes(
    postgres_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    event.listen(postgres_store._engine, "before_cursor_execute", lambda *facts: asked.append(facts[2]))
    for _ in range(3):
        postgres_store.now()
    assert len(asked) == 2
    monkeypatch.setattr("db.session.CLOCK_LIFE_S", -1.0)
    postgres_store.now()
    assert len(asked) == 4
    assert all("clock_timestamp" in statement for statement in asked)


def test_a_server_that_cannot_be_asked_is_unavailable() -> None:
    store = Store("postgresql://readroom@127.0.0.1:1/readroom")
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.now()


def test_sqlite_has_this_machines_clock_and_asks_nobody(sqlite_store: Store) -> None:
    asked: list[str] = []
    event.listen(sqlite_store._engine, "before_cursor_execute", lambda *facts: asked.append(facts[2]))
    assert abs(sqlite_store.now() - time.time()) < 1
    assert asked == []
