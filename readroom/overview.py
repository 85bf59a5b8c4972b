"""What `readroom status` shows: jobs by state, rate, time left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from readroom.records import FINAL_STATES, JobState

if TYPE_CHECKING:
    from db.session import Store

STATE_STYLES = {
    JobState.WAITING: "dim",
    JobState.QUEUED: "yellow",
    JobState.RUNNING: "cyan",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "dim",
}


def measure_progress(store: Store, submission: str | None) -> dict[str, Any]:
    """The document of `status --json`: `{"submission", "jobs": {state: n}, "rate_per_s", "seconds_left", ...}`.

    `seconds_left` is None while nothing has finished within the last minute.
    """
    from db.jobs import oldest_queued_age
    from db.submissions import count_jobs, measure_rate

    counts = count_jobs(store, submission)
    jobs = {str(state): counts.get(state, 0) for state in JobState}
    open_jobs = sum(n for state, n in jobs.items() if JobState(state) not in FINAL_STATES)
    rate = measure_rate(store, submission)
    return {
        "submission": submission,
        "jobs": jobs,
        "open": open_jobs,
        "rate_per_s": round(rate, 3),
        "seconds_left": round(open_jobs / rate, 1) if rate and open_jobs else (0.0 if not open_jobs else None),
        "oldest_queued_s": oldest_queued_age(store, ("caption",)),
    }


def is_finished(progress: dict[str, Any]) -> bool:
    """Whether no job is left that could still change by itself."""
    return bool(progress["open"] == 0)


def render_progress(progress: dict[str, Any]) -> Group:
    """The same as a table for people."""
    table = Table(box=None, pad_edge=False)
    for column in ("state", "jobs"):
        table.add_column(column, justify="right" if column == "jobs" else "left")
    for state, count in progress["jobs"].items():
        if count or state in {"queued", "running", "succeeded", "failed"}:
            table.add_row(Text(state, STATE_STYLES[JobState(state)]), f"{count:,}")
    total = sum(progress["jobs"].values())
    bar = ProgressBar(total=max(total, 1), completed=total - progress["open"], width=40)
    return Group(table, bar, Text(describe_pace(progress), "dim"))


def describe_pace(progress: dict[str, Any]) -> str:
    """One line: rate and time left, or why there is none."""
    if is_finished(progress):
        return "nothing is waiting"
    if not progress["rate_per_s"]:
        return "nothing finished in the last minute: is a worker up? (`readroom doctor`)"
    pace = f"{progress['rate_per_s']:.1f} jobs/s"
    return f"{pace}, about {format_seconds(progress['seconds_left'])} left"


def format_seconds(seconds: float) -> str:
    """`75` as `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
