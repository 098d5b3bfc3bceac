"""The places where Keras's training must be told about replicas. Those in layers are in `keras_layers.py`.

Keras offers a strategy no hook for these, so they are patched: once, when tfzero is imported, and each asks first
whether a `ZeroStrategy` is concerned. Models of other strategies run Keras's own code.
"""

import contextlib
import functools
import inspect

import keras
import tensorflow as tf

from tfzero import _compat, losses
from tfzero.callbacks import CheckpointCallback
from tfzero.inputs import DataPosition
from tfzero.late_gathers import LateGathers
from tfzero.model_building import build_unless_the_step_does, take_in_strays
from tfzero.optimizer import Home, ZeroOptimizer
from tfzero.strategy import ZeroStrategy, mark_global
from tfzero.writing_callbacks import one_worker_writes

_EMPTY = "The data set is empty: it has no batch. Pass at least one sample."
_NO_JIT = (
    "jit_compile=True cannot work under a ZeroStrategy: XLA would make one cluster of all replicas, and has no "
    "collectives on CPU. Leave jit_compile at 'auto'; the optimizer's update is compiled by XLA anyway."
)


def strategy_of(model) -> ZeroStrategy | None:
    strategy = getattr(model, "_distribute_strategy", None)
    return strategy if isinstance(strategy, ZeroStrategy) else None


def patch(owner, name: str):
    """Decorates a function `wrapper(original, *args, **kwargs)` to stand for `owner.name`; doing it twice is once."""

    def install(wrapper):
        original = getattr(owner, name)
        if getattr(original, "_tfzero_patch", False):
            return wrapper

        @functools.wraps(original)
        def patched(*args, **kwargs):
            return wrapper(original, *args, **kwargs)

        patched._tfzero_patch = True
        setattr(owner, name, patched)
        return wrapper

    return install


# Compile: optimizer and metrics belong to the strategy, wherever they were made.


def wrap_optimizer(optimizer, strategy: ZeroStrategy):
    """The ZeroOptimizer of an optimizer: itself, the one it has, or a new one."""
    if optimizer is None or isinstance(optimizer, ZeroOptimizer):
        return optimizer
    home = _compat.home_of(optimizer)
    if isinstance(home, Home):
        if home.strategy is not strategy:
            raise ValueError(
                f"The optimizer {optimizer.name!r} has trained a model of another ZeroStrategy. Pass a new optimizer."
            )
        return home.wrapper
    return ZeroOptimizer(optimizer)


@patch(_compat.Trainer, "compile")
def _compile(original, self, *args, **kwargs):
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, *args, **kwargs)
    if kwargs.get("jit_compile") is True:
        raise ValueError(_NO_JIT)
    take_in_strays(self, strategy)
    with strategy.scope():
        result = original(self, *args, **kwargs)
        self.optimizer = wrap_optimizer(self.optimizer, strategy)
    for metric in [self._loss_tracker, *_metric_objects((args, kwargs))]:
        strategy.extended.take_in(metric.variables)
    return result


def _metric_objects(arguments) -> list[keras.metrics.Metric]:
    return [leaf for leaf in tf.nest.flatten(arguments) if isinstance(leaf, keras.metrics.Metric)]


# Steps: raw batches are cut, logs are global.


@patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "_make_function")
def _make_function(original, self, step_function):
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, step_function)
    if self.jit_compile:
        raise ValueError(_NO_JIT)
    for name, value in list(vars(self).items()):
        if isinstance(value, keras.optimizers.Optimizer) and not isinstance(value, ZeroOptimizer):
            setattr(self, name, wrap_optimizer(value, strategy))  # a GAN's other optimizers
    for metric in _flat_metrics(self.metrics):
        strategy.extended.take_in(metric.variables)
        _make_result_global(metric, strategy)
    late = LateGathers.of(self, step_function, strategy)
    function = original(self, step_function if late is None else late.step)

    def function_of_cut_batches(iterator):
        if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            function_of_cut_batches.element_spec = iterator.element_spec  # for `gradient_time.py`
        else:
            iterator = map(strategy.cut_batch, iterator)
        return function(iterator) if late is None else late.run(function, iterator)

    return function_of_cut_batches


@patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "predict_on_batch")
def _predict_on_batch(original, self, x):
    strategy = strategy_of(self)
    return original(self, x if strategy is None else strategy.cut_batch(x))


