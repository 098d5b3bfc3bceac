"""Looks up host names with a time limit, those of all workers before TensorFlow starts its servers.

[Note: host names] `socket.getaddrinfo` blocks for as long as the resolver likes, and Python's signal handlers wait for
it. TensorFlow's server does the same with names, without any limit. So tfzero looks up the names of all other workers
first, in daemon threads that nobody has to wait for. A worker's own name is never looked up: it may be one that only
others use for this machine. A name may appear late, as the pods of a Kubernetes job do, so it is looked up again until
the time is over. Workers tell each other what they could not find, and all raise the same error.
"""

import contextlib
import ipaddress
import queue
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic, sleep
from typing import Any

from tfzero.workers.addresses import host_of
from tfzero.workers.cluster import Cluster

_RETRY_SECONDS = 0.2
_MOST_THREADS = 32
_ADVICE = (
    "Let every worker's machine find the names of the others in TF_CONFIG (DNS or /etc/hosts), or write IP addresses "
    "there."
)


def is_number(host: str) -> bool:
    """Whether a host is an IP address, which needs no lookup."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.partition("%")[0]))
    return False


def is_loopback(host: str) -> bool:
    """Whether a host is an address that a machine has for itself, such as 127.0.0.1."""
    return is_number(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def endpoints(host: str, port: int, seconds: float) -> list[tuple[Any, ...]]:
    """The results of `socket.getaddrinfo` for a stream to this host and port.

    Raises:
        OSError: if there is no such name; a TimeoutError if it is not looked up within so many seconds.
        UnicodeError: for an impossible name.
    """
    if is_number(host):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    answer: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="tfzero host name", daemon=True).start()
    try:
        found = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"looking up {host} takes longer than {seconds:.1f} s") from None
    if isinstance(found, Exception):
        raise found
    return found


class Lookup:
    """Looks up names of hosts in the background, from now until a deadline.

    Args:
        hosts: names or numbers; only names are looked up.
        timeout_seconds: time for all of them.
    """

    def __init__(self, hosts: Iterable[str], timeout_seconds: float) -> None:
        self.names = tuple(dict.fromkeys(host for host in hosts if not is_number(host)))
        self._deadline = monotonic() + timeout_seconds
        self._changed = threading.Condition()
        self._missing: dict[str, str] = dict.fromkeys(self.names, "no answer")  # reasons by name
        self._waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in self.names:
            self._waiting.put(name)
        for _ in self.names[:_MOST_THREADS]:
            threading.Thread(target=self._look_up, name="tfzero host names", daemon=True).start()

    def missing(self, *, wait: bool) -> dict[str, str]:
        """Why names have not been found, by name; on request after waiting for them until the deadline."""
        with self._changed:
            while wait and self._missing and monotonic() < self._deadline:  # in short waits: signals are handled
                self._changed.wait(min(1.0, max(0.0, self._deadline - monotonic())))
            return dict(self._missing)

    def _look_up(self) -> None:
        while monotonic() < self._deadline:
            try:
                name = self._waiting.get_nowait()
            except queue.Empty:
                return
            reason = _reason_of(name)
            with self._changed:
                if reason:
                    self._missing[name] = reason
                else:
                    del self._missing[name]
                self._changed.notify_all()
            if reason:
                self._waiting.put(name)
                sleep(_RETRY_SECONDS)


def _reason_of(name: str) -> str:
    """Why a name is not found; "" if it is."""
    try:
        socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
        return getattr(error, "strerror", None) or str(error)
    return ""


def describe_missing(missing: Mapping[str, str], cluster: Cluster) -> str:
    """Workers whose names were not found, such as "worker 1 at n2:2222 (Name or service not known)"."""
    at = {host_of(address): index for index, address in reversed(list(enumerate(cluster.addresses)))}
    return ", ".join(f"{cluster.describe(at[name])} ({reason})" for name, reason in missing.items() if name in at)


def problem_of(told: Sequence[Mapping[str, str]], cluster: Cluster) -> str:
    """The error message if some worker did not find the host of another; "" if all found all.

    Args:
        told: the missing names that each worker reports, in rank order.
        cluster: the workers.
    """
    lost = [f"{cluster.names[k]} cannot find {describe_missing(each, cluster)}" for k, each in enumerate(told) if each]
    return f"Host names could not be looked up: {'; '.join(lost)}. {_ADVICE}" if lost else ""


def advice_on(lookup: Lookup, cluster: Cluster) -> str:
    """What another error should add about names that were not found here; "" if all were."""
    missing = lookup.missing(wait=False)
    return f" {cluster.name} cannot find {describe_missing(missing, cluster)}. {_ADVICE}" if missing else ""
