"""A model's own training step, sharded and on one device, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from tfzero.settings import check_number
from tfzero.strategy import ZeroStrategy

# What rounding explains: relative and absolute, by the widest float that the model computes in.
_TOLERANCES = {"float32": (2e-4, 2e-5), "float64": (2e-4, 2e-5), "bfloat16": (2e-2, 2e-2), "float16": (1e-2, 1e-2)}


@dataclass(frozen=True)
class Difference:
    """How far one variable is from one device.

    Args:
        name: its path.
        largest: the largest absolute difference of an element.
        is_rounding: whether rounding explains it.
    """

    name: str
    largest: float
    is_rounding: bool


@dataclass(frozen=True)
class Audit:
    """What `audit` found: one difference for each variable, the largest first. `bool(audit)` is whether they agree."""

    steps: int
    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return all(difference.is_rounding for difference in self.differences)

    def __str__(self) -> str:
        if self:
            largest = self.differences[0]
            return (
                f"After {self.steps} steps all {len(self.differences)} variables agree with one device. The largest "
                f"difference is {largest.largest:.2g}, of {largest.name}."
            )
        lines = [f"  {d.name}: {d.largest:.3g}" for d in self.differences if not d.is_rounding]
        return (
            f"After {self.steps} steps {len(lines)} of {len(self.differences)} variables differ from one device. "
            "Random layers and BatchNormalization(synchronized=False) may; else it is an error. Largest differences:\n"
            + "\n".join(lines)
        )


def audit(model: keras.Model, batch: Sequence, steps: int = 3) -> Audit:
    """Trains a model for some steps, and a copy of it on one device, and compares all variables and slots.

    All workers call it, with the same batch. Afterwards the model has the values that it had before. The copy takes
    the memory of a whole model on the first worker.

    Args:
        model: a compiled and built model of a `ZeroStrategy` that `keras.models.clone_model` can copy.
        batch: `(x, y)` or `(x, y, sample_weight)`, as for `train_on_batch`: a global batch.
        steps: how often both train with it.

    Returns:
        An `Audit`, the same on all workers.

    Raises:
        ValueError: for a model of another strategy, or one that is not built or not compiled.

    Example:

    ```python
    found = tfzero.audit(model, (x[:16], y[:16]))
    print(found)
    assert found, found.differences[0].name
    ```
    """
    strategy = model.distribute_strategy
    check_number("steps", steps, int, 1)
    if not isinstance(strategy, ZeroStrategy):
        raise ValueError(f"`audit` takes a model of a ZeroStrategy. Received one of {type(strategy).__name__}.")
    if not model.built or getattr(model, "optimizer", None) is None:
        raise ValueError("`audit` takes a model that is compiled and built: call `compile` and `build` first.")
    model.optimizer.build(model.trainable_variables)
    before = _values_of(model)
    copy = _copy_of(model, before) if strategy.extended.should_checkpoint else None
    try:
        for _ in range(steps):
            model.train_on_batch(*batch)
        after = _values_of(model)
    finally:
        for variable, value in zip(_variables_of(model), before, strict=True):
            variable.assign(value)
    found = None
    if copy is not None:
        for _ in range(steps):
            copy.train_on_batch(*batch)
        tolerance = _TOLERANCES.get(keras.config.dtype_policy().compute_dtype, _TOLERANCES["float32"])
        found = [
            _compare(variable.path, mine, theirs, tolerance)
            for variable, mine, theirs in zip(_variables_of(model), after, _values_of(copy), strict=True)
            if np.issubdtype(mine.dtype, np.floating)
        ]
    found = strategy.channel.broadcast("auditing", found)
    differences = sorted((Difference(*each) for each in found), key=lambda d: (d.is_rounding, -d.largest))
    return Audit(steps, tuple(differences))


def _variables_of(model: keras.Model) -> list[keras.Variable]:
    return [*model.variables, *model.optimizer.variables]


def _values_of(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in _variables_of(model)]


def _copy_of(model: keras.Model, values: Sequence[np.ndarray]) -> keras.Model:
    """The same model and optimizer without a strategy, with these values."""
    copy = keras.models.clone_model(model)
    optimizer = model.optimizer.loss_scale_optimizer or model.optimizer.inner_optimizer
    config = {**model.get_compile_config(), "optimizer": keras.saving.serialize_keras_object(optimizer)}
    copy.compile_from_config(config)
    copy.optimizer.build(copy.trainable_variables)
    for variable, value in zip(_variables_of(copy), values, strict=True):
        variable.assign(value)
    return copy


def _compare(name: str, mine: np.ndarray, theirs: np.ndarray, tolerance: tuple[float, float]) -> list:
    relative, absolute = tolerance
    gap = np.abs(mine.astype("float64") - theirs.astype("float64"))
    is_rounding = bool(np.all(gap <= absolute + relative * np.abs(theirs)))  # NaN is no rounding
    return [name, float(np.max(gap, initial=0.0)), is_rounding]
