"""A real PostgreSQL server for tests: a fresh cluster in a temporary folder, on loopback, at a free port."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pg8000.dbapi
import pytest

from db.tables import metadata

BINARIES = Path("/usr/lib/postgresql")
USER = "postgres"  # PostgreSQL refuses to run as root; the Debian package makes this user
# A test's cluster need not outlive the machine. It keeps what was committed through crashes of the server all the same.
OPTIONS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
# A server must speak every client's encoding; texts are compared byte by byte, so that the locale changes no order.
INITDB = ("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", f"--username={USER}")


class PostgresServer:
    """One cluster that can be stopped, killed and started again; `create_database` gives each test its own store."""

    def __init__(self) -> None:
        self.binaries = find_binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="readroom-postgres-"))
        self.port = find_port()
        self.data = self.folder / "data"
        if os.getuid() == 0:
            shutil.chown(self.folder, USER)
        self._run("initdb", "-D", str(self.data), *INITDB)

    def start(self) -> None:
        """Start the server; returns when it takes connections."""
        options = [f"-c {name}={value}" for name, value in OPTIONS.items()]
        place = ["-c listen_addresses=127.0.0.1", f"-c port={self.port}", f"-c unix_socket_directories={self.folder}"]
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.data), "-l", log, "-w", "-t", "60", "-o", " ".join(place + options), "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server: `fast` ends its sessions, `immediate` is a crash (the next start recovers)."""
        self._run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-m", mode, "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop and start again at the same port."""
        self.stop(mode)
        self.start()

    def create_database(self) -> str:
        """The URL of a new empty database."""
        name = f"store_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def empty_database(self, url: str) -> None:
        """Delete all rows of the store, after ending the sessions that a test left behind."""
        name = url.rsplit("/", 1)[1]
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        self.execute(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY", name)

    def execute(self, statement: str, database: str = USER) -> None:
        """Run one statement outside any transaction."""
        connection = pg8000.dbapi.connect(user=USER, host="127.0.0.1", port=self.port, database=database)
        connection.autocommit = True
        try:
            connection.cursor().execute(statement)
        finally:
            connection.close()

    def url(self, database: str) -> str:
        """The URL of a database of this server."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def remove(self) -> None:
        """Stop the server, if it runs, and delete the cluster."""
        if (self.data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        command: Sequence[str] = [str(self.binaries / program), *arguments]
        if os.getuid() == 0:
            command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", *command]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
        # Output to a file: a server that inherits a pipe would keep it open, and reading it would never end.
        with (self.folder / "commands").open("a+") as output:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            output.seek(0)
            assert done.returncode == 0, f"{program} failed:\n{output.read()[-4000:]}"


def find_binaries() -> Path:
    """The folder of the newest installed server's programs; a missing one fails the test, it never skips it."""
    found = sorted(BINARIES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.fail("no PostgreSQL server is installed: apt-get install postgresql", pytrace=False)
    return found[-1].parent


def find_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
