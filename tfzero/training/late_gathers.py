"""Gathers updated parameters during the next step's forward pass, at stages 1 and 2.

In one execution of several steps (`steps_per_execution`) every step but the first begins by gathering the parameters
that the previous step updated. Those that the last step updated are gathered after it, before Keras continues. So code
outside never sees a partly old parameter, and each parameter is still gathered once a step. [Note: late gathers] in
`training/exchange.py`. This is Megatron-LM's `overlap_param_gather`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfzero.host import notes, runtime
from tfzero.plan.placement import Bucket
from tfzero.rows.replica_run import current_run
from tfzero.training.exchange import Exchange
from tfzero.training.walk import Trained

_NEEDS = (
    "overlap_param_gather=True needs compiled `fit` with Keras's own `train_step` and with steps_per_execution of 2 or "
    "more, as elsewhere parameters may be read between two steps. Leave `overlap_param_gather` away."
)
_APART = (
    "With overlap_param_gather=True an error within an execution leaves parameters whose parts are of different steps: "
    "go on from a checkpoint or a saved model."
)


class LateGathers:
    """The training steps of a model whose parameters are gathered late.

    Args:
        model: a compiled model.
        train_step: one replica's training step of the model.
        strategy: the model's strategy.
    """

    def __init__(self, model: keras.Model, train_step: Callable, strategy: tf.distribute.Strategy) -> None:
        self._model = model
        self._train_step = train_step
        self._finish = tf.function(lambda: strategy.run(self._gather_kept), autograph=False)

    @classmethod
    def of(cls, model: keras.Model, step_function: Callable, strategy: tf.distribute.Strategy) -> "LateGathers | None":
        """The `LateGathers` of a step function; None unless it trains and its parameters can be gathered late."""
        is_own = runtime.is_train_step_of_keras(step_function)
        several = model.steps_per_execution > 1 and not model.run_eagerly
        serves = strategy.settings.overlap_param_gather and is_own and several and model.optimizer is not None
        return cls(model, step_function, strategy) if serves else None

    def step(self, data: Any) -> Any:
        """Within a replica: gathers the parameters that the previous step updated, and trains on a batch."""
        self._gather_kept()
        trained, replica = self._model.optimizer.trained, runtime.replica_index()
        begun = _last_mark(trained, replica)
        current_run().gathers_late = True
        logs = self._train_step(data)
        if _last_mark(trained, replica) > begun:
            _refuse_reads_of_kept(trained, replica)
        return logs

    def run(self, execution: Callable, iterator: Any) -> Any:
        """Runs an execution of several steps, then gathers the parameters that its last step updated."""
        try:
            logs = execution(iterator)
        except tf.errors.OpError as error:
            notes.add_note(error, _APART)
            raise
        except KeyboardInterrupt:  # Python noticed it after the execution, perhaps on this worker only
            self._finish()
            raise
        self._finish()
        return logs

    def _gather_kept(self) -> None:
        """Within a replica: gathers kept parameters in the order of the forward pass."""
        trained, replica = self._model.optimizer.trained, runtime.replica_index()
        exchange = trained.exchange(replica)
        pending = trained.pending.value.values[replica]
        is_pending = tf.unstack(pending)
        for bucket in reversed(_waiting(exchange)):

            def gather(bucket: Bucket = bucket) -> bool:
                exchange.gather_kept(bucket)
                return True

            tf.cond(is_pending[bucket.segments[0].index], gather, lambda: False)
        pending.assign(tf.zeros_like(pending))


def make_pending(variables: int, strategy: tf.distribute.Strategy) -> keras.Variable | None:
    """Creates `Trained.pending` for so many variables, if the strategy's parameters are gathered late."""
    if not strategy.settings.overlap_param_gather:
        return None
    with strategy.extended.creation.of_optimizer_state():
        return keras.Variable("zeros", (variables,), "bool", trainable=False, name="pending")


def is_late() -> bool:
    """Within a replica: returns True, as the next step gathers the parameters that are updated now.

    Raises:
        RuntimeError: if no step would gather them, because this is not a step of `LateGathers`.
    """
    run = current_run()
    if run is None or not run.gathers_late:
        raise RuntimeError(_NEEDS)
    return True


def _waiting(exchange: Exchange) -> list[Bucket]:
    return [bucket for bucket in exchange.plan.buckets if exchange.can_wait(bucket)]


def _last_mark(trained: Trained, replica: int) -> int:
    """The place in the current graph of the latest operation that marked parameters as pending or as gathered."""
    uses = runtime.uses_of_variable(trained.pending.value.values[replica])
    return max(map(runtime.creation_order, uses), default=-1)


def _refuse_reads_of_kept(trained: Trained, replica: int) -> None:
    """Raises if a parameter is read between its update and its gather, for example by a metric."""
    exchange, kept = trained.exchange(replica), _last_mark(trained, replica)
    for index in (segment.index for bucket in _waiting(exchange) for segment in bucket.segments):
        uses = runtime.uses_of_variable(exchange.component(index))
        if any(runtime.creation_order(use) > kept for use in uses):
            raise RuntimeError(
                f"overlap_param_gather=True: {trained.variables[index].path!r} is read after it has been updated, in "
                "the same step, and has not been gathered yet; perhaps by a metric. Leave `overlap_param_gather` away."
            )
