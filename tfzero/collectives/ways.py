"""The way each collective takes: one table of what TensorFlow's transports can do.

[Note: ways] Each primitive is carried by one of TensorFlow's operations, which may be that of another primitive, and in
a dtype that may differ from the value's. The table encodes these facts:

- Rings, on CPUs and on GPUs that are logical parts of one card, have no reduce-scatter. An all-to-all and a local sum
  replace it, with the same bytes on the wire. Among 12 or more members of one process ("crowded") the all-to-all of
  rings fails, because its rendezvous keys become ambiguous. Crowded rings all-reduce or all-gather everything, and each
  replica keeps its row. All-gather and broadcast have no bfloat16.
- NCCL, between GPUs, has a reduce-scatter of its own. It knows only float16, float32, float64, int32 and int64, adds
  16-bit floats in 16 bits, and its all-reduce of int32 fails between workers.
- NCCL's all-to-all gives wrong values, without an error, between processes: TensorFlow (`nccl_manager.cc`) divides the
  elements by the participants of this process. There all rows are gathered, and each replica keeps its own: N times the
  bytes. So between processes NCCL adds 16-bit gradients itself, in float32, and does not exchange encoded ones
  (`compression`).

This module does not need TensorFlow: it uses the names of dtypes.
"""

from dataclasses import dataclass, replace

ALL_REDUCE, REDUCE_SCATTER, ALL_TO_ALL, ALL_GATHER, BROADCAST = PRIMITIVES = (
    "all_reduce", "reduce_scatter", "all_to_all", "all_gather", "broadcast"
)  # fmt: skip
RINGS, CROWDED, NCCL = TRANSPORTS = ("rings", "crowded rings", "nccl")
ONE, SEVERAL = PROCESSES = ("one process", "several processes")

# The most members of one process whose all-to-all works over rings.
_MOST_EXCHANGING = 11

_PLAIN = ("float32", "float64", "int64")
_NARROW = ("float16", "bfloat16")
_INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64")  # all but int64
_ANY_DTYPE = (*_PLAIN, *_NARROW, *_INTEGERS)
_COPIES = (ALL_TO_ALL, ALL_GATHER, BROADCAST)


@dataclass(frozen=True)
class Way:
    """How a primitive is carried.

    Args:
        operation: the primitive whose TensorFlow operation carries it; "" for its own.
        dtype: the dtype in which it is carried; "" for its own.
        is_disguise: whether the value is bitcast to that dtype instead of cast.
    """

    operation: str = ""
    dtype: str = ""
    is_disguise: bool = False


@dataclass(frozen=True)
class Row:
    """The way of these primitives and dtypes over these transports, within one process or between several."""

    primitives: tuple[str, ...]
    transports: tuple[str, ...]
    processes: tuple[str, ...]
    dtypes: tuple[str, ...]
    way: Way


AS_IT_IS = Way()
# The first row that matches wins. [Note: ways]
TABLE = (
    Row((ALL_REDUCE,), TRANSPORTS, PROCESSES, _INTEGERS, Way(dtype="int64")),
    Row((ALL_REDUCE,), (NCCL,), PROCESSES, _NARROW, Way(dtype="float32")),
    Row((ALL_REDUCE,), TRANSPORTS, PROCESSES, (*_PLAIN, *_NARROW), AS_IT_IS),
    Row((REDUCE_SCATTER,), (RINGS,), PROCESSES, _ANY_DTYPE, Way(ALL_TO_ALL)),
    Row((REDUCE_SCATTER,), (CROWDED,), PROCESSES, _NARROW, Way(ALL_REDUCE, "float32")),
    Row((REDUCE_SCATTER,), (CROWDED,), PROCESSES, _ANY_DTYPE, Way(ALL_REDUCE)),
    Row((REDUCE_SCATTER,), (NCCL,), (ONE,), _NARROW, Way(ALL_TO_ALL)),
    Row((REDUCE_SCATTER,), (NCCL,), (SEVERAL,), _NARROW, Way(dtype="float32")),
    Row((REDUCE_SCATTER,), (NCCL,), PROCESSES, _PLAIN, AS_IT_IS),
    Row((REDUCE_SCATTER,), (NCCL,), PROCESSES, _INTEGERS, Way(dtype="int64")),
    Row((ALL_TO_ALL,), (CROWDED,), PROCESSES, _ANY_DTYPE, Way(ALL_GATHER)),
    Row((ALL_TO_ALL,), (NCCL,), (SEVERAL,), _ANY_DTYPE, Way(ALL_GATHER)),
    Row((ALL_TO_ALL,), (RINGS,), PROCESSES, ("bfloat16",), AS_IT_IS),
    Row(_COPIES, TRANSPORTS, PROCESSES, (*_PLAIN, "float16", "int32"), AS_IT_IS),
    Row(_COPIES, TRANSPORTS, PROCESSES, ("bool", "int8", "uint8"), Way(dtype="int32")),
    Row(_COPIES, TRANSPORTS, PROCESSES, ("bfloat16", "int16", "uint16"), Way(dtype="float16", is_disguise=True)),
    Row(_COPIES, TRANSPORTS, PROCESSES, ("uint32",), Way(dtype="int32", is_disguise=True)),
    Row(_COPIES, TRANSPORTS, PROCESSES, ("uint64", "complex64"), Way(dtype="int64", is_disguise=True)),
)


