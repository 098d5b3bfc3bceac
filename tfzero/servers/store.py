"""What one server holds of one optimizer's variables: masters and slots, and Keras's own updates of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.host import keras_objects, runtime
from tfzero.training.stock_optimizers import is_elementwise, update_part

# Configs come over the network, and Keras imports the modules that they name.
_MODULES = ("keras.optimizers", "keras.optimizers.schedules")


@dataclass(frozen=True)
class Held:
    """A part of a variable that the server holds and updates by itself.

    Args:
        variable: index of the variable among those of the optimizer.
        begin, end: its flat elements.
        optimizer: index of the inner optimizer.
        decays: whether the optimizer's weight decay applies.
    """

    variable: int
    begin: int
    end: int
    optimizer: int
    decays: bool

    @classmethod
    def read(cls, value: Any) -> "Held":
        """From JSON."""
        variable, begin, end, optimizer, decays = map(int, value)
        return cls(variable, begin, end, optimizer, bool(decays))


@dataclass(frozen=True)
class Definition:
    """What all workers must define alike.

    Args:
        optimizers: Keras's configs of the inner optimizers.
        messages: the parts that each message holds, in its order. A message has one dtype.
        dtypes: of the messages.
        names: of the variables, for messages.
    """

    optimizers: list[dict]
    messages: list[list[Held]]
    dtypes: list[str]
    names: list[str]

    @classmethod
    def read(cls, value: Any) -> "Definition":
        """From JSON.

        Raises:
            ValueError: if it is none.
        """
        try:
            messages = [[Held.read(held) for held in message] for message in value["messages"]]
            dtypes = [tf.as_dtype(name).name for name in value["dtypes"]]
            read = cls(list(value["optimizers"]), messages, dtypes, list(map(str, value["names"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"A worker defines nothing that can be read ({type(error).__name__}: {error}).") from None
        whole = all(0 <= held.begin <= held.end for message in messages for held in message)
        if not whole or len(dtypes) != len(messages) or not all(tf.as_dtype(dtype).is_floating for dtype in dtypes):
            raise ValueError("A worker defines messages that do not fit together.")
        return read

    def widths(self, message: int) -> list[int]:
        """Number of elements of each part."""
        return [held.end - held.begin for held in self.messages[message]]

    def places(self, message: int, chosen: Any) -> tuple[int, ...]:
        """The parts of a message that another process names; None for all.

        Raises:
            ValueError: if there are no such parts, or not in this order.
        """
        if not 0 <= message < len(self.messages):
            raise ValueError(f"There is no message {message}, only {len(self.messages)} of them.")
        parts = range(len(self.messages[message]))
        places = tuple(parts) if chosen is None else tuple(map(int, chosen))
        if list(places) != sorted(set(places) & set(parts)):
            raise ValueError(f"The message {message} has {len(parts)} parts. Received: {places}")
        return places

    def empty(self, message: int, active: Sequence[int] | None = None) -> np.ndarray:
        """An array for the parts of a message, or for some of them."""
        widths = self.widths(message)
        elements = sum(widths if active is None else [widths[place] for place in active])
        return np.empty(elements, tf.as_dtype(self.dtypes[message]).as_numpy_dtype)


class Store:
    """Masters and slots of one optimizer's variables on one server.

    Args:
        definition: what it holds.
        values: the first values of each message.

    Raises:
        ValueError: for optimizers that cannot be made, or are not known to be element-wise.
    """

    def __init__(self, definition: Definition, values: Sequence[np.ndarray]) -> None:
        self.definition = definition
        self.optimizers = [_make(config) for config in definition.optimizers]
        self._masters: list[list[keras.Variable]] = []
        for number, (message, flat) in enumerate(zip(definition.messages, values, strict=True)):
            parts = np.split(flat, np.cumsum(definition.widths(number))[:-1]) if message else []
            self._masters.append(
                [
                    keras.Variable(part, dtype=definition.dtypes[number], name=f"{number}_{place}")
                    for place, part in enumerate(parts)
                ]
            )
        for index, optimizer in enumerate(self.optimizers):
            optimizer.build([master for master, held in self._all() if held.optimizer == index])
        made = [variable for optimizer in self.optimizers for variable in optimizer.variables]
        self._parts = {  # by message and place: the master, and its slots in the order of their creation
            (number, place): [master, *(v for v in made if v.name.startswith(f"{master.name}_"))]
            for number, masters in enumerate(self._masters)
            for place, master in enumerate(masters)
        }
        slots = {id(slot) for parts in self._parts.values() for slot in parts[1:]}
        self._counters = [keras_objects.counters_of(each, lambda v: id(v) in slots) for each in self.optimizers]
        self._functions: dict[Any, Callable] = {}
        self._has_begun = [False] * len(self.optimizers)

    def _all(self) -> list[tuple[keras.Variable, Held]]:
        return [
            pair
            for masters, message in zip(self._masters, self.definition.messages, strict=True)
            for pair in zip(masters, message, strict=True)
        ]

    @property
    def held_bytes(self) -> int:
        """Bytes of masters and slots."""
        variables = [master for master, _ in self._all()] + [v for each in self.optimizers for v in each.variables]
        return sum(variable.value.shape.num_elements() * variable.value.dtype.size for variable in variables)

    def values(self, message: int) -> np.ndarray:
        """The parameters of a message now, `[elements]`."""
        parts = [master.numpy() for master in self._masters[message]]
        return np.concatenate(parts) if parts else self.definition.empty(message)

    def part(self, message: int, place: int, slot: int) -> keras.Variable:
        """What is held for a part of a message.

        Args:
            message: its number.
            place: of the part in it.
            slot: 0 for the parameters, from 1 on for the optimizer's slots.

        Raises:
            ValueError: if there is no such slot.
        """
        parts = self._parts[message, place]
        if not 0 <= slot < len(parts):
            raise ValueError(f"There is no slot {slot} of a variable, only {len(parts) - 1} of them.")
        return parts[slot]

    def copy(self) -> dict[tuple[int, int, int], np.ndarray]:
        """Copies of all that `part` gives, by message, place and slot."""
        return {(*where, slot): part.numpy() for where, parts in self._parts.items() for slot, part in enumerate(parts)}

    @property
    def scalars(self) -> list[list[float]]:
        """By optimizer, what it counts (`keras_objects.counters_of`), and whether an update has begun."""
        counted = [[float(each.numpy()) for each in counters] for counters in self._counters]
        return [[*values, float(begun)] for values, begun in zip(counted, self._has_begun, strict=True)]

    @scalars.setter
    def scalars(self, values: Sequence[Sequence[float]]) -> None:
        for index, (*counted, begun) in enumerate(values):
            for variable, value in zip(self._counters[index], counted, strict=True):
                variable.assign(value)
            self._has_begun[index] = bool(begun)

    def update(self, message: int, active: Sequence[int], gradient: np.ndarray, rates: Mapping[int, float],
               divisor: int = 1) -> None:  # fmt: skip
        """Updates parts of a message.

        Args:
            message: its number.
            active: the parts that have a gradient, in their order.
            gradient: their gradients, `[elements]`.
            rates: learning rates by inner optimizer; one that follows a schedule is missing.
            divisor: of the learning rates, in this update.
        """
        used = sorted({self.definition.messages[message][place].optimizer for place in active})
        for index in used:
            optimizer = self.optimizers[index]
            if index in rates:
                optimizer.learning_rate = rates[index]
            if not self._has_begun[index]:
                self._has_begun[index] = True
                runtime.begin_update(optimizer, keras_objects.rate_now(optimizer))
        key = message, tuple(active)
        if key not in self._functions:
            self._functions[key] = tf.function(
                lambda *given: self._update(message, active, *given), autograph=False, jit_compile=True
            )
        given_rates = [keras_objects.rate_now(self.optimizers[index]) / divisor for index in used]
        self._functions[key](tf.constant(gradient), *given_rates)

    def _update(self, message: int, active: Sequence[int], gradient: tf.Tensor, *rates: tf.Tensor) -> None:
        held, masters = self.definition.messages[message], self._masters[message]
        widths = [held[place].end - held[place].begin for place in active]
        used = sorted({held[place].optimizer for place in active})
        for place, part in zip(active, tf.split(gradient, widths), strict=True):
            index = held[place].optimizer
            rate = rates[used.index(index)]
            update_part(self.optimizers[index], masters[place], part, rate, held[place].decays)

    def count(self) -> None:
        """Ends an update of all messages."""
        for index, optimizer in enumerate(self.optimizers):
            counter = runtime.iteration_counter(optimizer)
            counter.assign(counter + 1)
            self._has_begun[index] = False


def _make(config: Any) -> keras.optimizers.Optimizer:
    """An optimizer from its config, which must name Keras's own classes."""
    strange = [module for module in _modules(config) if module not in _MODULES]
    if strange:
        raise ValueError(
            f"Servers make Keras's own optimizers and learning-rate schedules, but this one has classes of {strange}. "
            "Use one of Keras's own, or leave the servers away."
        )
    optimizer = keras.saving.deserialize_keras_object(copy.deepcopy(config))  # which changes what it is given
    if not isinstance(optimizer, keras.optimizers.Optimizer) or not is_elementwise(optimizer):
        raise ValueError(
            f"Servers hold parts of variables, and {type(optimizer).__name__} is not known to treat every element by "
            "itself. Use SGD, Adam or another element-wise optimizer of Keras, or leave the servers away."
        )
    return optimizer


def _modules(config: Any) -> list[str]:
    """The modules that a config names, and whatever else in it is no class of Keras's own."""
    if isinstance(config, dict):
        own = []
        if "class_name" in config:
            own = [str(config.get("module"))]
            own += [str(config["registered_name"])] if config.get("registered_name") else []
        return own + [module for value in config.values() for module in _modules(value)]
    return [module for value in config for module in _modules(value)] if isinstance(config, list) else []
