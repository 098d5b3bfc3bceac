"""The variables of one optimizer, as a worker pushes their gradients to the servers and pulls their values."""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.host import keras_objects, runtime
from tfzero.plan.placement import Bucket, Placement, Plan
from tfzero.plan.serving import Piece, deal, within
from tfzero.servers.client import Peers
from tfzero.servers.parts import Number, RemotePart
from tfzero.servers.store import Held
from tfzero.variables.classes import ShardedParameter
from tfzero.variables.remote_slots import RemoteSlot


class Remote:
    """Pushes and pulls one optimizer's variables.

    A message is a bucket as one local replica has reduced it: its row, or all of a whole bucket. Each server holds a
    part of it.

    Args:
        key: number of the optimizer, the same on all workers.
        variables: those that it trains, in the plan's order.
        plan: of the local replicas.
        optimizers: the inner optimizers.
        peers: the servers.
        min_shard_elements: as in `deal`.
    """

    def __init__(self, key: int, variables: Sequence[keras.Variable], plan: Plan,
                 optimizers: Sequence[keras.optimizers.Optimizer], peers: Peers,
                 min_shard_elements: int) -> None:  # fmt: skip
        self.key, self._variables, self._optimizers, self._peers = key, tuple(variables), tuple(optimizers), peers
        self._numbers: dict[tuple[int, Bucket], int] = {}
        dealt = deal([spec.elements for spec in plan.specs], len(peers), min_shard_elements)
        pieces = [{piece.variable: piece for piece in of_server} for of_server in dealt]
        # By message and server, what the server holds of it, and where that lies in the row.
        self._layout: list[list[list[tuple[Held, int]]]] = []
        self._dtypes: list[str] = []
        for bucket in plan.buckets:
            for replica in range(1 if bucket.placement is Placement.WHOLE else plan.shards):
                self._numbers[replica, bucket] = len(self._layout)
                self._dtypes.append(bucket.dtype)
                self._layout.append([self._parts(bucket, replica, of_server) for of_server in pieces])
        self._pushed: set[int] = set()  # messages of this step
        self._failure: Exception | None = None  # of a push
        self._given_up: set[int] = set()  # variables that another optimizer trains now
        self.step = 0

    def _parts(self, bucket: Bucket, replica: int, pieces: dict[int, Piece]) -> list[tuple[Held, int]]:
        parts = []
        optimizer, is_whole = self._optimizers[bucket.optimizer], bucket.placement is Placement.WHOLE
        for segment in bucket.segments:
            begin = 0 if is_whole else min(replica * segment.width, segment.elements)
            end = min(begin + segment.width, segment.elements)
            found = within(pieces[segment.index], begin, end) if segment.index in pieces else None
            if found is not None:
                decays = runtime.decays(optimizer, self._variables[segment.index])
                held = Held(found.variable, found.begin, found.end, bucket.optimizer, decays)
                parts.append((held, segment.offset + found.begin - begin))
        return parts

    def define(self, worker: int) -> None:
        """Tells the servers what they hold. They keep the values that they have; else the first worker's count."""
        configs = [keras.saving.serialize_keras_object(optimizer) for optimizer in self._optimizers]
        for config in configs:
            config["config"]["name"] = "served"  # names are counted up in each process
            if not isinstance(config["config"]["learning_rate"], dict):
                config["config"]["learning_rate"] = 0.0  # the rate of the moment comes with each push
        names = [variable.path for variable in self._variables]
        values = [whole_of(variable.value) for variable in self._variables] if worker == 0 else []
        for number in range(len(self._peers)):
            definition = {
                "optimizers": configs,
                "messages": self.layout(number),
                "dtypes": self._dtypes,
                "names": names,
            }
            arrays = [values[held.variable][held.begin : held.end] for held in self._held(number)] if values else []
            self._peers[number].ask({"do": "define", "key": self.key, "definition": definition}, arrays)

    def push(self, replica: int, bucket: Bucket, row: tf.Tensor, updated: Sequence[int], rows: tf.Tensor | None,
             rate: tf.Tensor | None) -> None:  # fmt: skip
        """In a replica: pushes what it has reduced of a bucket.

        Args:
            replica: the local replica.
            bucket: the bucket.
            row: its row, or all of a whole bucket, flat.
            updated: the variables that have a gradient.
            rows: of the batch that this worker has; None if unknown.
            rate: the learning rate; None if it follows a schedule, which servers know.
        """
        number = self._numbers.get((replica, bucket))
        if number is None:
            return  # another replica has the same
        chosen = frozenset(updated)

        def send(row: np.ndarray, rows: np.ndarray, rate: np.ndarray) -> None:
            rates = {} if rate < 0 else {str(bucket.optimizer): float(rate)}
            try:
                self._send(number, chosen, row, int(rows), rates)
            except (OSError, RuntimeError, ValueError) as error:  # TensorFlow would make another of it
                self._failure = self._failure or error

        rows = tf.ones([], tf.int64) if rows is None else rows
        rate = tf.constant(-1.0) if rate is None else tf.cast(rate, tf.float32)
        tf.numpy_function(send, [row, rows, rate], [])

    def _send(self, number: int, updated: frozenset[int], row: np.ndarray, rows: int, rates: dict[str, float]) -> None:
        if number in self._pushed:
            raise RuntimeError(
                "An optimizer was applied twice in one step. Servers take one gradient of each worker in a step: apply "
                "it once, or leave the servers away."
            )
        if self._given_up:
            names = [self._variables[index].path for index in sorted(self._given_up)]
            raise RuntimeError(
                f"Another optimizer has trained {names[:3]} since, and servers hold what that has made of them. Make a "
                "new optimizer, or train each variable with one optimizer only."
            )
        self._pushed.add(number)
        for server, parts in enumerate(self._layout[number]):
            active = [place for place, (held, _) in enumerate(parts) if held.variable in updated]
            if not active:
                continue
            arrays = [row[offset : offset + held.end - held.begin] for held, offset in (parts[p] for p in active)]
            message: dict[str, Any] = {"do": "push", "key": self.key, "message": number, "step": self.step,
                                       "rows": rows, "rates": rates}  # fmt: skip
            if len(active) < len(parts):
                message["active"] = active
            self._peers[server].tell(message, arrays)

    def check(self) -> None:
        """Raises what has failed in a push of this step."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def end_step(self, step: int) -> None:
        """The next step is this one."""
        self._pushed.clear()
        self.step = step

    def empty(self) -> list[np.ndarray]:
        """A flat array for each variable, to pull into."""
        return [
            np.empty(variable.shape.num_elements(), variable.value.dtype.as_numpy_dtype) for variable in self._variables
        ]

    def places(self, flats: Sequence[np.ndarray], server: int) -> list[np.ndarray]:
        """The parts of the arrays of `empty` that a server gives, in its order."""
        return [flats[held.variable][held.begin : held.end] for held in self._held(server)]

    def take(self, flats: Sequence[np.ndarray]) -> None:
        """Takes pulled values."""
        with tf.init_scope():
            for index, flat in enumerate(flats):
                if index not in self._given_up:
                    assign_whole(self._variables[index].value, flat)

    def take_counters(self, told: Sequence[Sequence[Sequence[float]]]) -> None:
        """Takes what the inner optimizers count, as each server has it (`Store.scalars`)."""
        with tf.init_scope():
            for variables, values in zip(self.counters, zip(*told, strict=True), strict=True):
                # A server that holds nothing of an optimizer counts nothing. The last value is no counter.
                for variable, value in zip(variables, max(values), strict=False):
                    assign_whole(variable.value, np.array([value], variable.value.dtype.as_numpy_dtype))

    def give_up(self, variables: Sequence[keras.Variable]) -> None:
        """Leaves variables to another optimizer, from now on."""
        ids = {id(variable.value) for variable in variables}
        self._given_up |= {index for index, each in enumerate(self._variables) if id(each.value) in ids}

    @property
    def variables(self) -> tuple[keras.Variable, ...]:
        return self._variables

    @property
    def has_pushed(self) -> bool:
        """Whether something of this step has been pushed."""
        return bool(self._pushed)

    @property
    def is_in_use(self) -> bool:
        """Whether it trains variables that no other optimizer does."""
        return len(self._given_up) < len(self._variables)

    def parts(self, index: int, slot: int) -> list[RemotePart]:
        """The parts of a variable, in their order.

        Args:
            index: of the variable.
            slot: 0 for the parameters, from 1 on for the optimizer's slots.
        """
        dtype = self._variables[index].value.dtype.as_numpy_dtype
        parts = [
            RemotePart(self._peers[server], self.key, (of, place, slot), held.begin, held.end, dtype)
            for of, of_message in enumerate(self._layout)
            for server, of_server in enumerate(of_message)
            for place, (held, _) in enumerate(of_server)
            if held.variable == index
        ]
        return sorted(parts, key=lambda part: part.begin)

    def assign(self, number: Number, assigned: set[int]) -> None:
        """Gives the servers parameters that the program has assigned.

        Args:
            number: of the assignment. [Note: assignments] in `keeping.py`
            assigned: ids of the variables.
        """
        for index, variable in enumerate(self._variables):
            if id(variable.value) in assigned and index not in self._given_up:
                flat = whole_of(variable.value)
                for part in self.parts(index, 0):
                    part.write(number, flat[part.begin : part.end])

    def trains(self, index: int) -> bool:
        """Whether no other optimizer trains a variable since."""
        return index not in self._given_up

    @functools.cached_property
    def counters(self) -> list[list[keras.Variable]]:
        """What each inner optimizer counts (`keras_objects.counters_of`)."""
        return [keras_objects.counters_of(each, lambda v: isinstance(v.value, RemoteSlot)) for each in self._optimizers]

    def layout(self, server: int) -> list:
        """What a server holds, as JSON."""
        return [[_as_json(held) for held, _ in of_message[server]] for of_message in self._layout]

    def is_trained(self, variable: tf.Variable) -> bool:
        """Whether a variable is one of these."""
        return any(each.value is variable for each in self._variables)

    def sent(self) -> tuple[int, int]:
        """Bytes and messages that the first replica pushes in a step, by formula."""
        size_bytes = messages = 0
        for (replica, _), number in self._numbers.items():
            parts = [part for of_server in self._layout[number] for part in of_server] if replica == 0 else []
            item_bytes = tf.as_dtype(self._dtypes[number]).size
            size_bytes += sum((held.end - held.begin) * item_bytes for held, _ in parts)
            messages += sum(bool(of_server) for of_server in self._layout[number]) if replica == 0 else 0
        return size_bytes, messages

    def _held(self, server: int) -> list[Held]:
        return [held for of_message in self._layout for held, _ in of_message[server]]


def whole_of(value: tf.Variable) -> np.ndarray:
    """The whole value of a variable of this worker's replicas, flat."""
    if not isinstance(value, ShardedParameter):
        return value.values[0].numpy().reshape(-1)
    return np.concatenate([part.numpy().reshape(-1) for part in value.values])[: value.shape.num_elements()]


