"""Compares a model's own training step, sharded and on one device."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from tfzero.checkpoint.state import LocalValues, state_of
from tfzero.checkpoint.teamwork import together
from tfzero.host import versions
from tfzero.plan.settings import check_number
from tfzero.strategy import ZeroStrategy

# Differences that rounding explains, relative and absolute, by the compute dtype of Keras's global policy.
_TOLERANCES = {"float32": (2e-4, 2e-5), "float64": (2e-4, 2e-5), "bfloat16": (2e-2, 2e-2), "float16": (1e-2, 1e-2)}
_COPY_SECONDS = 24 * 3600.0  # how long the others wait for the copy; a lost worker is named sooner


@dataclass(frozen=True)
class Difference:
    """How far one variable is from its value on one device.

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
    """What `audit` found. `bool(audit)` tells whether all agree.

    Args:
        steps: number of steps trained.
        differences: one for each float variable; first those that rounding does not explain, then by size.
    """

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
    """Trains a model and a one-device copy of it for some steps, and compares all variables and slots.

    All workers call it with the same batch. Afterwards the model has its former values, metrics in progress included.
    The first worker needs memory for a whole copy, and time to train it; the others wait.

    Args:
        model: a compiled and built model of a `ZeroStrategy` that `keras.models.clone_model` can copy.
        batch: `(x, y)` or `(x, y, sample_weight)`: a global batch, as for `train_on_batch`.
        steps: number of steps that both train with it.

    Returns:
        An `Audit`, the same on all workers.

    Raises:
        ValueError: for a model of another strategy, or one that is not built or not compiled; on all workers, if the
            copy cannot be made or trained.

    Example:

    ```python
    found = tfzero.audit(model, (x[:16], y[:16]))
    print(found)
    assert found, found.differences[0].name
    ```
    """
    versions.refuse_keras_2(model)
    strategy = model.distribute_strategy
    check_number("steps", steps, int, 1)
    if not isinstance(strategy, ZeroStrategy):
        raise ValueError(f"`audit` takes a model of a ZeroStrategy. Received one of {type(strategy).__name__}.")
    if strategy.settings.merging is not None:
        raise ValueError(
            "`audit` compares steps with those of one device, but with `sync_every` workers train apart, with another "
            "result. Audit the model under a strategy without `sync_every`."
        )
    if not model.built or getattr(model, "optimizer", None) is None:
        raise ValueError("`audit` takes a model that is compiled and built: call `compile` and `build` first.")
    model.optimizer.build(model.trainable_variables)
    tolerance = _TOLERANCES.get(keras.config.dtype_policy().compute_dtype, _TOLERANCES["float32"])
    values = _values_of(model)
    copies: list[keras.Model] = []  # one on the first worker

    def copy_model() -> None:
        if strategy.extended.should_checkpoint:
            copies.append(_copy_of(model, values))

    def train_copy() -> list | None:
        for copy in copies:
            return _compare_all(_variables_of(model), after, _trained(copy, batch, steps), tolerance)
        return None

    together(strategy.channel, "copying a model to audit it", copy_model, _COPY_SECONDS)
    values.clear()
    with _kept(model):
        after = _trained(model, batch, steps)
    found = together(strategy.channel, "training the copy of an audit", train_copy, _COPY_SECONDS)[0]
    differences = sorted((Difference(*each) for each in found), key=lambda d: (d.is_rounding, -d.largest))
    return Audit(steps, tuple(differences))


@contextlib.contextmanager
def _kept(model: keras.Model) -> Iterator[None]:
    """Restores all values of a model on exit, whatever happens within it: each replica's own, metrics too."""
    kept = LocalValues(item.variable for item in state_of(model))
    try:
        yield
    finally:
        model.reset_metrics()  # also those made meanwhile
        kept.restore()


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


def _trained(model: keras.Model, batch: Sequence, steps: int) -> list[np.ndarray]:
    """Trains some steps with one batch. Returns all values."""
    for _ in range(steps):
        model.train_on_batch(*batch)
    return _values_of(model)


def _compare_all(
    variables: Sequence[keras.Variable], mine: Sequence, theirs: Sequence, tolerance: tuple[float, float]
) -> list[list]:
    return [
        _compare(variable.path, ours, other, tolerance)
        for variable, ours, other in zip(variables, mine, theirs, strict=True)
        if np.issubdtype(ours.dtype, np.floating)
    ]


def _compare(name: str, mine: np.ndarray, theirs: np.ndarray, tolerance: tuple[float, float]) -> list:
    relative, absolute = tolerance
    gap = np.abs(mine.astype("float64") - theirs.astype("float64"))
    is_rounding = bool(np.all(gap <= absolute + relative * np.abs(theirs)))  # NaN is no rounding
    return [name, float(np.max(gap, initial=0.0)), is_rounding]
