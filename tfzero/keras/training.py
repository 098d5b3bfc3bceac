"""Patches that make Keras's training aware of replicas. Patches of layers are in `keras/layers.py`.

Keras offers a strategy no hook at these places, so its functions are patched (`host/patches.py`).
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfzero.checkpoint.callback import CheckpointCallback
from tfzero.checkpoint.teamwork import SAVING_SECONDS
from tfzero.extended import ZeroExtended
from tfzero.host import keras_objects, runtime
from tfzero.host.patches import patch
from tfzero.keras.best_weights import BestWeightsInParts
from tfzero.keras.model_building import take_in_strays
from tfzero.keras.writing_callbacks import one_worker_writes
from tfzero.optimizer import ZeroOptimizer
from tfzero.rows.dependence import mark_global
from tfzero.strategy import ZeroStrategy
from tfzero.training import losses
from tfzero.training.late_gathers import LateGathers
from tfzero.training.stock_optimizers import Home
from tfzero.workers.agreement import agree_on_call, agree_on_compile

_NO_JIT = (
    "jit_compile=True cannot work under a ZeroStrategy: XLA would make one cluster of all replicas, and has no "
    "collectives on CPU. Leave jit_compile at 'auto'; the optimizer's update is compiled by XLA anyway."
)


def strategy_of(model: object) -> ZeroStrategy | None:
    strategy = keras_objects.strategy_of(model)
    return strategy if isinstance(strategy, ZeroStrategy) else None


# Compile: optimizer and metrics belong to the strategy, wherever they were made.


def wrap_optimizer(optimizer: keras.optimizers.Optimizer | None, strategy: ZeroStrategy) -> ZeroOptimizer | None:
    """The ZeroOptimizer of an optimizer: itself, its existing wrapper, or a new one."""
    if optimizer is None or isinstance(optimizer, ZeroOptimizer):
        return optimizer
    home = runtime.home_of(optimizer)
    if isinstance(home, Home):
        if home.strategy is not strategy:
            raise ValueError(
                f"The optimizer {optimizer.name!r} has trained a model of another ZeroStrategy. Pass a new optimizer."
            )
        return home.wrapper
    return ZeroOptimizer(optimizer)


@patch(
    runtime.Trainer,
    "compile",
    "self optimizer loss loss_weights metrics weighted_metrics run_eagerly steps_per_execution jit_compile "
    "auto_scale_loss",
    "`compile` does not enter the scope: optimizer and metrics that were made elsewhere become the strategy's",
    "test_step.py::test_ways_to_compile",
)
def _compile(original: Callable[..., Any], self: keras.Model, *args: Any, **kwargs: Any) -> None:
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, *args, **kwargs)
    if kwargs.get("jit_compile") is True:
        raise ValueError(_NO_JIT)
    strategy.merge("`compile`")
    agree_on_compile(strategy, inspect.signature(original).bind(self, *args, **kwargs))
    take_in_strays(self, strategy)
    with strategy.scope():
        result = original(self, *args, **kwargs)
        self.optimizer = wrap_optimizer(self.optimizer, strategy)
    for metric in [keras_objects.loss_tracker(self), *_metric_objects((args, kwargs))]:
        strategy.extended.take_in(metric.variables)
    return result


def _metric_objects(arguments: Any) -> list[keras.metrics.Metric]:
    return [leaf for leaf in tf.nest.flatten(arguments) if isinstance(leaf, keras.metrics.Metric)]


# Steps: raw batches are cut, logs are global.


@patch(
    runtime.keras_tensorflow_trainer.TensorFlowTrainer,
    "_make_function",
    "self step_function",
    "raw batches are cut, the logs of a step are global, late gathers",
    "test_step.py::test_batches_on_their_own",
)
def _make_function(
    original: Callable[..., Any], self: keras.Model, step_function: Callable[..., Any]
) -> Callable[..., Any]:
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
    check = strategy.comparison.of_given(f"those given to `{step_function.__name__}`")
    trains = step_function == self.train_step
    if trains:
        strategy.local_steps.remake(self)
    execute = functools.cache(lambda kind: _execution(original, self, step_function))

    def function_of_cut_batches(iterator: Any) -> Any:
        if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            # For `views/gradient_time.py`.
            function_of_cut_batches.element_spec = iterator.element_spec  # type: ignore[attr-defined]
        else:
            if not trains:
                strategy.merge(f"`{step_function.__name__}`")
            iterator = map(functools.partial(_cut_checked, strategy, check, trains), iterator)
        if trains and strategy.served is not None and strategy.served.is_behind():
            next(iterator)
            strategy.served.skip(self)
            return {}
        # Steps that workers take together and apart are traced by themselves.
        warms_up = trains and strategy.settings.merging is not None and strategy.local_steps.warms_up(self)
        with _training(self, strategy, warms_up) if trains else contextlib.nullcontext():
            logs = execute(warms_up)(iterator)
        if trains:
            strategy.extended.shares.rebalance(self.steps_per_execution)
        return logs

    return function_of_cut_batches


def _execution(original: Callable[..., Any], model: keras.Model, step: Callable[..., Any]) -> Callable[[Any], Any]:
    """An execution of steps, as Keras makes it."""
    late = LateGathers.of(model, step, strategy_of(model))
    if late is None:
        return original(model, step)
    function = original(model, late.step)
    return lambda iterator: late.run(function, iterator)


@contextlib.contextmanager
def _training(model: keras.Model, strategy: ZeroStrategy, warms_up: bool) -> Iterator[None]:
    with contextlib.ExitStack() as entered:
        if strategy.settings.merging is not None:
            entered.enter_context(strategy.local_steps.training(model, warms_up))
        if strategy.served is not None:
            entered.enter_context(strategy.served.training(model))
        entered.enter_context(strategy.extended.shares.timing())
        yield


def _cut_checked(strategy: ZeroStrategy, check: Callable[[Any], None], trains: bool, batch: Any) -> Any:
    """One batch of `train_on_batch`, `test_on_batch` or `predict_on_batch`, for the replicas."""
    check(batch)
    with strategy.extended.dealing.for_training(trains):
        return strategy.extended.cut_batch(batch)


@patch(
    runtime.keras_tensorflow_trainer.TensorFlowTrainer,
    "predict_on_batch",
    "self x",
    "each replica would predict the whole batch",
    "test_step.py::test_batches_on_their_own",
)
def _predict_on_batch(original: Callable[..., Any], self: keras.Model, x: Any) -> Any:
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, x)
    strategy.merge("`predict_on_batch`")
    with strategy.comparison.during("predict_on_batch"):
        return original(self, _cut_checked(strategy, strategy.check_predicted, False, x))


def _flat_metrics(metrics: Iterable[keras.metrics.Metric]) -> list[keras.metrics.Metric]:
    """Metrics; a metric that holds others is replaced by those."""
    flat = []
    for metric in metrics:
        held = getattr(metric, "metrics", None)
        flat += _flat_metrics(held) if held else [metric]
    return flat


def _make_result_global(metric: keras.metrics.Metric, strategy: ZeroStrategy) -> None:
    """Makes `metric.result()` within a replica cover all replicas, each of which counts its own part of a batch."""
    if getattr(metric.result, "_tfzero_global", False):
        return
    original = metric.result

    @functools.wraps(original)
    def result() -> Any:
        extended = losses.current_extended()
        if extended is None or not metric.variables:
            return original()
        reduced = _sum_over_replicas([v.value for v in metric.variables], extended)
        with keras.StatelessScope(state_mapping=zip(metric.variables, reduced, strict=True)):
            return tf.nest.map_structure(lambda value: mark_global(tf.identity(value)), original())

    result._tfzero_global = True  # type: ignore[attr-defined]
    object.__setattr__(metric, "result", result)


def _sum_over_replicas(values: Sequence[tf.Variable], extended: ZeroExtended) -> list[tf.Tensor]:
    """Sums values over replicas, with one all-reduce per dtype."""
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


# What users call.


def _bind(
    original: Callable[..., Any], model: keras.Model, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Binds a call's arguments by name. Only the first worker shows progress; of epochs it is that of all."""
    call = inspect.signature(original).bind(model, *args, **kwargs)
    if not strategy_of(model).extended.should_checkpoint:
        call.arguments["verbose"] = 0
    return call


