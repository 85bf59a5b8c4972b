from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from readroom import broker
from readroom.errors import BrokerError
from readroom.messages import JobMessage, parse_payload
from readroom.records import JobKind
from readroom.settings import MAX_IDS_PER_MESSAGE, load_settings
from readroom.transport import make_celery, publish, queue_depths, redis_client
from tests.fakes.plant import wait_until
from tests.fakes.queue import read_payloads

START = "import sys; from pathlib import Path; from readroom.broker import start_broker; " + (
    "h = start_broker(Path(sys.argv[1])); print(h.pid, h.port)"
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    broker.stop_broker(tmp_path)


def test_processes_that_race_start_one_broker(home: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", START, str(home)], stdout=subprocess.PIPE, text=True) for _ in range(5)
    ]
    answers = {racer.communicate(timeout=60)[0] for racer in racers}

    assert len(answers) == 1
    assert broker.start_broker(home).pid == int(answers.pop().split()[0])


def test_the_broker_asks_for_a_password_that_only_the_owner_can_read(home: Path) -> None:
    handle = broker.start_broker(home)

    with pytest.raises(AuthenticationError):
        Redis(port=handle.port, retry=broker.ONCE).ping()
    for name in ("password", "valkey.conf"):
        assert stat.S_IMODE((home / "broker" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "broker").stat().st_mode) == 0o700


def test_the_broker_listens_on_loopback_only(home: Path) -> None:
    handle = broker.start_broker(home)

    assert Redis.from_url(handle.url).config_get("bind") == {"bind": "127.0.0.1"}


def test_messages_survive_a_restart_on_the_same_port(home: Path) -> None:
    before = broker.start_broker(home)
    Redis.from_url(before.url).lpush("caption.bulk", "message")

    assert broker.stop_broker(home)
    after = broker.start_broker(home)

    assert (after.port, after.url) == (before.port, before.url)
    assert Redis.from_url(after.url).llen("caption.bulk") == 1


def test_messages_survive_a_killed_broker(home: Path) -> None:
    before = broker.start_broker(home)
    client = Redis.from_url(before.url)
    client.lpush("caption.bulk", "message")
    client.execute_command("WAITAOF", 1, 0, 5000)  # the append-only file is written each second

    os.kill(before.pid, signal.SIGKILL)
    after = broker.start_broker(home)

    assert after.pid != before.pid
    assert after.port == before.port
    assert Redis.from_url(after.url).llen("caption.bulk") == 1


def test_a_pid_file_of_another_process_is_no_broker(home: Path) -> None:
    handle = broker.start_broker(home)
    broker.stop_broker(home)
    (home / "broker" / "pid").write_text(str(os.getpid()))

    assert broker.find_broker(home) is None
    assert not broker.stop_broker(home)
    assert broker.start_broker(home).port == handle.port


def test_a_port_taken_by_somebody_else_is_given_up(home: Path) -> None:
    port = broker.start_broker(home).port
    broker.stop_broker(home)

    with socket.create_server(("127.0.0.1", port)):
        assert broker.start_broker(home).port != port


def test_a_server_that_does_not_answer_is_not_left_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    monkeypatch.setattr(broker, "_wait_ready", lambda handle, patience_s: launched.append(handle.pid))

    with pytest.raises(BrokerError, match="does not start"):
        broker.start_broker(home)
    monkeypatch.undo()

    assert len(launched) == broker.PORT_TRIES
    wait_until(lambda: not any(broker._is_server(pid) for pid in launched), "the end of all servers")


def test_a_silent_server_ends_before_another_one_writes_its_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "SILENCE_S", 0.3)
    monkeypatch.setattr(broker, "STOP_TIMEOUT_S", 0.3)
    silent = broker.start_broker(home)
    os.kill(silent.pid, signal.SIGSTOP)

    after = broker.start_broker(home)

    assert after.pid != silent.pid
    assert not broker._is_server(silent.pid)
    assert after.port == silent.port


def test_a_home_with_an_odd_name_has_a_broker(home: Path) -> None:
    odd = home / 'a "b" \\ ü c'
    try:
        handle = broker.start_broker(odd)
        assert broker.find_broker(odd) == handle
        assert (odd / "broker" / "valkey.log").is_file()
        assert (odd / "broker" / "appendonlydir").is_dir()
    finally:
        broker.stop_broker(odd)


def test_the_broker_of_another_home_is_not_stopped(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    handle = broker.start_broker(other)
    (home / "broker").mkdir()
    (home / "broker" / "pid").write_text(str(handle.pid))
    try:
        assert not broker.stop_broker(home)
        assert broker.find_broker(other) == handle
    finally:
        broker.stop_broker(other)


def test_a_broker_that_must_not_be_started_is_reported_missing(home: Path) -> None:
    with pytest.raises(BrokerError, match="readroom up"):
        broker.broker_url(load_settings(home=home), start=False)


def test_a_configured_broker_is_never_replaced_by_the_embedded_one(home: Path) -> None:
    url = "redis://:word@broker.example:6379/0"

    assert broker.broker_url(load_settings(home=home, broker_url=url)) == url
    assert not (home / "broker").exists()


def test_published_messages_hold_the_ids_in_order_and_stay_small(home: Path) -> None:
    app = make_celery(load_settings(home=home), broker.start_broker(home).url)
    first_id = 7_000_000_000

    count = publish(app, "caption", "bulk", range(first_id, first_id + 50), MAX_IDS_PER_MESSAGE)

    assert count == queue_depths(app)["caption.bulk"] == 2
    payloads = [parse_payload(payload) for payload in read_payloads(app, "caption.bulk")]
    assert payloads == [
        JobMessage(JobKind.CAPTION, tuple(range(first_id, first_id + MAX_IDS_PER_MESSAGE))),
        JobMessage(JobKind.CAPTION, tuple(range(first_id + MAX_IDS_PER_MESSAGE, first_id + 50))),
    ]
    assert all(len(raw) < 2_000 for raw in redis_client(app).lrange("caption.bulk", 0, -1))


def test_a_message_does_not_name_the_machine_it_comes_from(home: Path) -> None:
    app = make_celery(load_settings(home=home), broker.start_broker(home).url)

    publish(app, "caption", "stat", [1], 1)

    (raw,) = redis_client(app).lrange("caption.stat", 0, -1)
    assert socket.gethostname() not in raw
    assert str(os.getpid()) not in raw.replace('"id": ', "").split('"origin"')[1]


def test_publishing_works_again_after_redis_was_emptied(home: Path) -> None:
    app = make_celery(load_settings(home=home), broker.start_broker(home).url)
    publish(app, "caption", "stat", [1], 1)

    redis_client(app).flushall()
    publish(app, "caption", "stat", [2], 1)

    assert [payload["jobs"] for payload in read_payloads(app, "caption.stat")] == [[2]]
