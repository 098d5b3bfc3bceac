"""What NCCL says when it cannot connect GPUs, in an error that comes in time.

[Note: NCCL's words] TensorFlow tells of NCCL's failures in a word or two ("unhandled system error"); what happened
stands in NCCL's own log. So NCCL is asked to write its warnings into a file, unless the user has asked it for something
else, and their last line goes into the error. While NCCL connects, nothing that TensorFlow has can end it: a process
that has waited too long says so and exits.
"""

import atexit
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import tensorflow as tf

from tfzero.collectives.pulse import NOT_FOR_THE_SAME
from tfzero.workers.stopping import EXIT_WORKER_LOST

LEVEL_VARIABLE, FILE_VARIABLE = "NCCL_DEBUG", "NCCL_DEBUG_FILE"
_ADVICE = (
    "Look whether NCCL is installed (`pip install tensorflow[and-cuda]`) and whether GPUs of all workers reach each "
    "other: NCCL_SOCKET_IFNAME names the network to use, and NCCL_DEBUG=INFO shows more."
)
# After the timeout, for the pulse to end what can be ended.
_GRACE_SECONDS = 5.0


def keep_log() -> None:
    """Asks NCCL for its warnings, in a file that goes with this process; before NCCL is loaded, or it has no effect."""
    if LEVEL_VARIABLE in os.environ or FILE_VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="tfzero_nccl_")
    process = os.getpid()
    os.environ.update({LEVEL_VARIABLE: "WARN", FILE_VARIABLE: f"{folder}/%p.log"})

    def remove() -> None:
        if os.getpid() == process:  # no forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def last_line() -> str:
    """The last line that NCCL has written of itself; "" if it has written none into a file."""
    pattern = os.environ.get(FILE_VARIABLE, "")
    if not pattern:
        return ""
    path = Path(pattern.replace("%p", str(os.getpid())).replace("%h", socket.gethostname()))
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:  # nothing is written yet
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def describe(what: str) -> str:
    """An error's text."""
    line = last_line()
    said = (
        f"NCCL's last line: {line!r}." if line else f"NCCL has written nothing ({FILE_VARIABLE} names a file for it)."
    )
    return f"{what} {said} {_ADVICE}"


@contextlib.contextmanager
def naming_nccl(is_used: bool, worker: str, timeout_seconds: float) -> Iterator[None]:
    """Within it NCCL connects the GPUs of all workers, in their first collectives.

    Args:
        is_used: whether NCCL carries collectives here; else it does nothing.
        worker: this worker's name.
        timeout_seconds: how long that may take.

    Raises:
        RuntimeError: if NCCL fails. A process in which it does not come to an end exits with a message instead.
    """
    if not is_used:
        yield
        return
    late = f"NCCL did not connect the GPUs of all workers within {timeout_seconds:g} s, as {worker} waited."
    watch = threading.Timer(timeout_seconds + _GRACE_SECONDS, _exit, [late])
    watch.daemon = True
    start = monotonic()
    watch.start()
    try:
        yield
    except tf.errors.OpError as error:
        is_late = NOT_FOR_THE_SAME in str(error) and monotonic() - start >= timeout_seconds
        if is_late:
            raise RuntimeError(describe(late)) from error
        if "nccl" not in str(error).lower():
            raise
        what = f"NCCL failed as {worker} met the others: {error.message.strip().splitlines()[0]}."
        raise RuntimeError(describe(what)) from error
    finally:
        watch.cancel()


def _exit(what: str) -> None:
    print(f"tfzero: {describe(what)} The process exits with code {EXIT_WORKER_LOST}.", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_WORKER_LOST)
