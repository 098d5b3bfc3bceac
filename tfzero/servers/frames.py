"""Messages with arrays between workers and servers: a JSON object as workers send it, then the arrays' bytes."""

import math
import socket
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

import numpy as np

from tfzero.workers.messages import bytes_of, receive, seconds_left, send

FOREVER = 3e7  # seconds: until the other side ends the connection
_PART_BYTES = 2**21  # moved within one time limit
_SIZE = "bytes"


def send_frame(
    connection: socket.socket, message: dict[str, Any], arrays: Iterable[np.ndarray] = (), seconds: float = FOREVER
) -> None:
    """Sends a message and arrays.

    Args:
        connection: to the other side.
        message: a JSON object.
        arrays: of any dtype.
        seconds: for each part of the message; a slow network takes as many parts as it needs.

    Raises:
        OSError: if the connection ends, or a part takes too long.
    """
    views = [bytes_of(np.ascontiguousarray(array)) for array in arrays if array.size]
    send(connection, {**message, _SIZE: sum(map(len, views))}, monotonic() + seconds)
    for view in views:
        for begin in range(0, len(view), _PART_BYTES):
            connection.settimeout(seconds)
            connection.sendall(view[begin : begin + _PART_BYTES])


def receive_message(connection: socket.socket, seconds: float, transfer_seconds: float) -> tuple[dict[str, Any], int]:
    """The next message, and the number of bytes of arrays that follow it.

    Raises:
        TimeoutError: if it does not begin within `seconds`, or takes more than `transfer_seconds` then.
        ConnectionError: if the connection ends, or what comes is no such message.
    """
    message = receive(connection, monotonic() + seconds, transfer_seconds)
    size = message.pop(_SIZE, None)
    if type(size) is not int or size < 0:
        raise ConnectionError("the process there does not say how many bytes follow")
    return message, size


def receive_arrays(connection: socket.socket, size: int, arrays: Sequence[np.ndarray], seconds: float) -> None:
    """Fills arrays from the bytes that follow a message.

    Raises:
        ConnectionError: if they are not `size` bytes, or the connection ends.
        TimeoutError: if a part takes longer than `seconds`.
    """
    expected = sum(array.nbytes for array in arrays)
    if size != expected:
        raise ConnectionError(f"the process there sends {size:,} bytes of arrays, and {expected:,} were expected")
    for view in (bytes_of(array) for array in arrays if array.size):
        while view:
            deadline = monotonic() + seconds
            connection.settimeout(seconds_left(deadline))
            count = connection.recv_into(view[:_PART_BYTES])
            if not count:
                raise ConnectionError("the connection was closed")
            view = view[count:]


def discard_arrays(connection: socket.socket, size: int, seconds: float) -> None:
    """Reads the bytes that follow a message, and drops them.

    Raises:
        OSError: as `receive_arrays`.
    """
    scratch = np.empty(min(size, _PART_BYTES), np.uint8)
    while size:
        part = scratch[: min(size, len(scratch))]
        receive_arrays(connection, len(part), [part], seconds)
        size -= len(part)


def check_sizes(specs: Iterable[Any], size: int) -> None:
    """Checks, before memory is taken, that arrays have as many bytes as were announced.

    Args:
        specs: shape and dtype of each, from the other side.
        size: number of bytes.

    Raises:
        ValueError: if they have not.
    """
    given = [(list(map(int, shape)), np.dtype(str(dtype))) for shape, dtype in specs]
    expected = sum(math.prod(shape) * dtype.itemsize for shape, dtype in given)
    if expected != size or any(side < 0 for shape, _ in given for side in shape):
        raise ValueError(f"The arrays of a message have {expected:,} bytes, but {size:,} were announced.")
