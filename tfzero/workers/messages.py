"""Messages between worker processes: bounded in size, and checked before use.

A message is a magic line, the length and the CRC-32 of its text, and the text: a JSON object.
"""

import json
import socket
import struct
import zlib
from time import monotonic
from typing import Any

import numpy as np

MAGIC = b"tfzero message 2\n"
STRANGER_BYTES = 2**16  # the longest text that is accepted from strangers
MESSAGE_BYTES = 2**28  # the longest text between workers
_PART_BYTES = 2**20  # memory is allocated in such steps, as data arrive
_HEADER = struct.Struct(f"!{len(MAGIC)}sQI")


def seconds_left(deadline: float) -> float:
    """Seconds until the deadline; never 0, which sockets take for "do not wait"."""
    return max(deadline - monotonic(), 0.001)


def encode(message: dict[str, Any]) -> bytes:
    """A message's text.

    Raises:
        TypeError, ValueError: if it is not JSON, or too long.
    """
    text = json.dumps(message).encode()
    if len(text) > MESSAGE_BYTES:
        raise ValueError(f"Workers can tell each other {MESSAGE_BYTES:,} bytes at once. Received: {len(text):,} bytes.")
    return text


def send(connection: socket.socket, message: dict[str, Any] | bytes, deadline: float) -> None:
    """Sends a message, or its text.

    Raises:
        OSError: if it cannot be sent in time.
    """
    text = message if isinstance(message, bytes) else encode(message)
    connection.settimeout(seconds_left(deadline))
    connection.sendall(_HEADER.pack(MAGIC, len(text), zlib.crc32(text)) + text)


def receive(
    connection: socket.socket, deadline: float, transfer_seconds: float, limit_bytes: int = MESSAGE_BYTES
) -> dict[str, Any]:
    """Reads the next message. It must begin before the deadline, and may then take `transfer_seconds`.

    Raises:
        TimeoutError: if it is late.
        ConnectionError: if the connection ends, or what arrives is no message, or one of more than `limit_bytes`.
    """
    magic, length, checksum = _HEADER.unpack(read_bytes(connection, _HEADER.size, deadline))
    if magic != MAGIC:
        raise ConnectionError("the process there sends no messages of tfzero")
    if length > limit_bytes:
        raise ConnectionError(f"the process there announces {length:,} bytes, and may send {limit_bytes:,}")
    text = read_bytes(connection, length, monotonic() + transfer_seconds)
    if zlib.crc32(text) != checksum:
        raise ConnectionError("a message arrived damaged")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested a thousand deep
        raise ConnectionError(f"the process there sends no JSON that can be read ({error})") from None
    if not isinstance(message, dict):
        raise ConnectionError(f"the process there sends a {type(message).__name__} for a message")
    return message


def read_bytes(connection: socket.socket, count: int, deadline: float) -> bytes:
    """Reads exactly `count` bytes.

    Raises:
        TimeoutError: if they are late.
        ConnectionError: if the connection ends before.
    """
    data = bytearray()
    while len(data) < count:
        connection.settimeout(seconds_left(deadline))
        part = connection.recv(min(count - len(data), _PART_BYTES))
        if not part:
            raise ConnectionError("the connection was closed")
        data += part
        if len(data) < count and monotonic() > deadline:  # even if data trickle in
            raise TimeoutError("timed out")
    return bytes(data)


def bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
