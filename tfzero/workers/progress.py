"""Progress on the terminal: one bar at a time, for all workers together.

    with progress("saving", total_bytes, unit="bytes") as bar:
        bar.advance(written_bytes)

[Note: one bar] Rich draws a bar on stderr, only if that is a terminal. The bar is one line below the printed output,
and is erased when its work is done. A bar within another is not shown, nor is one of quick work. A worker's output is a
pipe to its launcher. A launcher with a terminal asks the leader, by `TFZERO_PROGRESS`, to report instead of drawing.
Reports go through that pipe as JSON text sequences (RFC 7464: a record separator, JSON, a line feed). The launcher cuts
them out, and shows the worker's bar in place of its own for as long as there is one.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

REPORTS_VARIABLE = "TFZERO_PROGRESS"  # the launcher's process id: a worker's children report nothing
QUICK_SECONDS = 0.5  # work that takes less shows no bar
REDRAW_SECONDS = 0.1  # between two drawings or reports
_GONE = (OSError, ValueError)  # errors of a closed terminal
_ERASE = "\r\x1b[2K"  # the cursor's line
_LONGEST_REPORT = 4000  # characters


@dataclass(frozen=True)
class Task:
    """How far some work has come: `done` of `total`. `unit` is a word such as "workers"; "bytes" are shown as MB."""

    title: str
    total: int
    done: int = 0
    unit: str = ""

    @classmethod
    def read(cls, fields: object) -> "Task":
        """The task in a report. Raises TypeError or ValueError if it is not a valid one."""
        if not isinstance(fields, dict):
            raise TypeError("A report is an object.")
        task = cls(**fields)
        if not isinstance(task.title, str) or not isinstance(task.unit, str):
            raise TypeError("A task's title and unit are texts.")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (task.total, task.done)):
            raise ValueError("A task's numbers are integers.")
        return task

    @property
    def amount(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB"
        return f"{self.done}/{self.total} {self.unit}".rstrip()


class _Terminal:
    """Draws a bar below the printed output."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        texts = [TextColumn(f"{{task.{place}}}", markup=False) for place in ("description", "fields[amount]")]
        self._console = console
        self._bars = Progress(texts[0], BarColumn(), texts[1], TimeElapsedColumn(), console=console, auto_refresh=False)
        self._id = self._bars.add_task("", amount="")
        self._title = ""
        self._drawn = False

    def show(self, task: Task) -> None:
        if task.title != self._title:
            self._title = task.title
            self._bars.reset(self._id)  # restarts its clock
        self._bars.update(self._id, description=task.title, completed=task.done, total=task.total, amount=task.amount)
        with self._console.capture() as drawing:
            self._console.print(self._bars.get_renderable(), end="")
        self._write(_ERASE + drawing.get().split("\n")[0])
        self._drawn = True

    def erase(self) -> None:
        if self._drawn:
            self._write(_ERASE)
            self._drawn = False

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class _Reports:
    """Reports a bar to the launcher."""

    def __init__(self) -> None:
        self._told = False

    def show(self, task: Task) -> None:
        self._tell([asdict(task)])
        self._told = True

    def erase(self) -> None:
        if self._told:
            self._tell([None])
            self._told = False

    def _tell(self, report: list[object]) -> None:
        os.write(2, f"\x1e{json.dumps(report)}\n".encode())  # short, so it is written in one piece


class Bar:
    """The bar of some work. Without a surface nothing is shown.

    Args:
        task: the work.
        surface: where it is shown.
    """

    def __init__(self, task: Task, surface: _Terminal | _Reports | None = None) -> None:
        self._task = task
        self._of_worker: Task | None = None
        self._surface = surface
        self._due_seconds = monotonic() + QUICK_SECONDS

    @property
    def is_shown(self) -> bool:
        return self._surface is not None

    def advance(self, amount: int = 1) -> None:
        """Adds to the amount that is done."""
        self.reach(self._task.done + amount)

    def reach(self, done: int, title: str | None = None) -> None:
        """Sets the total amount that is done, and maybe a title for what comes next."""
        if self._surface is not None:
            self._task = replace(self._task, done=done, title=self._task.title if title is None else title)
            self.refresh()

    def relay(self, task: Task | None) -> None:
        """Shows a worker's report in place of this bar, until the worker reports None."""
        self._of_worker = task
        self.refresh()

    def refresh(self) -> None:
        """Draws the bar, unless it was drawn just now."""
        if self._surface is not None and monotonic() >= self._due_seconds:
            with contextlib.suppress(*_GONE):
                self._surface.show(self._of_worker or self._task)
            self._due_seconds = monotonic() + REDRAW_SECONDS

    def erase(self) -> None:
        if self._surface is not None:
            with contextlib.suppress(*_GONE):
                self._surface.erase()


_current = _none = Bar(Task("", 0))  # the bar that is shown


@contextlib.contextmanager
def progress(title: str, total: int, *, unit: str = "", shown: bool = True) -> Iterator[Bar]:
    """A bar for the work in this context, of `total` units. [Note: one bar]

    Args:
        title: what is done, such as "saving".
        total: how much there is to do.
        unit: the unit of `total`: "workers", or "bytes".
        shown: whether this process may show it: of several workers only the leader should.
    """
    global _current
    surface = _find_surface() if shown and not _current.is_shown else None
    bar = Bar(Task(title, total, 0, unit), surface)
    if surface is None:
        yield bar
        return
    _current = bar
    try:
        yield bar
    finally:
        _current = _none
        bar.erase()


def _find_surface() -> _Terminal | _Reports | None:
    if os.environ.get(REPORTS_VARIABLE) == str(os.getppid()):
        return _Reports()
    if not getattr(sys.stderr, "isatty", bool)():
        return None
    from rich.console import Console

    console = Console(file=sys.stderr)
    return _Terminal(console) if console.is_interactive else None


# For launchers.


def asking() -> dict[str, str]:
    """Environment variables that ask a worker for reports; none if this process has no bar to show them in."""
    shows = not _current.is_shown and _find_surface() is not None
    return {REPORTS_VARIABLE: str(os.getpid())} if shows else {}


def is_asked(environment: Mapping[str, str]) -> bool:
    """Whether this process asks a worker with this environment for reports."""
    return environment.get(REPORTS_VARIABLE) == str(os.getpid())


def cut_report(line: str) -> tuple[str, Task | None] | None:
    """Splits a line of a worker's output into its text and the report at its end; None if there is no report."""
    start = line.rfind("\x1e[", max(0, len(line) - _LONGEST_REPORT))
    if start < 0:
        return None
    try:
        (fields,) = json.loads(line[start + 1 :])
        return line[:start], None if fields is None else Task.read(fields)
    except (ValueError, TypeError, RecursionError):  # a record separator of something else
        return None


def relay(task: Task | None) -> None:
    """Shows a worker's report in the bar that is shown."""
    _current.relay(task)


def refresh() -> None:
    """Draws the bar that is shown, unless it was drawn just now."""
    _current.refresh()


def make_room() -> None:
    """Erases the bar that is shown, so that a line can be printed. The bar is drawn again below that line."""
    _current.erase()
