"""The only place that knows broker options: the Celery application, publishing, queue depths.

Foreign errors (kombu, redis, sockets) leave this file as BrokerError, whose text holds no URL and no password.
docs/decisions/ says why each option is as it is; the figures were measured with Celery 5.7 and kombu 5.7.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from celery import Celery
from celery.utils import uuid
from kombu import Exchange, Queue
from kombu.exceptions import KombuError
from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from readroom.errors import BadCall, BrokerError
from readroom.messages import JobMessage, pack_messages, parse_payload, queue_name, queue_names
from readroom.records import JobKind, Priority
from readroom.settings import Settings

APP_NAME = "readroom"
KINDS: tuple[str, ...] = tuple(JobKind)
PRIORITIES: tuple[str, ...] = (Priority.STAT, Priority.ROUTINE, Priority.BULK)
DEFAULT_QUEUE = queue_name(JobKind.CAPTION, Priority.ROUTINE)

# Of 12 messages taken while all queues hold some, 8 are stat, 3 routine, 1 bulk: urgent first, and nobody starves.
WEIGHTS: dict[str, int] = {Priority.STAT: 8, Priority.ROUTINE: 3, Priority.BULK: 1}
SOCKET_TIMEOUT_S = 5.0
# Redis has no redelivery of its own: a worker looks for messages past their visibility timeout this often.
RESTORE_INTERVAL_S = 10


def spread_turns(weights: dict[str, int]) -> list[str]:
    """One round of turns in which each name comes up `weight` times, spread evenly (smooth weighted round robin)."""
    credit = dict.fromkeys(weights, 0)
    turns = []
    for _ in range(sum(weights.values())):
        credit = {name: value + weights[name] for name, value in credit.items()}
        chosen = max(credit, key=lambda name: credit[name])
        credit[chosen] -= sum(weights.values())
        turns.append(chosen)
    return turns


class WeightedCycle:
    """The order in which a worker looks at its queues; kombu asks before each fetch (`queue_order_strategy`).

    The priority whose turn it is comes first, the others follow by urgency; a turn ends when a message was taken. An
    empty queue's turn so falls to the most urgent one that holds something. Queues of one priority take turns.
    """

    TURNS = spread_turns(WEIGHTS)

    def __init__(self, queues: Iterable[str] = ()) -> None:
        self.queues = list(queues)
        self.turn = 0

    def update(self, queues: Iterable[str]) -> None:
        """Take over the worker's present queues."""
        self.queues[:] = sorted(queues)

    def consume(self, count: int) -> list[str]:
        """The first `count` queues in the order of this turn."""
        leader = self.TURNS[self.turn % len(self.TURNS)]
        return sorted(self.queues, key=lambda queue: _rank_queue(queue, leader))[:count]

    def rotate(self, last_used: str) -> str:
        """A message was taken from `last_used`: the next turn begins."""
        self.turn += 1
        if last_used in self.queues:
            self.queues.remove(last_used)
            self.queues.append(last_used)
        return last_used


def make_celery(settings: Settings, broker_url: str) -> Celery:
    """The Celery application of producers, workers and Flower: stock Celery, JSON only, results in SQL only."""
    app = Celery(APP_NAME, broker=broker_url, set_as_current=False)
    app.conf.update(
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in queue_names(KINDS, PRIORITIES)],
        task_default_queue=DEFAULT_QUEUE,
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        # A worker holds as many messages as it has threads, not more: what waits elsewhere another worker can take.
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_concurrency=settings.concurrency,
        # After a lost connection the claim on the row, not the prefetch count, keeps work from running twice.
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=True,
        task_send_sent_event=False,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1.0},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport_options(settings),
    )
    return app


