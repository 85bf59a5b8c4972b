"""A real Flower beside a real worker: every message's task with its state and run time, and nothing about anybody."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.plant import Plant, name_settings, wait_until

MESSAGES = 25
ARGUMENTS = re.compile(r"caption jobs [0-9,]+")


class FlowerProcess:
    """`readroom flower` on a free port of loopback."""

    def __init__(self, plant: Plant) -> None:
        self.log_path = plant.home / "flower.log"
        self.port = find_port()
        environment = {
            **os.environ,
            **name_settings(plant.settings),
            "READROOM_FLOWER_PORT": str(self.port),
            "READROOM_FLOWER_USER": "reader",
            "READROOM_FLOWER_PASSWORD": "a-password-of-the-test",
        }
        with self.log_path.open("wb") as log:
            command = [sys.executable, "-m", "readroom.cli", "flower"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def fetch(self, path: str, password: str = "a-password-of-the-test") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        token = base64.b64encode(f"reader:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log_path.read_text()
        try:
            return bool(self.fetch("/api/task/types") is not None)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    plant = Plant(tmp_path / "home")
    yield plant
    plant.close()


@pytest.fixture
def flower(plant: Plant) -> Iterator[FlowerProcess]:
    flower = FlowerProcess(plant)
    yield flower
    flower.close()


def test_flower_shows_each_message_with_state_and_run_time_and_only_ids(plant: Plant, flower: FlowerProcess) -> None:
    wait_until(flower.is_up, "Flower's start")
    worker = plant.start_worker(trouble="slow:0.01")
    worker.wait_ready()
    wait_until(lambda: flower.fetch("/api/workers?status=true"), "the worker in Flower")
    ids = plant.enqueue(range(1, MESSAGES * plant.settings.ids_per_message + 1))
    plant.wait_final(len(ids))
    wait_until(lambda: count_succeeded(flower) == MESSAGES, "the end of all tasks in Flower")

    tasks = flower.fetch("/api/tasks?limit=1000")
    assert len(tasks) == MESSAGES
    assert all(task["name"] == "readroom.caption" and task["runtime"] > 0 for task in tasks.values())
    assert all(ARGUMENTS.fullmatch(task["args"]) and task["kwargs"] in ("", "{}") for task in tasks.values())
    shown = sorted(int(number) for task in tasks.values() for number in task["args"].split()[-1].split(","))
    assert shown == ids
    assert set(flower.fetch("/api/workers?status=true").values()) == {True}


def test_flower_names_neither_files_nor_machine_nor_the_brokers_password(plant: Plant, flower: FlowerProcess) -> None:
    wait_until(flower.is_up, "Flower's start")
    worker = plant.start_worker()
    worker.wait_ready()
    plant.enqueue(range(1, 21))
    plant.wait_final(20)
    wait_until(lambda: flower.fetch("/api/workers?refresh=true"), "the worker in Flower")

    said = json.dumps([flower.fetch("/api/workers?refresh=true"), flower.fetch("/api/tasks")])
    password = (plant.home / "broker" / "password").read_text()
    for secret in (password, socket.gethostname(), str(plant.home / "items"), ".txt"):
        assert secret not in said


def test_flower_asks_for_its_password(flower: FlowerProcess) -> None:
    wait_until(flower.is_up, "Flower's start")

    with pytest.raises(urllib.error.HTTPError) as caught:
        flower.fetch("/api/tasks", password="guess")
    assert caught.value.code == 401


def count_succeeded(flower: FlowerProcess) -> int:
    return sum(task["state"] == "SUCCESS" for task in flower.fetch("/api/tasks?limit=1000").values())
