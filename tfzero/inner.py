"""What is inside a ZeroOptimizer: Keras's own optimizers, and what they are known for."""

from keras import optimizers as ko

from tfzero import _compat
from tfzero.agreement import by_path, describe
from tfzero.compression import Codec
from tfzero.plan import VariableSpec
from tfzero.variables import ShardedParameter

# Optimizers whose `update_step` treats every element by itself, checked by reading each; a subclass that keeps the
# method keeps the property.
_ELEMENTWISE = (
    ko.SGD, ko.RMSprop, ko.Adam, ko.AdamW, ko.Adadelta, ko.Adagrad, ko.Adamax,
    ko.Nadam, ko.Ftrl, ko.Lion, ko.ScheduleFreeAdamW,
)  # fmt: skip
# Optimizers that need the whole tensor, and that XLA compiles.
_WHOLE_TENSOR = (ko.Adafactor, ko.Lamb, ko.Muon)
_ELEMENTWISE_STEPS = {optimizer.update_step for optimizer in _ELEMENTWISE}
_COMPILED_STEPS = _ELEMENTWISE_STEPS | {optimizer.update_step for optimizer in _WHOLE_TENSOR}
# Optimizers that hold others.
CONTAINERS = (ko.LossScaleOptimizer, _compat.MultiOptimizer)


def chain(optimizer) -> list:
    """An optimizer and all inside it."""
    if isinstance(optimizer, ko.LossScaleOptimizer):
        return [optimizer, *chain(optimizer.inner_optimizer)]
    if isinstance(optimizer, _compat.MultiOptimizer):
        return [optimizer, *optimizer.optimizers]
    return [optimizer]


def check_wrappable(optimizer) -> None:
    """
    Raises:
        TypeError: if it is no Keras optimizer, or one that overrides the whole of `apply`.
        ValueError: if it has been built.
    """
    if not isinstance(optimizer, ko.Optimizer):
        raise TypeError(f"ZeroOptimizer wraps a Keras optimizer, but received {optimizer!r}.")
    name = type(optimizer).__name__
    if not isinstance(optimizer, CONTAINERS) and _compat.overridden_apply(optimizer):
        raise TypeError(
            f"{name} overrides the whole of `apply`, so its parts cannot run in shards. Override `update_step` "
            "instead, and leave clipping, weight decay and accumulation to the base class."
        )
    if optimizer.built:
        raise ValueError(
            f"The optimizer {optimizer.name!r} ({name}) has been built already, with whole slots or for another "
            "strategy. Pass a new one, for example `type(optimizer).from_config(optimizer.get_config())`."
        )


def chooser(optimizer):
    """A function that gives the optimizer of a variable."""
    if isinstance(optimizer, _compat.MultiOptimizer):
        return lambda variable: _compat.optimizer_for(optimizer, variable)
    return lambda variable: optimizer


def spec(variable, optimizers: list, optimizer, codec: Codec | None) -> VariableSpec:
    """What the plan needs to know of a variable that `optimizer`, one of `optimizers`, trains.

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
    """An optimizer's `get_config`; a learning rate that has none stands in it as the object that it is.

    Keras asks a schedule for `get_config` only when it saves a model, so many a schedule has none.
    """
    try:
        return optimizer.get_config()
    except (NotImplementedError, TypeError, ValueError):
        learning_rate = optimizer.__dict__.get("_learning_rate")
        if not callable(learning_rate):
            raise
        # Without it the rest can be asked for, of a subclass too.
        optimizer.__dict__["_learning_rate"] = None
        try:
            return optimizer.get_config() | {"learning_rate": learning_rate}
        finally:
            optimizer.__dict__["_learning_rate"] = learning_rate


def settings_of(links: list) -> dict:
    """What workers must agree on: the classes and their settings, but not names counted up per process."""
    settings = {}
    for place, optimizer in enumerate(links):
        where = f"{place}" if len(links) > 1 else ""
        is_container = isinstance(optimizer, CONTAINERS)
        settings |= by_path({"class": type(optimizer).__name__} if is_container else describe(optimizer), where)
    return {path: value for path, value in settings.items() if not path.endswith("name")}


def is_elementwise(optimizer) -> bool:
    """Whether it is known to treat every element by itself."""
    return type(optimizer).update_step in _ELEMENTWISE_STEPS


def is_compiled(optimizer) -> bool:
    """Whether XLA compiles its update."""
    return type(optimizer).update_step in _COMPILED_STEPS
