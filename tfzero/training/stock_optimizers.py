"""The optimizers inside a ZeroOptimizer: Keras's own, and their known properties."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import optimizers as ko

from tfzero.collectives.codec import Codec
from tfzero.host import keras_objects, keras_optimizers, runtime, versions
from tfzero.plan.placement import Plan, VariableSpec
from tfzero.variables.classes import ShardedParameter, VariableView
from tfzero.variables.creation import VariableCreation
from tfzero.variables.remote_slots import RemoteSlotsView
from tfzero.workers.agreement import by_path, describe

# Optimizers whose `update_step` treats every element separately; each was checked by reading it. A subclass that keeps
# the method keeps the property.
_ELEMENTWISE = (
    ko.SGD, ko.RMSprop, ko.Adam, ko.AdamW, ko.Adadelta, ko.Adagrad, ko.Adamax,
    ko.Nadam, ko.Ftrl, ko.Lion, *keras_optimizers.present("ScheduleFreeAdamW"),
)  # fmt: skip
# Optimizers that need the whole tensor, and that XLA compiles.
_WHOLE_TENSOR = (ko.Adafactor, ko.Lamb, ko.Muon)
_ELEMENTWISE_STEPS = {optimizer.update_step for optimizer in _ELEMENTWISE}
_COMPILED_STEPS = _ELEMENTWISE_STEPS | {optimizer.update_step for optimizer in _WHOLE_TENSOR}
# Optimizers that hold others.
CONTAINERS = (ko.LossScaleOptimizer, runtime.MultiOptimizer)


def chain(optimizer: ko.Optimizer) -> list:
    """An optimizer and all optimizers inside it."""
    if isinstance(optimizer, ko.LossScaleOptimizer):
        return [optimizer, *chain(optimizer.inner_optimizer)]
    if isinstance(optimizer, runtime.MultiOptimizer):
        return [optimizer, *optimizer.optimizers]
    return [optimizer]


def check_wrappable(optimizer: object) -> None:
    """Checks that ZeroOptimizer can wrap an optimizer.

    Raises:
        TypeError: if it is no Keras optimizer, or if it overrides methods that tfzero replaces.
        ValueError: if it has been built.
    """
    versions.refuse_keras_2(optimizer)
    if not isinstance(optimizer, ko.Optimizer):
        raise TypeError(f"ZeroOptimizer wraps a Keras optimizer, but received {optimizer!r}.")
    name = type(optimizer).__name__
    overridden = keras_optimizers.overrides(optimizer)
    if overridden:
        what = "the whole of `apply`" if "apply" in overridden else " and ".join(f"`{each}`" for each in overridden)
        raise TypeError(
            f"{name} overrides {what}, which tfzero does itself in shards, so the override would have no effect. "
            "Override `update_step` instead, and leave clipping, weight decay and accumulation to the base class."
        )
    if optimizer.built:
        raise ValueError(
            f"The optimizer {optimizer.name!r} ({name}) has been built already, with whole slots or for another "
            "strategy. Pass a new one, for example `type(optimizer).from_config(optimizer.get_config())`."
        )


def chooser(optimizer: ko.Optimizer) -> Callable[[keras.Variable], ko.Optimizer]:
    """A function that returns the optimizer of a variable."""
    if isinstance(optimizer, runtime.MultiOptimizer):
        return lambda variable: runtime.optimizer_for(optimizer, variable)
    return lambda variable: optimizer


def counting(chained: Sequence[ko.Optimizer], chosen: Iterable[ko.Optimizer]) -> tuple:
    """The optimizers of `chained` that count steps: those `chosen` for variables, and a `MultiOptimizer`."""
    chosen = list(chosen)
    return tuple(each for each in chained if isinstance(each, runtime.MultiOptimizer) or each in chosen)


def spec(variable: keras.Variable, optimizers: list, optimizer: ko.Optimizer, codec: Codec | None) -> VariableSpec:
    """The facts that the plan needs about a variable that `optimizer`, one of `optimizers`, trains.

    Raises:
        ValueError: if its dtype cannot be trained.
    """
    dtype = variable.value.dtype
    if not dtype.is_floating:
        raise ValueError(
            f"The trainable variable {variable.path!r} is of dtype {dtype.name}, which cannot be trained. "
            "Create it with `trainable=False` or with a float dtype."
        )
    return VariableSpec(
        name=variable.path,
        elements=variable.shape.num_elements(),
        dtype=dtype.name,
        item_bytes=dtype.size,
        elementwise=is_elementwise(optimizer),
        optimizer=optimizers.index(optimizer),
        sharded_parameter=isinstance(variable.value, ShardedParameter),
        compressed=(
            codec is not None
            and dtype.name == "float32"
            and variable.constraint is None
            and codec.serves(variable.shape, dtype)
        ),
    )


def config_of(optimizer: ko.Optimizer) -> dict:
    """An optimizer's `get_config`; a learning rate without a config appears in it as the object itself.

    Keras asks a schedule for `get_config` only when it saves a model, so many schedules have none.
    """
    try:
        return optimizer.get_config()
    except (NotImplementedError, TypeError, ValueError):
        learning_rate = keras_objects.own_rate(optimizer)
        if not callable(learning_rate):
            raise
        # Without the learning rate the rest of the config can be read, also from a subclass.
        with keras_objects.without_rate(optimizer):
            return optimizer.get_config() | {"learning_rate": learning_rate}


def settings_of(chained: list) -> dict:
    """The classes and settings on which workers must agree, without names, which are counted up per process."""
    settings: dict[str, Any] = {}
    for place, optimizer in enumerate(chained):
        where = f"{place}" if len(chained) > 1 else ""
        is_container = isinstance(optimizer, CONTAINERS)
        settings |= by_path({"class": type(optimizer).__name__} if is_container else describe(optimizer), where)
    return {path: value for path, value in settings.items() if not path.endswith("name")}


def is_elementwise(optimizer: ko.Optimizer) -> bool:
    """Whether it is known to treat every element separately."""
    return type(optimizer).update_step in _ELEMENTWISE_STEPS


def is_compiled(optimizer: ko.Optimizer) -> bool:
    """Whether XLA compiles its update."""
    return type(optimizer).update_step in _COMPILED_STEPS


def update_part(optimizer: ko.Optimizer, part: keras.Variable, gradient: tf.Tensor, rate: tf.Tensor,
                decays: bool = True) -> None:  # fmt: skip
    """Updates a part of a variable by an element-wise optimizer, as Keras's `apply` updates the whole.

    Args:
        optimizer: one that is built for the part.
        part: the part.
        gradient: of the part, in its shape.
        rate: the learning rate.
        decays: whether the optimizer's weight decay applies.
    """
    if decays:
        runtime.decay_weight(optimizer, part)
    if optimizer.clipvalue:
        gradient = tf.clip_by_value(gradient, -optimizer.clipvalue, optimizer.clipvalue)
    optimizer.update_step(gradient, part, rate)


def strategy_of(variables: Sequence[keras.Variable]) -> tf.distribute.Strategy:
    """The one ZeroStrategy of all variables; without variables, the current strategy.

    Raises:
        ValueError: if there are several, or none.
    """
    found = [getattr(v.value, "distribute_strategy", None) for v in variables] or [tf.distribute.get_strategy()]
    strategies = {id(strategy): strategy for strategy in found}
    strategy = next(iter(strategies.values()), None)
    if len(strategies) != 1 or not hasattr(strategy, "settings"):
        names = sorted({type(s).__name__ for s in strategies.values()})
        raise ValueError(
            "A ZeroOptimizer trains variables of one ZeroStrategy, but these belong to "
            f"{len(strategies)} strategies ({', '.join(names)}; NoneType is none). "
            "Create the whole model under `with strategy.scope():` of the same strategy."
        )
    return strategy


class Home:
    """The distribution strategy as an inner optimizer sees it: it makes slots in shards and runs updates in place."""

    def __init__(self, wrapper: Any, strategy: tf.distribute.Strategy) -> None:
        self.wrapper = wrapper
        self.strategy = strategy
        self.extended = self

    def colocate_vars_with(self, view: VariableView) -> contextlib.AbstractContextManager:
        """Context in which new slots belong to the view's variable."""
        return self.strategy.extended.colocate_vars_with(view)

    def update(self, variable: tf.Variable, function: Callable, args: tuple = (), kwargs: dict | None = None,
               group: bool = True) -> Any:  # fmt: skip
        """Runs an update where the variable is; distributed variables accept a whole value."""
        del group
        if args and args[0] is None:  # a variable without a moving average; Keras would assign it anyway
            return None
        return function(variable, *args, **(kwargs or {}))


def make_views(variables: Sequence[keras.Variable], plan: Plan, is_served: bool) -> list[VariableView]:
    """Variables as an optimizer sees them that makes its slots, here or for parameter servers."""
    view = RemoteSlotsView if is_served else VariableView
    return [view(variable, plan, index) for index, variable in enumerate(variables)]


class ViewsAtHand(list):
    """Views that tell the strategy which of them an optimizer's loop has reached.

    Adafactor makes slots of its own shapes without naming the variable that they belong to.
    """

    def __init__(self, views: Iterable[VariableView], creation: VariableCreation) -> None:
        super().__init__(views)
        self._creation = creation

    def __iter__(self) -> Iterator[VariableView]:
        for view in super().__iter__():
            self._creation.view_at_hand = view
            yield view
        self._creation.view_at_hand = None
