"""The local stack: broker, workers and Flower under one supervisor that restarts what dies.

`readroom up` starts the supervisor detached (or stays with `--foreground`); `readroom down` ends it. What it runs and
under which process ids stands in `<home>/run/stack.json`; every service writes its own file under `<home>/logs`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from readroom.broker import broker_url, start_broker, stop_broker
from readroom.errors import BadCall, ReadroomError, SettingsError
from readroom.log import describe_error
from readroom.settings import Settings
from readroom.transport import make_celery, ping_workers

logger = logging.getLogger(__name__)

# A service that dies at once is started again after 1, 2, 4 ... 60 s; after this long alive the count starts anew.
FIRST_PAUSE_S, LONGEST_PAUSE_S, STEADY_S = 1.0, 60.0, 60.0
CHECK_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 120.0  # a worker may finish the batch in hand


@dataclass(slots=True)
class Service:
    """One supervised child process. `command` is what follows `python -m readroom.cli`."""

    name: str
    command: Sequence[str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    start_at: float = 0.0

    def start(self) -> None:
        """Start the process in a session of its own, so that a Ctrl-C reaches only the supervisor."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.log_path.open("ab") as log:
            command = [sys.executable, "-m", "readroom.cli", *self.command]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.started_at = time.monotonic()

    def check(self) -> None:
        """Start the process again when it has ended and its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            steady = now - self.started_at > STEADY_S
            self.pause_s = FIRST_PAUSE_S if steady else min(2 * self.pause_s, LONGEST_PAUSE_S)
            self.start_at, self.process = now + self.pause_s, None
            self.restarts += 1
        if self.process is None and now >= self.start_at:
            self.start()

    def stop(self, deadline: float) -> None:
        """SIGTERM was sent; wait until `deadline` (monotonic seconds), then SIGKILL."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Supervisor:
    """Keeps the embedded broker and a list of services alive until `stop` is set."""

    def __init__(self, settings: Settings, services: Sequence[Service]) -> None:
        self.settings = settings
        self.services = services
        self.stop = threading.Event()
        self.written: dict[str, Any] = {}

    def run(self) -> None:
        """Start everything, watch it, and end it in order: services first, the broker last."""
        try:
            while not self.stop.is_set():
                self.try_step(self.check_broker)
                for service in self.services:
                    self.try_step(service.check)
                self.try_step(self.write_changes)
                self.stop.wait(CHECK_INTERVAL_S)
        finally:
            self.end_services()

    def try_step(self, step: Callable[[], object]) -> None:
        """One step of a round; a full disk or a broker that does not start must not end what still runs."""
        try:
            step()
        except (OSError, ReadroomError) as error:
            logger.warning("supervisor: %s", describe_error(error))
            self.stop.wait(FIRST_PAUSE_S)

    def check_broker(self) -> None:
        """Start the embedded broker again when it is gone."""
        if self.settings.broker_url is None:
            start_broker(self.settings.home_dir)  # does nothing while it answers

    def write_changes(self) -> None:
        """Write the state file when it would say something new."""
        state = describe_state(self.services)
        if state != self.written:
            write_state(self.settings, state)
            self.written = state

    def end_services(self) -> None:
        """Warm shutdown of the services, then the broker, then the state file."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for service in self.services:
            if service.process is not None and service.process.poll() is None:
                service.process.send_signal(signal.SIGTERM)
        for service in self.services:
            service.stop(deadline)
        if self.settings.broker_url is None:
            stop_broker(self.settings.home_dir)
        state_path(self.settings).unlink(missing_ok=True)


def state_path(settings: Settings) -> Path:
    """Where the supervisor writes what it runs."""
    return settings.home_dir / "run" / "stack.json"


def describe_state(services: Sequence[Service]) -> dict[str, Any]:
    """The supervisor's process id, and each service with its process id and restarts."""
    rows = [
        {"name": s.name, "pid": s.process.pid if s.process else None, "restarts": s.restarts, "log": str(s.log_path)}
        for s in services
    ]
    return {"pid": os.getpid(), "services": rows}


def write_state(settings: Settings, state: dict[str, Any]) -> None:
    """Replace the state file whole."""
    path = state_path(settings)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(state), encoding="utf-8")
    draft.replace(path)


