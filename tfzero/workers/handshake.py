"""A handshake: two processes prove that they know one secret, before either reads anything else from the other.

[Note: handshake] The listener sends a challenge, 32 random bytes. The caller answers with a challenge of its own, two
numbers that say what it calls for, and its proof: an HMAC of all these, keyed by the secret. If the proof is right, the
listener sends its own. All messages have a fixed size, and the secret never travels. Without a secret the key is empty.
Then the handshake only tells workers of tfzero from other programs, and the network must be trusted.
"""

import hmac
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence

from tfzero.workers.messages import read_bytes, seconds_left

SECRET_VARIABLE = "TFZERO_SECRET"
_LEAST_CHARACTERS = 16
_MAGIC = b"tfzero worker 2\n"
_CHALLENGE = struct.Struct(f"!{len(_MAGIC)}s32s")
_ANSWER = struct.Struct("!32sII32s")
_PROOF_BYTES = 32
_REFUSAL = bytes(_PROOF_BYTES)


def read_secret(environ: Mapping[str, str] = os.environ) -> bytes:
    """The secret that all workers share, from `TFZERO_SECRET`; empty if it is not set.

    Raises:
        ValueError: if it is too short.
    """
    secret = environ.get(SECRET_VARIABLE)
    if secret is not None and len(secret) < _LEAST_CHARACTERS:
        raise ValueError(
            f"{SECRET_VARIABLE} must have {_LEAST_CHARACTERS} characters at least. Make one with "
            "`python -c 'import secrets; print(secrets.token_hex(32))'` and give it to all workers, or unset it. "
            f"Received: {len(secret)} characters."
        )
    return b"" if secret is None else secret.encode(errors="surrogateescape")


def make_secret() -> str:
    """Makes a new secret for `TFZERO_SECRET`."""
    return secrets.token_hex(32)


def call(connection: socket.socket, secret: bytes, claim: tuple[int, int], deadline: float) -> None:
    """The caller's side of the handshake.

    Args:
        connection: to the listener.
        secret: the key of all proofs.
        claim: two 32-bit numbers for the listener.
        deadline: for the whole handshake.

    Raises:
        TimeoutError: if the listener is late.
        ConnectionError: if it is not a worker, or does not know the secret.
    """
    magic, theirs = _CHALLENGE.unpack(read_bytes(connection, _CHALLENGE.size, deadline))
    if magic != _MAGIC:
        raise ConnectionError("the process there is no tfzero worker")
    mine = secrets.token_bytes(32)
    connection.settimeout(seconds_left(deadline))
    connection.sendall(_ANSWER.pack(mine, *claim, _proof(secret, b"caller", theirs, mine, claim)))
    proof = read_bytes(connection, _PROOF_BYTES, deadline)
    if not hmac.compare_digest(proof, _proof(secret, b"listener", theirs, mine, claim)):
        raise ConnectionError(f"the process there has another {SECRET_VARIABLE}, or only one of the two has one")


def hear(connection: socket.socket, secret: bytes, deadline: float) -> tuple[int, int]:
    """The listener's side of the handshake. Returns the caller's claim.

    Raises:
        TimeoutError: if the caller is late.
        ConnectionError: if it does not know the secret.
    """
    mine = secrets.token_bytes(32)
    connection.settimeout(seconds_left(deadline))
    connection.sendall(_CHALLENGE.pack(_MAGIC, mine))
    theirs, *claim, proof = _ANSWER.unpack(read_bytes(connection, _ANSWER.size, deadline))
    known = hmac.compare_digest(proof, _proof(secret, b"caller", mine, theirs, claim))
    connection.settimeout(seconds_left(deadline))
    connection.sendall(_proof(secret, b"listener", mine, theirs, claim) if known else _REFUSAL)
    if not known:
        raise ConnectionError(f"a caller has another {SECRET_VARIABLE}, or only one of the two has one")
    return claim[0], claim[1]


def _proof(secret: bytes, role: bytes, of_listener: bytes, of_caller: bytes, claim: Sequence[int]) -> bytes:
    return hmac.digest(secret, struct.pack("!8s32s32sII", role, of_listener, of_caller, *claim), "sha256")