def _flat_metrics(metrics) -> list[keras.metrics.Metric]:
    """Metrics and, for those that hold others, the held ones."""
    flat = []
    for metric in metrics:
        held = getattr(metric, "metrics", None)
        flat += _flat_metrics(held) if held else [metric]
    return flat


def _make_result_global(metric: keras.metrics.Metric, strategy: ZeroStrategy) -> None:
    """Within a replica, lets `metric.result()` speak of all replicas; each counts its own part."""
    if getattr(metric.result, "_tfzero_global", False):
        return
    original = metric.result

    @functools.wraps(original)
    def result():
        extended = losses.current_extended()
        if extended is None or not metric.variables:
            return original()
        reduced = _sum_over_replicas([v.value for v in metric.variables], extended)
        with keras.StatelessScope(state_mapping=zip(metric.variables, reduced, strict=True)):
            return tf.nest.map_structure(lambda value: mark_global(tf.identity(value)), original())

    result._tfzero_global = True
    object.__setattr__(metric, "result", result)


def _sum_over_replicas(values, extended) -> list[tf.Tensor]:
    """One all-reduce for all values of a dtype."""
    tensors = [tf.convert_to_tensor(value) for value in values]
    reduced: list = [None] * len(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = tf.concat([tf.reshape(tensors[k], [-1]) for k in members], 0)
        flat = extended.replica_collective(extended.group.all_reduce, flat)
        parts = tf.split(flat, [tensors[k].shape.num_elements() for k in members])
        for k, part in zip(members, parts, strict=True):
            reduced[k] = tf.reshape(part, tensors[k].shape)
    return reduced


# Losses: a global divisor.


@patch(_compat.Trainer, "_compute_loss")
def _compute_loss(original, self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    extended = losses.current_extended()
    arguments = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight, "training": training}
    if extended is None:
        return original(self, **arguments)
    rows = next((leaf.shape[0] for leaf in tf.nest.flatten(y_pred) if leaf.shape.rank), None)
    with losses.local_unit(batch_is_static=rows is not None):
        loss = original(self, **arguments)
    return losses.scale(loss, extended)


@patch(_compat.keras_loss, "reduce_weighted_values")
def _reduce_weighted_values(
    original, values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None
):
    extended = losses.current_extended()
    if extended is None:
        return original(values, sample_weight=sample_weight, mask=mask, reduction=reduction, dtype=dtype)
    return losses.reduce_loss(values, sample_weight, mask, reduction, dtype, extended)


@patch(_compat.keras_loss, "scale_loss_for_distribution")
def _scale_loss(original, value):
    extended = losses.current_extended()
    return original(value) if extended is None else losses.scale(value, extended)


@patch(_compat.keras_loss, "unscale_loss_for_distribution")
def _unscale_loss(original, value):
    extended = losses.current_extended()
    return original(value) if extended is None else losses.unscale(value, extended)


# Input.


@patch(_compat.keras_tensorflow_trainer.TFEpochIterator, "__init__")
def _epoch_iterator(original, self, distribute_strategy=None, *args, **kwargs):
    if not isinstance(distribute_strategy, ZeroStrategy):
        return original(self, distribute_strategy, *args, **kwargs)
    # Of the training data, if a callback goes on from a checkpoint: they come first.
    position, distribute_strategy.data_position = distribute_strategy.data_position, None
    with distribute_strategy.agreed_randomness(position):
        original(self, distribute_strategy, *args, **kwargs)
    self._tfzero_position = position
    if self.num_batches == 0:
        raise ValueError(_EMPTY)
    distribute_strategy.channel.agree("reading data", _compat.length_of(self), "data sets")


@patch(_compat.keras_tensorflow_trainer.TFEpochIterator, "_enumerate_iterator")
def _enumerate_iterator(original, self):
    """At first passes over the epochs and batches that a checkpoint has behind it."""
    position = self.__dict__.pop("_tfzero_position", None) or DataPosition()
    for _ in range(position.epochs):
        steps = original(self)
        if self.steps_per_epoch:  # one iterator serves all epochs
            _compat.draw_batches(self, steps, None)
        else:  # a new one shuffles anew when it gives its first batch
            _compat.draw_batches(self, steps, 1)
            steps.close()
            _compat.end_epoch(self, position.epoch_batches)
    steps = original(self)
    _compat.draw_batches(self, steps, position.batches)
    yield from steps


def _bind(original, model, args, kwargs) -> inspect.BoundArguments:
    """A call's arguments by name. Of several workers the first one shows progress: logs are the same on all."""
    call = inspect.signature(original).bind(model, *args, **kwargs)
    if not strategy_of(model).extended.should_checkpoint:
        call.arguments["verbose"] = 0
    return call


def _evaluate_or_predict(original, self, *args, **kwargs):
    if strategy_of(self) is None:
        return original(self, *args, **kwargs)
    call = _bind(original, self, args, kwargs)
    with one_worker_writes(_flat_callbacks(call.arguments.get("callbacks")), strategy_of(self)):
        return original(*call.args, **call.kwargs)


patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "evaluate")(_evaluate_or_predict)
patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "predict")(_evaluate_or_predict)


