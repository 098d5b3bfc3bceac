"""Reports why NCCL cannot connect GPUs, in an error that comes in time.

[Note: NCCL's words] TensorFlow reports NCCL's failures in a word or two ("unhandled system error"); the cause is in
NCCL's own log. So tfzero makes NCCL write its warnings into a file, unless the user has configured NCCL's log, and puts
their last line into the error. TensorFlow has nothing that can end NCCL while it connects: a process that has waited
too long says so and exits.
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
# Added to the timeout, so that the pulse can first end whatever it can.
_GRACE_SECONDS = 5.0


def keep_log() -> None:
    """Makes NCCL log warnings to a file that is removed with this process. Has no effect once NCCL is loaded."""
    if LEVEL_VARIABLE in os.environ or FILE_VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="tfzero_nccl_")
    process = os.getpid()
    os.environ.update({LEVEL_VARIABLE: "WARN", FILE_VARIABLE: f"{folder}/%p.log"})

    def remove() -> None:
        if os.getpid() == process:  # not in a forked child
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def last_line() -> str:
    """The last line of NCCL's log; "" if there is no log file or it is empty."""
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
    """The text of an error: what happened, NCCL's last line, and advice."""
    line = last_line()
    said = (
        f"NCCL's last line: {line!r}." if line else f"NCCL has written nothing ({FILE_VARIABLE} names a file for it)."
    )
    return f"{what} {said} {_ADVICE}"


@contextlib.contextmanager
def naming_nccl(is_used: bool, worker: str, timeout_seconds: float) -> Iterator[None]:
    """While active, NCCL connects the GPUs of all workers, in their first collectives.

    Args:
        is_used: whether NCCL carries collectives here; if not, this does nothing.
        worker: this worker's name.
        timeout_seconds: the longest that connecting may take.

    Raises:
        RuntimeError: if NCCL fails. If it hangs, the process prints a message and exits instead.
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