def _evaluate_or_predict(original: Callable[..., Any], self: keras.Model, *args: Any, **kwargs: Any) -> Any:
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, *args, **kwargs)
    call = _bind(original, self, args, kwargs)
    with one_worker_writes(_callbacks_in(call), strategy), strategy.comparison.during(original.__name__):
        strategy.merge(f"`{original.__name__}`")
        agree_on_call(strategy, original.__name__, call)
        return original(*call.args, **call.kwargs)


_CALLS = {
    "evaluate": "self x y batch_size verbose sample_weight steps callbacks return_dict kwargs",
    "predict": "self x batch_size verbose steps callbacks",
}
for _name, _arguments in _CALLS.items():
    patch(
        runtime.keras_tensorflow_trainer.TensorFlowTrainer,
        _name,
        _arguments,
        "of several workers the first one shows progress and writes",
        "test_report.py::test_one_of_several_workers_prints_it_and_shows_progress",
    )(_evaluate_or_predict)


class _Merging(keras.callbacks.Callback):
    """Merges workers that train apart before they begin; averages the logs of an epoch before other callbacks."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        strategy_of(self.model).merge("the beginning of `fit`")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        strategy = strategy_of(self.model)
        # What a `train_step` of the user's own returns is each worker's, unlike metrics.
        own = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        told = strategy.channel.all_gather("comparing the logs of an epoch", own)
        for name, values in {name: [each.get(name) for each in told] for name in own}.items():
            if None not in values and len(set(values)) > 1:
                logs[name] = sum(values) / len(values)


class _Stopping(keras.callbacks.Callback):
    """Comes after all other callbacks, which may stop a worker that trains apart."""

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        strategy_of(self.model).local_steps.put_off_stop(self.model)


class _Announcement(keras.callbacks.Callback):
    """Prints the report's summary, once for each optimizer."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        strategy, optimizer = strategy_of(self.model), self.model.optimizer
        if optimizer is not None and optimizer not in strategy.announced:
            strategy.announced.add(optimizer)
            print(strategy.report().summary(), flush=True)