class _Announcement(keras.callbacks.Callback):
    """Prints the report's summary, once for each optimizer."""

    def on_train_begin(self, logs=None):
        strategy, optimizer = strategy_of(self.model), self.model.optimizer
        if optimizer is not None and optimizer not in strategy.announced:
            strategy.announced.add(optimizer)
            print(strategy.report().summary(), flush=True)


@patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "fit")
def _fit(original, self, *args, **kwargs):
    """Adds the report, and tells a callback of checkpoints before data are prepared and after all others have ended."""
    if strategy_of(self) is None:
        return original(self, *args, **kwargs)
    call = _bind(original, self, args, kwargs)
    with one_worker_writes(_flat_callbacks(call.arguments.get("callbacks")), strategy_of(self)):
        return _fit_bound(original, self, call)


def _fit_bound(original, self, call: inspect.BoundArguments):
    strategy = strategy_of(self)
    given = call.arguments.get("callbacks")
    if call.arguments.get("verbose", "auto") in ("auto", 1) and not isinstance(given, keras.callbacks.CallbackList):
        call.arguments["callbacks"] = [*_flat_callbacks(given), _Announcement()]
    callbacks = [each for each in _flat_callbacks(given) if isinstance(each, CheckpointCallback)]
    if not callbacks:
        return original(*call.args, **call.kwargs)
    if len(callbacks) > 1:
        raise ValueError(f"`fit` takes one CheckpointCallback. Received: {len(callbacks)} of them.")
    (callback,) = callbacks
    callback.prepare(self)
    try:
        history = original(*call.args, **call.kwargs)
        callback.finish()
    finally:
        callback.leave()
        strategy.data_position = None
    return history


def _flat_callbacks(callbacks) -> list:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    return [] if callbacks is None else tf.nest.flatten(callbacks)


@patch(_compat.keras_tensorflow_trainer.TFEpochIterator, "catch_stop_iteration")
@contextlib.contextmanager
def _catch_stop_iteration(original, self):
    with original(self):
        try:
            yield
        except tf.errors.OutOfRangeError:
            is_ours = isinstance(self._distribute_strategy, ZeroStrategy)
            if is_ours and self.steps_per_execution == 1 and _compat.is_at_first_batch(self):
                raise ValueError(_EMPTY) from None
            raise


@patch(_compat.keras_tensorflow_trainer.TensorFlowTrainer, "_maybe_symbolic_build")
def _maybe_symbolic_build(original, self, iterator=None, data_batch=None):
    """Builds a model from what its data say of their elements.

    Keras draws a batch for that, which a shuffled dataset or a shared generator then has drawn.
    """
    if strategy_of(self) is None:
        return original(self, iterator=iterator, data_batch=data_batch)
    if iterator is not None:
        specs = _compat.replica_element_spec(_compat.dataset_of(iterator))
        if all(spec.shape.rank is not None for spec in tf.nest.flatten(specs) if spec is not None):
            iterator, data_batch = None, specs
    return build_unless_the_step_does(lambda: original(self, iterator=iterator, data_batch=data_batch), self)


# An optimizer without its wrapper would update each replica by itself.


@patch(_compat.BaseOptimizer, "apply")
def _apply(original, self, *args, **kwargs):
    if losses.current_extended() is not None:
        raise RuntimeError(
            f"The optimizer {self.name!r} was applied in a replica of a ZeroStrategy without its wrapper. "
            "Make it `tfzero.ZeroOptimizer(optimizer)`; `model.compile` does so by itself."
        )
    return original(self, *args, **kwargs)
