from __future__ import annotations

from collections import Counter, deque

import pytest

from readroom.errors import BrokerError
from readroom.messages import queue_names
from readroom.settings import load_settings
from readroom.transport import KINDS, PRIORITIES, WEIGHTS, WeightedCycle, make_celery, publish, queue_depths

QUEUES = ["caption.bulk", "caption.routine", "caption.stat"]
NOWHERE = "redis://:hush-hush@127.0.0.1:1/0"


def take_message(cycle: WeightedCycle, stock: dict[str, deque[int]]) -> str:
    """What BRPOP does: the first queue in the cycle's order that holds something gives one message."""
    for queue in cycle.consume(len(cycle.queues)):
        if stock[queue]:
            stock[queue].popleft()
            return cycle.rotate(queue)
    raise AssertionError("all queues are empty")


def make_stock(**counts: int) -> dict[str, deque[int]]:
    return {f"caption.{name}": deque(range(count)) for name, count in counts.items()}


def test_a_stat_message_is_taken_within_one_turn_of_a_bulk_backlog() -> None:
    for turns_before in range(2 * sum(WEIGHTS.values())):
        cycle = WeightedCycle()
        cycle.update(set(QUEUES))
        stock = make_stock(stat=0, routine=0, bulk=10_000)
        for _ in range(turns_before):
            take_message(cycle, stock)

        stock["caption.stat"].append(1)

        assert "caption.stat" in [take_message(cycle, stock), take_message(cycle, stock)]


def test_endless_stat_work_leaves_routine_and_bulk_their_floor() -> None:
    cycle = WeightedCycle(QUEUES)
    stock = make_stock(stat=5_000, routine=5_000, bulk=5_000)

    taken = Counter(take_message(cycle, stock) for _ in range(1_200))

    assert taken == {"caption.stat": 800, "caption.routine": 300, "caption.bulk": 100}


def test_the_turn_of_an_empty_queue_falls_to_the_most_urgent_one() -> None:
    cycle = WeightedCycle(QUEUES)
    stock = make_stock(stat=5_000, routine=0, bulk=5_000)

    taken = Counter(take_message(cycle, stock) for _ in range(1_200))

    assert taken == {"caption.stat": 1_100, "caption.bulk": 100}


def test_queues_of_one_priority_take_turns() -> None:
    cycle = WeightedCycle()
    cycle.update({"caption.stat", "answer.stat"})
    stock = {"caption.stat": deque(range(10)), "answer.stat": deque(range(10))}

    assert Counter(take_message(cycle, stock) for _ in range(10)) == {"caption.stat": 5, "answer.stat": 5}


def test_a_queue_of_an_unknown_priority_comes_last() -> None:
    cycle = WeightedCycle(["odd", *QUEUES])

    assert cycle.consume(4)[-1] == "odd"


def test_the_application_is_stock_celery_that_reads_json_only() -> None:
    app = make_celery(load_settings(), NOWHERE)

    assert app.conf.accept_content == ["json"]
    assert app.conf.task_acks_late and app.conf.task_ignore_result
    assert app.conf.worker_prefetch_multiplier == 1
    assert not app.conf.task_create_missing_queues
    assert {queue.name for queue in app.conf.task_queues} == set(queue_names(KINDS, PRIORITIES))
    assert app.conf.task_default_queue in {queue.name for queue in app.conf.task_queues}


def test_a_broker_that_is_away_is_reported_without_its_password() -> None:
    app = make_celery(load_settings(), NOWHERE)

    for call in (lambda: queue_depths(app), lambda: publish(app, "caption", "stat", [1], 1)):
        with pytest.raises(BrokerError) as caught:
            call()
        assert "hush-hush" not in str(caught.value)
        assert "127.0.0.1" not in str(caught.value)