@patch(
    runtime.keras_tensorflow_trainer.TensorFlowTrainer,
    "fit",
    "self x y batch_size epochs verbose callbacks validation_split validation_data shuffle class_weight "
    "sample_weight initial_epoch steps_per_epoch validation_steps validation_batch_size validation_freq",
    "prints the report; checkpoints are looked for before data are prepared",
    "test_report.py::test_fit_prints_it_once_at_verbose_1",
)
def _fit(original: Callable[..., Any], self: keras.Model, *args: Any, **kwargs: Any) -> keras.callbacks.History:
    """Adds the report. Calls the checkpoint callback before data are prepared and after all others have ended."""
    strategy = strategy_of(self)
    if strategy is None:
        return original(self, *args, **kwargs)
    call = _bind(original, self, args, kwargs)
    with one_worker_writes(_callbacks_in(call), strategy), strategy.comparison.during("fit"):
        agree_on_call(strategy, "fit", call)
        with strategy.extended.dealing.for_training():  # until the first data are distributed, which are for training
            history = _fit_bound(original, self, call)
    # No worker goes on before the first worker's callbacks have written and deleted their files.
    strategy.channel.all_gather("the end of `fit`", None, SAVING_SECONDS)
    return history


def _fit_bound(
    original: Callable[..., Any], self: keras.Model, call: inspect.BoundArguments
) -> keras.callbacks.History:
    strategy = strategy_of(self)
    given = call.arguments.get("callbacks")
    if strategy.served is not None:
        _check_callbacks(_flat_callbacks(given))
        strategy.served.begin_fit()
    trains_apart = strategy.settings.merging is not None
    first: list[keras.callbacks.Callback] = [_Merging()] if trains_apart else []
    last: list[keras.callbacks.Callback] = [_Stopping()] if trains_apart else []
    if isinstance(given, keras.callbacks.CallbackList):
        others = [each for each in given.callbacks if not isinstance(each, _Merging | _Stopping)]
        given.callbacks[:] = [*first, *others, *last]
        for each in (*first, *last):
            each.set_model(self)
    else:
        is_verbose = call.arguments.get("verbose", "auto") in ("auto", 1)
        ours = [BestWeightsInParts(_flat_callbacks(given)), *([_Announcement()] if is_verbose else [])]
        call.arguments["callbacks"] = [*first, *_flat_callbacks(given), *ours, *last]
    callbacks = [each for each in _flat_callbacks(given) if isinstance(each, CheckpointCallback)]
    if not callbacks:
        return _to_the_end(original, strategy, call)
    if len(callbacks) > 1:
        raise ValueError(f"`fit` takes one CheckpointCallback. Received: {len(callbacks)} of them.")
    (callback,) = callbacks
    callback.prepare(self)
    try:
        history = _to_the_end(original, strategy, call)
        callback.finish()
    finally:
        callback.leave()
        strategy.data_position = None
    return history


def _to_the_end(original: Callable[..., Any], strategy: ZeroStrategy, call: inspect.BoundArguments) -> Any:
    history = original(*call.args, **call.kwargs)
    if strategy.served is not None:
        strategy.served.end_fit()
    return history


def _check_callbacks(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Refuses Keras's callback that resumes a run, with servers."""
    if any(isinstance(each, keras.callbacks.BackupAndRestore) for each in callbacks):
        raise ValueError(
            "BackupAndRestore does not know the steps of workers of parameter servers, and cannot resume their run. "
            "Use `tfzero.CheckpointCallback`."
        )


def _callbacks_in(call: inspect.BoundArguments) -> list:
    return _flat_callbacks(call.arguments.get("callbacks"))


def _flat_callbacks(callbacks: Any) -> list:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    return [] if callbacks is None else tf.nest.flatten(callbacks)


# An optimizer without its wrapper would update each replica by itself.


@patch(
    runtime.BaseOptimizer,
    "apply",
    "self grads trainable_variables",
    "an optimizer without its wrapper would update each replica by itself",
    "test_step.py::test_an_optimizer_without_its_wrapper_is_refused_in_a_replica",
)
def _apply(original: Callable[..., Any], self: runtime.BaseOptimizer, *args: Any, **kwargs: Any) -> Any:
    if losses.current_extended() is not None:
        raise RuntimeError(
            f"The optimizer {self.name!r} was applied in a replica of a ZeroStrategy without its wrapper. "
            "Make it `tfzero.ZeroOptimizer(optimizer)`; `model.compile` does so by itself."
        )
    return original(self, *args, **kwargs)