def load_state(settings: Settings) -> dict[str, Any] | None:
    """What some supervisor last wrote, alive or not; None when there is nothing usable."""
    try:
        state = json.loads(state_path(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and {"pid", "services"} <= state.keys() else None


def read_state(settings: Settings) -> dict[str, Any] | None:
    """What the living supervisor last wrote; None when no supervisor is alive."""
    state = load_state(settings)
    return state if state and is_ours(state["pid"]) else None


def list_services(settings: Settings, workers: int, queue: str, flower: bool) -> list[Service]:
    """The services of a local stack."""
    logs = settings.home_dir / "logs"
    services = [
        Service(f"worker-{number}", ["worker", "--queue", queue], logs / f"worker-{number}.log")
        for number in range(1, workers + 1)
    ]
    if flower:
        services.append(Service("flower", ["flower"], logs / "flower.log"))
    return services


def run_stack(settings: Settings, workers: int, queue: str, flower: bool) -> None:
    """Be the supervisor until SIGTERM or Ctrl-C. Raises BadCall when another one is at work under this home."""
    with hold_stack(settings):
        end_orphans(settings)
        supervisor = Supervisor(settings, list_services(settings, workers, queue, flower))

        def end(_signal: int, _frame: FrameType | None) -> None:
            supervisor.stop.set()

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
        supervisor.run()


@contextmanager
def hold_stack(settings: Settings) -> Iterator[None]:
    """One supervisor for each home: the lock goes with its process, whatever ends it."""
    folder = state_path(settings).parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadCall("a stack is already up under this home", "`readroom down` ends it.") from None
        yield


def launch_stack(settings: Settings, workers: int, queue: str, flower: bool, timeout_s: float = 60.0) -> dict[str, Any]:
    """Start the supervisor detached and wait until it has started every service; returns its state.

    Raises BadCall when a stack is up already, ReadroomError when the supervisor ends or does not come up in time.
    """
    with hold_stack(settings):
        end_orphans(settings)  # their state file must not be taken for the new supervisor's
    log_path = settings.home_dir / "logs" / "stack.log"
    log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    options = ["--workers", str(workers), "--queue", queue, "--flower" if flower else "--no-flower"]
    with log_path.open("ab") as log:
        command = [sys.executable, "-m", "readroom.cli", "up", "--foreground", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    state = wait_for_stack(settings, process, log_path, timeout_s)
    wait_for_workers(settings, workers, timeout_s)
    return state


def wait_for_workers(settings: Settings, workers: int, timeout_s: float) -> None:
    """Wait until every worker answers on the broker. Raises ReadroomError when a service ends meanwhile."""
    app = make_celery(settings, broker_url(settings, start=False))
    deadline = time.monotonic() + timeout_s
    while ping_workers(app) < workers:
        state = read_state(settings)
        restarted = [service for service in (state["services"] if state else ()) if service["restarts"]]
        if state is None or restarted or time.monotonic() > deadline:
            name, log = (restarted[0]["name"], restarted[0]["log"]) if restarted else ("a worker", "the logs folder")
            end_stack(settings)
            raise ReadroomError(f"{name} does not start; the stack was ended again", f"Its log: {log}")


def wait_for_stack(
    settings: Settings, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float
) -> dict[str, Any]:
    """Wait until the supervisor's state names a living process for every service."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = read_state(settings)
        if state and all(service["pid"] for service in state["services"]):
            return state
        if process.poll() is not None:
            raise ReadroomError(f"the stack ended at once (status {process.returncode})", f"Its log: {log_path}")
        time.sleep(0.1)
    raise ReadroomError(f"the stack did not come up within {timeout_s:.0f} s", f"Its log: {log_path}")


def end_stack(settings: Settings, timeout_s: float = STOP_TIMEOUT_S + 10) -> bool:
    """Ask the supervisor to end everything and wait for it; False when nothing was up.

    What a killed supervisor left behind (services, broker) is ended too.
    """
    state = read_state(settings)
    if state is None:
        left = end_orphans(settings)
        stopped = stop_broker(settings.home_dir) if settings.broker_url is None else False
        return left or stopped
    os.kill(state["pid"], signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and read_state(settings) is not None:
        time.sleep(0.1)
    return True


def end_orphans(settings: Settings) -> bool:
    """SIGTERM the services that a killed supervisor left behind; True when there were any."""
    state = load_state(settings)
    if state is None:
        return False
    alive = [service["pid"] for service in state["services"] if service["pid"] and is_ours(service["pid"])]
    for pid in alive:
        os.kill(pid, signal.SIGTERM)
    state_path(settings).unlink(missing_ok=True)
    return bool(alive)


def is_ours(pid: int) -> bool:
    """Whether a process id still belongs to a process of this command (ids are given out again after a reboot)."""
    try:
        return b"readroom.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return not Path("/proc/self").exists() and is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether a process has this id, where there is no /proc to say whose it is."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def flower_password(settings: Settings) -> str:
    """The setting, else a password made once and kept in `<home>/flower-password` (mode 0600)."""
    if settings.flower_password is not None:
        return settings.flower_password.get_secret_value()
    path = settings.home_dir / "flower-password"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_once(path, secrets.token_urlsafe(18))
    return path.read_text(encoding="utf-8").strip()


def write_once(path: Path, text: str) -> None:
    """Write a file for its owner's eyes, whole, unless another process was first."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def run_flower(settings: Settings) -> None:
    """Serve Flower in this process: behind a password, with bounded memory, showing ids only."""
    if settings.flower_host not in {"127.0.0.1", "localhost", "::1"} and settings.flower_password is None:
        raise SettingsError(
            "Flower would listen beyond this machine with a password nobody chose", "Set READROOM_FLOWER_PASSWORD."
        )
    app = make_celery(settings, broker_url(settings, start=True))
    # The password goes in as an argument of this process's own function call: it is never on a command line that
    # `ps` shows. 20,000 tasks of about 2 kB keep Flower near 100 MB.
    app.start(
        [
            "flower",
            f"--address={settings.flower_host}",
            f"--port={settings.flower_port}",
            f"--basic-auth={settings.flower_user}:{flower_password(settings)}",
            "--max-tasks=20000",
            "--inspect-timeout=5000",
            "--purge-offline-workers=3600",
            "--logging=warning",
        ]
    )
