"""Base classes that adapt TensorFlow's strategies and variables to tfzero, and settings for clusters of processes.

TensorFlow calls methods with private names. Here each of them calls a public method, which a class elsewhere
overrides. The public method itself does what TensorFlow's does, or is abstract. See `host/registry.py` for the names.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended
from tensorflow.python.distribute.values import MirroredVariable, SyncOnReadVariable
from tensorflow.python.eager import context

from tfzero.host import runtime


class ExtendedBase(CollectiveAllReduceExtended):
    """TensorFlow's extended, which handles clusters, runs on each replica, and input; its hooks have public names.

    Args:
        strategy: the strategy.
        resolver: of the cluster; None for a single process.
        devices: this process's devices, such as "CPU:0".
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        resolver: tf.distribute.cluster_resolver.ClusterResolver | None,
        devices: list[str],
    ) -> None:
        # TensorFlow starts only one server in a process.
        self._std_server_started = runtime.collectives_are_configured()
        # `collectives/pulse.py` replaces TensorFlow's health check, which is slower and starts without a timeout.
        self._enable_check_health = False
        options = tf.distribute.experimental.CommunicationOptions()
        super().__init__(strategy, resolver, options, devices=None if resolver is not None else devices)

    @property
    def own_strategy(self) -> tf.distribute.Strategy:
        """The strategy that this extended belongs to."""
        return self._container_strategy()

    def run_replicas(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a function on each local replica."""
        return super()._call_for_each_replica(function, args, kwargs)

    def check_colocation(self, variable: object) -> None:
        """Raises ValueError unless a variable may be made beside this one."""
        super()._validate_colocate_with_variable(variable)

    def make_variable(self, next_creator: Callable, **kwargs: Any) -> tf.Variable:
        """Makes a new variable."""
        return super()._create_variable(next_creator, **kwargs)

    def replicas_merge(self) -> bool:
        """Whether replicas meet in `merge_call`, where each waits for the others."""
        raise NotImplementedError

    def all_reduce_in_replica(self, reduce_op: tf.distribute.ReduceOp, value: Any) -> Any:
        """Within a replica: reduces a structure over all replicas."""
        raise NotImplementedError

    def reduce_values(self, reduce_op: tf.distribute.ReduceOp, value: Any) -> Any:
        """Outside replicas: reduces one value of each replica over all."""
        raise NotImplementedError

    def gather_values(self, value: Any, axis: int) -> tf.distribute.DistributedValues:
        """Outside replicas: concatenates one value of each replica along an axis."""
        raise NotImplementedError

    def devices_under(self, worker_device: str) -> tuple[tuple[str, ...], str]:
        """Full names of this process's devices, and their type."""
        raise NotImplementedError

    def distribute(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of each replica's part of another dataset's batches."""
        raise NotImplementedError

    # What TensorFlow calls.

    def _use_merge_call(self) -> bool:
        return self.replicas_merge()

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        return self.run_replicas(fn, args, kwargs)

    def _replica_ctx_all_reduce(self, reduce_op: tf.distribute.ReduceOp, value: Any, options: Any = None) -> Any:
        del options
        return self.all_reduce_in_replica(reduce_op, value)

    def _reduce_to(self, reduce_op: tf.distribute.ReduceOp, value: Any, destinations: Any, options: Any) -> Any:
        del destinations, options
        return self.reduce_values(reduce_op, value)

    def _batch_reduce_to(
        self, reduce_op: tf.distribute.ReduceOp, value_destination_pairs: Iterable[tuple[Any, Any]], options: Any
    ) -> list:
        del options
        return [self.reduce_values(reduce_op, value) for value, _ in value_destination_pairs]

    def _gather_to_implementation(
        self, value: Any, destinations: Any, axis: int, options: Any
    ) -> tf.distribute.DistributedValues:
        del destinations, options
        return self.gather_values(value, axis)

    def _batch_gather_to(
        self, value_destination_pairs: Iterable[tuple[Any, Any]], axis: int, options: Any = None
    ) -> list[tf.distribute.DistributedValues]:
        del options
        return [self.gather_values(value, axis) for value, _ in value_destination_pairs]

    def _validate_colocate_with_variable(self, colocate_with_variable: object) -> None:
        self.check_colocation(colocate_with_variable)

    def _create_variable(self, next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
        return self.make_variable(next_creator, **kwargs)

    def _initialize_local_devices(
        self, cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None, worker_device: str
    ) -> tuple[tuple[str, ...], str]:
        del cluster_resolver
        return self.devices_under(worker_device)

    def _experimental_distribute_dataset(
        self, dataset: tf.data.Dataset, options: tf.distribute.InputOptions | None
    ) -> tf.data.Dataset:
        del options
        return self.distribute(dataset)


class VariableBase(MirroredVariable):
    """A variable with a component for each local replica; its reads and updates have public names."""

    @property
    def own_component(self) -> tf.Variable:
        """The component of the running replica; outside replicas the first one."""
        return self._get_on_device_or_primary()

    def value_here(self) -> tf.Tensor | tf.Variable:
        """The value where this is called, in a replica or outside."""
        return super()._get()

    def value_outside(self) -> tf.Tensor | tf.Variable:
        """The value outside replicas."""
        return super()._get_cross_replica()

    def as_tensor(self, dtype: tf.DType | None = None, name: str | None = None, as_ref: bool = False) -> tf.Tensor:
        """The value as a tensor, for an operation that takes one."""
        return super()._dense_var_to_tensor(dtype, name, as_ref)

    def update_in_replica(self, update: Callable, value: tf.types.experimental.TensorLike, **kwargs: Any) -> Any:
        """Within a replica: changes its component by `update(component, value)`."""
        return super()._update_replica(update, value, **kwargs)

    def update_outside(self, update: Callable, value: tf.types.experimental.TensorLike, **kwargs: Any) -> Any:
        """Outside replicas: changes all components by `update(component, value)`."""
        return super()._update_cross_replica(update, value, **kwargs)

    def exported_as(self) -> tf.Variable:
        """The variable that is written into a SavedModel in place of this one."""
        return self

    # What TensorFlow calls.

    def _get(self) -> tf.Tensor | tf.Variable:
        return self.value_here()

    def _get_cross_replica(self) -> tf.Tensor | tf.Variable:
        return self.value_outside()

    def _dense_var_to_tensor(
        self, dtype: tf.DType | None = None, name: str | None = None, as_ref: bool = False
    ) -> tf.Tensor:
        return self.as_tensor(dtype, name, as_ref)

    def _update_replica(
        self, update_fn: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        return self.update_in_replica(update_fn, value, **kwargs)

    def _update_cross_replica(
        self, update_fn: Callable[..., Any], value: tf.types.experimental.TensorLike, **kwargs: Any
    ) -> Any:
        return self.update_outside(update_fn, value, **kwargs)

    def _export_to_saved_model_graph(
        self,
        object_map: dict | None = None,
        tensor_map: dict | None = None,
        options: tf.saved_model.SaveOptions | None = None,
        **kwargs: Any,
    ) -> list:
        stand_in = self.exported_as()
        if stand_in is self:
            return super()._export_to_saved_model_graph(object_map, tensor_map, options, **kwargs)
        resources = stand_in._export_to_saved_model_graph(
            object_map=object_map, tensor_map=tensor_map, options=options, **kwargs
        )
        object_map[self], tensor_map[self] = object_map[stand_in], tensor_map[stand_in.handle]
        return [*resources, self]


class OnReadBase(SyncOnReadVariable):
    """A variable that each replica changes by itself, and that is combined when it is read."""

    @property
    def own_component(self) -> tf.Variable:
        """The component of the running replica; outside replicas the first one."""
        return self._get_on_device_or_primary()


def leave_watch_out() -> None:
    """Starts TensorFlow's servers without its coordination service. Call it before TensorFlow makes its devices.

    That service ends all collectives of workers that have sent no heartbeat for 10 s, whatever limit they were given.
    It also takes SIGTERM away from them and from their children, which then do not end. `collectives/pulse.py` is the
    only watch. The stock strategy configures the service only if nothing has
    (`CollectiveAllReduceExtended._initialize_multi_worker`), so an empty one stays.
    """
    context.context().configure_coordination_service(service_type="")


@contextlib.contextmanager
def with_nccl(is_wanted: bool) -> Iterator[None]:
    """Makes a stock strategy configure TensorFlow for NCCL between the GPUs of several processes, if wanted.

    TensorFlow's leader of a group chooses the implementation, from a request that carries no hint. Without
    `collective_nccl` in its configuration it finds none for a reduce-scatter. TensorFlow reads the configuration when
    its server starts, in the constructor of `CollectiveAllReduceExtended`. That constructor configures the context with
    arguments of its own, and a second configuration must be equal to the first. On CPUs it makes no difference.
    """
    target = context.context()
    if not is_wanted:
        yield
        return
    target.configure_collective_ops = functools.partial(target.configure_collective_ops, use_nccl_communication=True)
    try:
        yield
    finally:
        del target.configure_collective_ops  # the class's own method is back


def watch() -> str:
    """Kind of TensorFlow's coordination service in this process; "" for none."""
    configured = context.context().coordination_service
    return "" if configured is None else configured.service_type


def resolver_of(cluster: Any) -> tf.distribute.cluster_resolver.SimpleClusterResolver:
    """What TensorFlow asks for the workers of a cluster."""
    jobs: dict[str, list[str]] = {}
    for (job, _), address in zip(cluster.tasks, cluster.addresses, strict=True):
        jobs.setdefault(job, []).append(address)
    job, index = cluster.tasks[cluster.index]
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type=job, task_id=index, rpc_layer="grpc"
    )