@dataclass(frozen=True)
class Place:
    """Where a group's collectives run: the transport, and whether in one process or several."""

    transport: str = RINGS
    processes: str = ONE

    @property
    def exchanges_encoded(self) -> bool:
        """Whether encoded gradients can be exchanged; if not, the transport sums them unencoded. [Note: ways]"""
        return (self.transport, self.processes) != (NCCL, SEVERAL)


def place_of(rows: str, members_here: int, members: int) -> Place:
    """The place of a group, from its transport's rows and its number of members in this process and in all."""
    is_crowded = rows == RINGS and members_here > _MOST_EXCHANGING
    return Place(CROWDED if is_crowded else rows, SEVERAL if members > members_here else ONE)


def choose(primitive: str, dtype: str, place: Place) -> Way:
    """The way of a primitive for a dtype, given by name. [Note: ways]

    Raises:
        TypeError: if there is none.
    """
    for row in TABLE:
        fits = primitive in row.primitives and dtype in row.dtypes
        if fits and place.transport in row.transports and place.processes in row.processes:
            return replace(row.way, operation=row.way.operation or primitive)
    raise TypeError(f"{primitive} of {dtype} is no collective. It takes {', '.join(_ANY_DTYPE)}.")


# The table as text.

_SHOWN_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "bool")
_COLUMNS = {
    "CPUs, logical parts of one GPU": Place(RINGS, SEVERAL),
    "GPUs of one process": Place(NCCL, ONE),
    "GPUs of several processes": Place(NCCL, SEVERAL),
}
_BY_ANOTHER = {
    (REDUCE_SCATTER, ALL_TO_ALL): "all-to-all, then a sum (of 16 bits in float32)",
    (ALL_TO_ALL, ALL_GATHER): "all-gather, N times the bytes",
}


def as_markdown() -> str:
    """The table of docs/gpus.md."""
    rows = [["", *_COLUMNS], ["---"] * (1 + len(_COLUMNS))]
    rows += [[name.replace("_", "-"), *(_cell(name, place) for place in _COLUMNS.values())] for name in PRIMITIVES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(primitive: str, place: Place) -> str:
    dtypes: dict[str, list[str]] = {}
    for dtype in _SHOWN_DTYPES:
        dtypes.setdefault(_words(primitive, choose(primitive, dtype, place)), []).append(dtype)
    if len(dtypes) == 1:
        return next(iter(dtypes))
    most = max(dtypes, key=lambda words: len(dtypes[words]))
    others = [f"{', '.join(names)}: {words}" for words, names in dtypes.items() if words != most]
    return "; ".join([most, *others])


def _words(primitive: str, way: Way) -> str:
    if way.operation != primitive:
        return _BY_ANOTHER[primitive, way.operation]
    if not way.dtype:
        return "as it is"
    return f"as bits of {way.dtype}" if way.is_disguise else f"in {way.dtype}"
