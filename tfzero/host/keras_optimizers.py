"""Which methods of Keras's optimizers tfzero replaces. See `host/registry.py`."""

from keras import optimizers
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer

# Parts of `apply` that `training/walk.py` does itself. Nothing calls them, so an override would have no effect.
REPLACED = (
    "apply", "apply_gradients", "_backend_apply_gradients", "_backend_update_step", "_clip_gradients", "_clip_by_norm",
    "_backend_reset_gradient_accumulators", "_backend_increment_gradient_accumulators", "_filter_empty_gradients",
    "_overwrite_variables_directly_with_gradients", "_overwrite_model_variables_with_average_value",
    "_update_model_variables_moving_average",
)  # fmt: skip
REPLACED_OF_LOSS_SCALE = ("check_finite", "_tf_apply", "_stateful_handle_finite_grads")
__all__ = ["REPLACED", "REPLACED_OF_LOSS_SCALE", "BaseOptimizer", "LossScaleOptimizer", "overrides", "present"]


def present(*names: str) -> tuple[type[BaseOptimizer], ...]:
    """The optimizers of these names that the installed Keras has (ScheduleFreeAdamW since 3.14)."""
    return tuple(getattr(optimizers, name) for name in names if hasattr(optimizers, name))


def overrides(optimizer: BaseOptimizer) -> list[str]:
    """Methods without effect that a class outside of Keras, or the object itself, gives an optimizer."""
    own = [vars(each) for each in type(optimizer).__mro__ if not f"{each.__module__}.".startswith("keras.")]
    kept = {id(value) for each in own for value in each.values() if callable(value)}
    names = [*REPLACED, *REPLACED_OF_LOSS_SCALE]
    found = [name for name in names if id(getattr(type(optimizer), name, None)) in kept]
    return found + [name for name in names if name in vars(optimizer)]