def assign_whole(value: tf.Variable, flat: np.ndarray) -> None:
    """Gives all components of a variable their part of a whole value."""
    for replica, part in enumerate(value.values):
        own = flat
        if isinstance(value, ShardedParameter):
            width = part.shape.num_elements()
            own = flat[replica * width : (replica + 1) * width]
            own = np.pad(own, (0, width - len(own)))
        with tf.device(part.device):
            part.assign(own.reshape(part.shape))


def _as_json(held: Held) -> list[int]:
    return [held.variable, held.begin, held.end, held.optimizer, int(held.decays)]


def make_remote(key: int, given: Sequence[keras.Variable], variables: Sequence[keras.Variable],
                optimizers: Sequence[keras.optimizers.Optimizer], plan: Plan, strategy: Any) -> "Remote":  # fmt: skip
    """The remote of the variables that optimizers are built for.

    Raises:
        ValueError: for variables and optimizers that servers cannot serve.
    """
    _check(given, variables, optimizers, plan, strategy.settings.serving.is_synchronous)
    return Remote(key, variables, plan, optimizers, strategy.served.peers, strategy.settings.min_shard_elements)


def _check(given: Sequence[keras.Variable], variables: Sequence[keras.Variable],
           optimizers: Sequence[keras.optimizers.Optimizer], plan: Plan, is_synchronous: bool) -> None:  # fmt: skip
    refused = ["use_ema", "gradient_accumulation_steps", *(["clipnorm", "global_clipnorm"] if is_synchronous else [])]
    settings = [name for name in refused for each in optimizers if getattr(each, name, None)]
    if settings:
        why = "which is the sum of all workers' gradients there" if "clip" in settings[0] else "in parts"
        raise ValueError(
            f"Servers update variables by each gradient that they get, {why}, and cannot serve {settings}. Leave that "
            "away, or leave the servers away."
        )
    if not all(spec.elementwise for spec in plan.specs):
        names = sorted({type(optimizers[spec.optimizer]).__name__ for spec in plan.specs if not spec.elementwise})
        raise ValueError(
            f"Servers hold parts of variables, and {names} is not known to treat every element by itself. Use SGD, "
            "Adam or another element-wise optimizer of Keras, or leave the servers away."
        )
    rates = [keras_objects.own_rate(each) for each in optimizers]
    if any(callable(rate) and not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) for rate in rates):
        raise ValueError(
            "Servers cannot call a function for a learning rate. Use a number, or a schedule of `keras.optimizers`."
        )
    constrained = [variable.path for variable in variables if variable.constraint is not None]
    if constrained:
        raise ValueError(
            f"The variables {constrained[:3]} have constraints, which servers cannot apply to their parts. Leave the "
            "constraints or the servers away."
        )
    if len(given) > len(variables):
        raise ValueError(
            "Variables that are overwritten by their gradients, as in float8 layers, cannot be served. Leave the "
            "servers away."
        )
