"""Notes on errors, which Python shows since 3.11."""

import sys


def add_note(error: BaseException, note: str) -> None:
    """Adds a note that is shown below an error's message. Python 3.10 shows none, so it is printed at once there."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
        return
    error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
    print(note, file=sys.stderr, flush=True)
