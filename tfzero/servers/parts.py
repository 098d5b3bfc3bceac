"""Parts of parameters and slots on a server, as a worker reads and assigns them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tfzero.servers.client import Peer

Number = tuple[int, int, int]


@dataclass(frozen=True)
class RemotePart:
    """Flat elements `[begin, end)` of a variable's parameters, or of one of its slots.

    Args:
        peer: the server that holds it.
        key: number of the optimizer.
        place: message, place in it, and slot, as the server knows it.
        begin, end: its elements.
        dtype: of them.
    """

    peer: Peer
    key: int
    place: tuple[int, int, int]
    begin: int
    end: int
    dtype: np.dtype

    def read(self, is_copied: bool = False) -> np.ndarray:
        """Its value, `[end - begin]`: now, or as the latest snapshot has copied it."""
        values = np.empty(self.end - self.begin, self.dtype)
        request = {"do": "read", "key": self.key, "part": list(self.place), "is_copied": is_copied}
        self.peer.ask(request, (), lambda answer: [values])
        return values

    def write(self, number: Number, values: np.ndarray) -> None:
        """Assigns a value, `[end - begin]`.

        Args:
            number: of the assignment. [Note: assignments] in `keeping.py`
            values: the value.
        """
        self.peer.tell({"do": "assign", "number": list(number), "key": self.key, "part": list(self.place)}, [values])


@dataclass(frozen=True)
class RemoteValue:
    """The whole of a slot.

    Args:
        parts: its parts, in their order.
        number: gives the number under which the program assigns now; None if the servers do not take it from here.
    """

    parts: Sequence[RemotePart]
    number: Callable[[], Number | None]

    def read(self) -> np.ndarray:
        """The whole value, flat."""
        return np.concatenate([part.read() for part in self.parts])

    def write(self, flat: np.ndarray) -> None:
        """Assigns a whole value."""
        number = self.number()
        if number is not None:
            for part in self.parts:
                part.write(number, flat[part.begin : part.end])
