"""ZeroOptimizer: any Keras optimizer, with its state sharded over the replicas.

The wrapper holds the user's own optimizer, builds its slots in shards, and replaces its `apply`. The parts of Keras's
`apply` run here in an order that is right for several replicas (`training/walk.py`). The arithmetic of each optimizer
stays in Keras's own `update_step`.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfzero.collectives.codec import Codec
from tfzero.host import runtime
from tfzero.plan.placement import Plan, make_plan
from tfzero.plan.settings import Choice
from tfzero.rows.padding import counted
from tfzero.training.exchange import Wire, make_wire
from tfzero.training.late_gathers import is_late, make_pending
from tfzero.training.merging import make_merger
from tfzero.training.overwriting import OverwrittenView, is_overwritten, keep_whole
from tfzero.training.stock_optimizers import (
    CONTAINERS,
    Home,
    ViewsAtHand,
    chain,
    check_wrappable,
    chooser,
    counting,
    is_compiled,
    make_views,
    settings_of,
    spec,
    strategy_of,
)
from tfzero.training.walk import ReplicaStep, Trained, with_norms
from tfzero.variables.classes import ShardedParameter

# Settings of Keras's optimizer base class that would hide those of the inner optimizer.
_INNER_SETTINGS = (
    "weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "use_ema", "ema_momentum", "ema_overwrite_frequency",
    "loss_scale_factor", "gradient_accumulation_steps",
)  # fmt: skip


@keras.saving.register_keras_serializable(package="tfzero")
class ZeroOptimizer(keras.optimizers.Optimizer):
    """Shards a Keras optimizer over the replicas of a `ZeroStrategy` (ZeRO, https://arxiv.org/abs/1910.02054).

    `compile` wraps automatically under a `ZeroStrategy`; wrap by hand in custom training loops. The strategy's stage
    says how much is sharded. Element-wise optimizers (SGD, Adam, ...) are updated shard by shard. Optimizers that need
    the whole tensor (Adafactor, Lamb, Muon, and any that tfzero does not know) get whole variables, each updated by one
    owner.

    Args:
        optimizer: a Keras optimizer that has not been built, as an object, a name or a config.
            `LossScaleOptimizer` and `MultiOptimizer` belong inside. It is used in place: setting its
            `learning_rate` works as usual.

    Raises:
        TypeError: if `optimizer` is no Keras optimizer, or if it overrides methods that tfzero replaces.
        ValueError: if `optimizer` is a `ZeroOptimizer` or has been built elsewhere.

    Example:

    ```python
    with strategy.scope():
        model = make_model()
        optimizer = tfzero.ZeroOptimizer(keras.optimizers.Adam(1e-3))

    def replica_step(x, y):  # this replica's rows; gradients are summed over replicas
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / 16  # samples in the global batch
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    losses = strategy.run(tf.function(replica_step), args=strategy.cut_batch((x[:16], y[:16])))
    ```
    """

    def __init__(self, optimizer: str | dict | keras.optimizers.Optimizer) -> None:
        optimizer = keras.optimizers.get(optimizer)
        for each in chain(optimizer):
            if isinstance(each, ZeroOptimizer):
                raise ValueError(
                    "The optimizer is a ZeroOptimizer already. ZeroOptimizer is the outermost wrapper, once."
                )
            check_wrappable(each)
        super().__init__(learning_rate=0.0, name=optimizer.name)
        for name in _INNER_SETTINGS:
            object.__delattr__(self, name)
        self._wrapped = optimizer
        self._trained: Trained | None = None
        self._given: tuple = ()  # the variables that it was built for
        self._eager_functions: dict = {}
        self._watches_norm = False

    @property
    def inner_optimizer(self) -> keras.optimizers.Optimizer:
        """The user's own optimizer; a loss scale around it is `loss_scale_optimizer`."""
        return self._wrapped.inner_optimizer if self.loss_scale_optimizer is not None else self._wrapped

    @property
    def loss_scale_optimizer(self) -> keras.optimizers.LossScaleOptimizer | None:
        """The `LossScaleOptimizer` inside, or None."""
        return self._wrapped if isinstance(self._wrapped, keras.optimizers.LossScaleOptimizer) else None

    @property
    def plan(self) -> Plan | None:
        """Who owns what (`tfzero.plan.placement.Plan`); None until built."""
        return self._trained.plan if self._trained else None

    @property
    def trained(self) -> Trained | None:
        """The variables that it trains, and everything that it trains them with; None until built."""
        return self._trained

    @property
    def bucket_bytes(self) -> Choice | None:
        """Bucket size and the reason for it; None until built."""
        return self._trained.bucket_bytes if self._trained else None

    @property
    def trained_variables(self) -> tuple:
        """The model's variables in the plan's order; none until built."""
        return self._trained.variables if self._trained else ()

    @property
    def wire(self) -> Wire:
        """How the variables travel; nothing is encoded until built."""
        return self._trained.wire if self._trained else Wire()

    # The optimizer inside answers what Keras asks of an optimizer.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_wrapped" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        wrapped = self.__dict__.get("_wrapped")
        if wrapped is not None and name in _INNER_SETTINGS:
            setattr(self.inner_optimizer, name, value)
        else:
            super().__setattr__(name, value)

    def __dir__(self) -> Iterable[str]:
        # Keras saves what `dir` shows: a file holds the optimizer inside, and plain Keras can load it.
        return dir(self._wrapped) if "_wrapped" in self.__dict__ else super().__dir__()

    @property
    def variables(self) -> list:
        return self._wrapped.variables if "_wrapped" in self.__dict__ else []

    @property
    def learning_rate(self) -> Any:
        return self._wrapped.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._wrapped.learning_rate = value

    @property
    def iterations(self) -> keras.Variable:
        return self._wrapped.iterations

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return self._wrapped.scale_loss(loss)

    def exclude_from_weight_decay(
        self, var_list: Iterable | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list=var_list, var_names=var_names)

    def finalize_variable_values(self, var_list: Iterable[keras.Variable]) -> None:
        self._wrapped.finalize_variable_values(var_list)

    def set_weights(self, weights: Sequence) -> None:
        self._wrapped.set_weights(weights)

    def save_own_variables(self, store: Any) -> None:
        self._wrapped.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        self._wrapped.load_own_variables(store)

    def get_config(self) -> dict:
        return {"optimizer": keras.saving.serialize_keras_object(self._wrapped)}

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "ZeroOptimizer":
        return cls(keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects))

    # Build. AutoGraph is kept out, as Keras keeps it out of itself: in a `tf.function` it would take 17 s over tfzero.

    @tf.autograph.experimental.do_not_convert
    def build(self, variables: Iterable[keras.Variable]) -> None:
        """Makes the inner optimizer's slots, in shards, for the model's trainable variables.

        Args:
            variables: the Keras variables of a model made under `strategy.scope()`.

        Raises:
            ValueError: if a variable belongs to no or another strategy, or is not of a float dtype.
        """
        if self.built:
            return
        given = list(variables)
        strategy = strategy_of(given)
        choose = chooser(self.inner_optimizer)
        chained = list(dict.fromkeys([*chain(self._wrapped), *map(choose, given)]))
        overwritten = [variable for variable in given if is_overwritten(variable)]
        variables = [variable for variable in given if not is_overwritten(variable)]
        optimizers = [each for each in chained if not isinstance(each, CONTAINERS)]
        settings = strategy.settings
        codec = Codec.of(settings.compression) if strategy.extended.own_group.world_size > 1 else None
        specs = [spec(variable, optimizers, choose(variable), codec) for variable in variables]
        keep_whole(overwritten, strategy)
        with tf.init_scope():
            strategy.channel.agree("building an optimizer", settings_of(chained), "optimizers")
            choice = strategy.extended.choose_bucket_bytes(sum(s.elements * s.item_bytes for s in specs))
        plan = make_plan(
            specs, strategy.extended.mesh.shards, settings.stage, choice.value, settings.min_shard_elements
        )
        home = Home(self, strategy)
        for each in chained:
            runtime.adopt(each, home)
            strategy.extended.take_in(runtime.own_scalars(each))
        slots, wire = self._build_slots(given, variables, plan, strategy)
        for optimizer in optimizers:
            runtime.adopt(optimizer, home, [v for v in given if choose(v) is optimizer])
        self._given = tuple(given)
        self._trained = Trained(
            variables=tuple(variables), optimizers=tuple(optimizers), counting=counting(chained, map(choose, given)),
            compiled=tuple(is_compiled(optimizer) for optimizer in optimizers), plan=plan,
            group=strategy.extended.own_group, slots=slots, wire=wire, bucket_bytes=choice,
            sharded_gradients=settings.scheme.shards_gradients, loss_scale=self.loss_scale_optimizer,
            pending=make_pending(len(variables), strategy),
            overwritten=tuple((variable, choose(variable)) for variable in overwritten),
            merger=make_merger(given, optimizers, strategy, choice.value),
            remote=strategy.served and strategy.served.add(given, variables, optimizers, slots, plan),
        )  # fmt: skip
        strategy.optimizers.add(self)
        strategy.extended.group.lanes.iterations = runtime.iteration_counter(chained[-1]).value.values[0]
        self.built: bool = True
        if self._watches_norm:
            self.watch_norm()

    def _build_slots(self, given: list, variables: list, plan: Plan,
                     strategy: tf.distribute.Strategy) -> tuple[tuple, Wire]:  # fmt: skip
        """Slots of `variables`, which are those of `given` that are not overwritten; and how variables travel."""
        codec = Codec.of(strategy.settings.compression) if strategy.extended.own_group.world_size > 1 else None
        with strategy.extended.creation.of_optimizer_state():
            views = {id(view.variable): view for view in make_views(variables, plan, strategy.served is not None)}
            all_views = [views.get(id(variable)) or OverwrittenView(variable) for variable in given]
            self._wrapped.build(ViewsAtHand(all_views, strategy.extended.creation))
            slots = tuple(tuple(view.slots) for view in views.values())  # before those of the wire
            return slots, make_wire(codec, list(views.values()), plan, strategy, self.loss_scale_optimizer)

    def watch_norm(self) -> bool:
        """Makes steps traced from now on compute the gradient's norm. All workers call it together.

        Returns:
            Whether this is new, so that an already traced step must be retraced.
        """
        self._watches_norm = True
        if not self.built or self._trained.squared_norms:
            return not self.built
        self._trained = with_norms(self._trained, strategy_of(self.trained_variables))
        self._eager_functions.clear()
        return True

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the whole batch's gradient in the latest update, unscaled and unclipped; None unless watched."""
        norms = self._trained.squared_norms if self._trained else ()
        return math.sqrt(sum(float(norm.value.values[0].numpy()) for norm in norms)) if norms else None

    def repeat_bucket_bytes(self, bucket_bytes: int) -> None:
        """Takes the bucket size that "auto" chose in a former run, so that sums round as they did there.

        This affects steps traced from now on. It has no effect if the size was not left to "auto".
        """
        strategy = strategy_of(self.trained_variables)
        if strategy.settings.bucket_bytes == "auto" and strategy.num_replicas_in_sync > 1:
            old, settings = self._trained.plan, strategy.settings
            plan = make_plan(old.specs, old.shards, settings.stage, bucket_bytes, settings.min_shard_elements)
            choice = Choice(bucket_bytes, "the checkpoint's run chose so")
            self._trained = dataclasses.replace(self._trained, plan=plan, bucket_bytes=choice)
            self._eager_functions.clear()

    # Apply.

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Iterable, trainable_variables: Iterable | None = None) -> None:
        """Sums gradients over replicas and updates the variables; call it on every replica.

        Args:
            grads: one gradient per variable, `None` where there is none; `IndexedSlices` are added up first.
            trainable_variables: the variables; may be left out once the optimizer is built.

        Raises:
            RuntimeError: outside a replica.
            ValueError: for variables that the optimizer was not built for, or if there is no gradient at all.
        """
        replica = tf.distribute.get_replica_context()
        if replica is None or not tf.distribute.has_strategy():
            raise RuntimeError(
                "A ZeroOptimizer must be applied within a replica, as all replicas update together, but "
                "`apply` was called outside. Call it in a function that is passed to `strategy.run`."
            )
        grads, apart = list(grads), replica.strategy.extended.apart
        if not grads:
            return
        if apart.is_possible and not (apart.is_on or apart.is_together):
            raise RuntimeError(
                "With `sync_every` or parameter servers workers train apart in the steps of `fit` and `train_on_batch` "
                "only, but the optimizer was applied in a loop of your own. Use those, or leave that away."
            )
        if not self.built:
            if trainable_variables is None:
                raise ValueError("The optimizer is not built: pass `trainable_variables` or call `build` first.")
            settings = replica.strategy.settings
            if settings.scheme.shards_parameters and settings.error_feedback:
                raise RuntimeError(
                    "With error_feedback=True at stage 3 call `optimizer.build(model.trainable_variables)` before the "
                    "first step, as the gradient tape already needs the residuals."
                )
            to_build = list(trainable_variables)
            replica.merge_call(lambda strategy: self.build(to_build))
        gradients = self._counted(self._by_index(grads, trainable_variables), replica.strategy.extended)
        extended = replica.strategy.extended
        apart.note_optimizer(self)
        extended.end_of_gradients(gradients.values())
        gathers_late = self._trained.pending is not None and is_late()
        if tf.executing_eagerly():
            self._apply_eagerly(replica, gradients, extended.fed_rows())
        else:
            ReplicaStep(self._trained_now, runtime.replica_index(), gradients, gathers_late, extended.fed_rows()).run()

    @property
    def _trained_now(self) -> Trained:
        """What is trained, and by which replicas the current step is taken. [Note: apart]"""
        is_together = tf.distribute.get_strategy().extended.apart.is_together
        return dataclasses.replace(self._trained, across=self._trained.merger.across) if is_together else self._trained

    def _by_index(self, grads: Sequence, variables: Iterable | None) -> dict[int, tf.Tensor]:
        """Dense gradients by variable index, overwriting ones last; missing ones are left out."""
        trained = [*self._trained.variables, *(variable for variable, _ in self._trained.overwritten)]
        places = {id(variable): index for index, variable in enumerate(trained)}
        variables = list(self._given if variables is None else variables)
        if len(grads) != len(variables):
            raise ValueError(f"Each variable takes one gradient: got {len(grads)} for {len(variables)} variables.")
        unknown = [variable.path for variable in variables if id(variable) not in places]
        if unknown:
            raise ValueError(
                f"The optimizer was built for other variables and does not know {unknown}. After unfreezing layers "
                "compile the model again with a new optimizer."
            )
        missing = [v.path for g, v in zip(grads, variables, strict=True) if g is None]
        if len(missing) == len(variables):
            raise ValueError("No gradients provided for any variable.")
        if missing and runtime.replica_index() == 0:
            warnings.warn(f"Gradients do not exist for variables {missing} when minimizing the loss.", stacklevel=4)
        pairs = zip(grads, variables, strict=True)
        return {places[id(v)]: tf.convert_to_tensor(g) for g, v in pairs if g is not None}

    def _counted(self, gradients: dict[int, tf.Tensor],
                 extended: tf.distribute.StrategyExtended) -> dict[int, tf.Tensor]:  # fmt: skip
        """Drops a padding row's part from gradients that have yet to be summed over replicas. [Note: padding row]"""
        summed = {i for i, v in enumerate(self._trained.variables) if not isinstance(v.value, ShardedParameter)}
        return {i: counted(g, extended) if i in summed else g for i, g in gradients.items()}

    def _apply_eagerly(self, replica: tf.distribute.ReplicaContext, gradients: dict[int, tf.Tensor],
                       rows: tf.Tensor | None) -> None:  # fmt: skip
        """Makes eager replicas meet here, as they run one after the other, and step together in a graph."""
        indices, trained = tuple(gradients), self._trained_now

        def together(strategy: tf.distribute.Strategy, *values: Any) -> None:
            key = indices, trained.across is None
            if key not in self._eager_functions:

                def one_replica(*tensors: tf.Tensor) -> None:
                    own = dict(zip(indices, tensors, strict=False))
                    fed = None if len(tensors) == len(own) else tensors[-1]
                    ReplicaStep(trained, runtime.replica_index(), own, rows=fed).run()

                self._eager_functions[key] = tf.function(
                    lambda *tensors: strategy.run(one_replica, args=tensors), autograph=False
                )
            with strategy.extended.apart.paused():
                self._eager_functions[key](*values)

        replica.merge_call(together, args=(*gradients.values(), *([] if rows is None else [rows])))