def transport_options(settings: Settings) -> dict[str, Any]:
    """Options of kombu's Redis transport."""
    return {
        "visibility_timeout": settings.visibility_timeout_s,
        # With kombu's default throttle of 10 the check runs every 100 s and a short timeout has no effect.
        "unacked_restore_interval": min(RESTORE_INTERVAL_S, max(1, settings.visibility_timeout_s // 5)),
        "unacked_restore_throttle": 1,
        "queue_order_strategy": f"{__name__}:{WeightedCycle.__name__}",
        "priority_steps": [0],
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "socket_keepalive": True,
        "client_name": APP_NAME,
    }


def task_name(kind: str) -> str:
    """The explicit name of the task that runs one kind of job."""
    return f"{APP_NAME}.{kind}"


def publish(app: Celery, kind: str, priority: str, job_ids: Iterable[int], ids_per_message: int) -> int:
    """Put job ids on the queue of their kind and priority, over one connection; the number of messages sent.

    Raises BrokerError; messages sent before it stay sent (a message twice is harmless, see docs/how-it-works.md).
    """
    count = 0
    with broker_errors(), app.producer_or_acquire() as producer:
        for message in pack_messages(JobKind(kind), job_ids, ids_per_message):
            _send_message(app, producer, message, queue_name(kind, priority))
            count += 1
    return count


def queue_depths(source: Celery | str, queues: Sequence[str] | None = None) -> dict[str, int]:
    """Messages waiting on each queue (default: all of ours), most urgent first. `source` is an app or a broker URL."""
    names = list(queues) if queues is not None else queue_names(KINDS, PRIORITIES)
    with broker_errors():
        pipe = redis_client(source).pipeline(transaction=False)
        for name in names:
            pipe.llen(name)
        return dict(zip(names, pipe.execute(), strict=True))


def peek_jobs(source: Celery | str, queue: str, messages: int) -> list[int]:
    """Job ids of the `messages` that are taken next from a queue; what is no message of ours is passed over.

    kombu puts messages in on the left and takes them out on the right; one that is given back returns to the right.
    """
    with broker_errors():
        texts = redis_client(source).lrange(queue, -messages, -1)
    return [job_id for text in texts for job_id in _read_job_ids(text)]


def redis_client(source: Celery | str) -> Redis:
    """A client for the broker's own keys; one per URL and process. Use it inside `broker_errors()`."""
    return _connect(source if isinstance(source, str) else str(source.conf.broker_url))


def check_broker(source: Celery | str) -> None:
    """Raise BrokerError unless the broker answers."""
    with broker_errors():
        redis_client(source).ping()


def ping_workers(app: Celery, timeout_s: float = 1.0) -> int:
    """How many workers answer within `timeout_s`. Raises BrokerError."""
    with broker_errors():
        return len(app.control.ping(timeout=timeout_s) or [])


@contextmanager
def broker_errors() -> Iterator[None]:
    """Turn errors of kombu, redis and sockets into BrokerError, without their texts (they may quote the URL)."""
    try:
        yield
    except AuthenticationError as error:
        raise BrokerError("the broker refuses the password", "Check READROOM_BROKER_URL.") from error
    except (KombuError, RedisError, OSError) as error:
        if _innermost_name(error) == AuthenticationError.__name__:  # kombu wraps it
            raise BrokerError("the broker refuses the password", "Check READROOM_BROKER_URL.") from error
        raise BrokerError(f"the broker does not answer ({_innermost_name(error)})", "Is Valkey running?") from error


def _send_message(app: Celery, producer: Any, message: JobMessage, queue: str) -> None:
    """What `send_task` does, without its second copy of every option in the message's properties."""
    name = task_name(message.kind)
    task = app.amqp.create_task_message(
        uuid(),
        name,
        args=(message.as_payload(),),
        ignore_result=True,
        argsrepr=message.describe(),
        kwargsrepr="",
        origin=APP_NAME,  # Celery would put this machine's name and process id here
    )
    app.amqp.send_task_message(producer, name, task, queue=queue)


def _read_job_ids(text: str | bytes) -> tuple[int, ...]:
    try:
        arguments, *_ = json.loads(base64.b64decode(json.loads(text)["body"]))
        return parse_payload(arguments[0]).job_ids
    except (BadCall, ValueError, TypeError, LookupError, RecursionError):
        return ()


@lru_cache(maxsize=8)
def _connect(url: str) -> Redis:
    return Redis.from_url(
        url,
        decode_responses=True,
        encoding_errors="replace",  # anybody with the password may have put anything there
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        client_name=APP_NAME,
    )


def _rank_queue(queue: str, leader: str) -> tuple[bool, int]:
    priority = queue.rpartition(".")[2]
    urgency = PRIORITIES.index(priority) if priority in PRIORITIES else len(PRIORITIES)
    return priority != leader, urgency


def _innermost_name(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
