"""The interface that TensorFlow and Keras call for replicas: collectives, variables and input."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfzero.collectives import self_test, transport_choice
from tfzero.collectives.codec import Codec
from tfzero.collectives.group import Group
from tfzero.collectives.network import DEFAULT_BUCKET_BYTES, Network, measure_network
from tfzero.host import distributed, graphs, runtime
from tfzero.plan.mesh import Mesh
from tfzero.plan.settings import Choice, Settings
from tfzero.rows.apart import Apart
from tfzero.rows.dealing import Dealing
from tfzero.rows.dependence import Dependence, mark_global
from tfzero.rows.input_account import InputAccount
from tfzero.rows.inputs import batch_leaves, cut_batch
from tfzero.rows.padding import counted, with_own_results
from tfzero.rows.replica_run import current_graph, current_run
from tfzero.rows.shares import RowShares
from tfzero.variables.classes import ShardedParameter, VariableView
from tfzero.variables.creation import VariableCreation
from tfzero.variables.gathering import Gatherer
from tfzero.workers.channel import Channel
from tfzero.workers.cluster import Cluster
from tfzero.workers.digests import BatchComparison

_EAGER = (
    "Eagerly, stage 3 keeps every parameter that it has gathered until the step is over: the memory of stage 2. "
    "Leave `run_eagerly=True` away to train in the memory of shards."
)


class ZeroExtended(distributed.ExtendedBase):
    """The implementation behind a ZeroStrategy (`strategy.extended`).

    Args:
        strategy: the strategy; its `settings` and `channel` are set.
        cluster: the workers, or None for a single process.
        devices: names of this process's devices, such as "CPU:0".
    """

    def __init__(self, strategy: tf.distribute.Strategy, cluster: Cluster | None, devices: Sequence[str]) -> None:
        self._local_devices = tuple(devices)
        # Both are called for each variable gathered outside replicas, on all workers.
        self.before_gathering: Callable[[], object] = lambda: None
        self.after_gathering: Callable[[], object] = lambda: None
        self._settings: Settings = strategy.settings
        self._channel: Channel = strategy.channel
        self.comparison: BatchComparison = strategy.comparison
        resolver = None if cluster is None else distributed.resolver_of(cluster)
        with transport_choice.configured(cluster is not None):
            super().__init__(strategy, resolver, list(devices))
        workers, worker = (1, 0) if cluster is None else (cluster.size, cluster.index)
        trains_apart = self._settings.merging is not None
        is_served = self._settings.serving is not None
        self.mesh = Mesh(workers, len(devices), worker, copies=workers if trains_apart else 1)
        # By which batches are dealt, and whose first worker writes. Workers of servers are meshes by themselves.
        self.fleet = Mesh(strategy.fleet.size, len(devices), strategy.fleet.index) if is_served else self.mesh
        has_levels = trains_apart or strategy.levels.value
        self.all_group = Group(
            self.worker_devices, self.mesh.replicas, self.mesh.rank(0), strategy.transport, has_levels
        )
        self.apart = Apart(self.worker_devices if trains_apart or is_served else [], keeps_all=is_served)
        self.creation = VariableCreation(strategy, self.all_group, self.mesh)
        self.gives_first_values = False
        self._network: Network | None = None
        self._told_of_eager_memory = False
        self._name_of = _names(strategy.fleet)
        self.input_account = InputAccount()
        self.shares = RowShares(self._settings.rows, self.mesh, self._channel)
        self.dealing = Dealing(
            self.mesh, self.fleet, self._channel, self.comparison, self._name_of, self.input_account, self.shares
        )
        self._traced: list[Dependence] = []  # of the replicas being traced
        self._is_for_all: list[bool] = []  # whether all replicas get the same, by argument of the current run

    def meet(self) -> None:
        """Forms the collective group, and checks that each of its primitives gives correct values."""
        self_test.check(self.all_group, self._channel)

    @property
    def own_group(self) -> Group:
        """The replicas that train together, over which state is sharded. [Note: apart]"""
        return self.all_group if self._settings.merging is None else self.all_group.within

    @property
    def group(self) -> Group:
        """The replicas that take the current batch together. [Note: apart]"""
        return self.own_group if self.apart.is_on else self.all_group

    def choose_bucket_bytes(self, model_bytes: int) -> Choice:
        """The bucket size for a model with so many bytes of gradients. All workers call it together."""
        asked: Any = self._settings.bucket_bytes
        if asked != "auto":
            return Choice(asked, f"bucket_bytes={asked}")
        if self.mesh.replicas == 1:
            return Choice(DEFAULT_BUCKET_BYTES, "one replica sends nothing")
        if self.apart.is_possible:
            return Choice(DEFAULT_BUCKET_BYTES, "gradients do not leave a worker")
        if self._network is None:
            self._network = measure_network(self.group, self._channel)
        return self._network.bucket_bytes(model_bytes)

    @contextlib.contextmanager
    def first_values(self) -> Iterator[None]:
        """While active, `strategy.reduce` returns the first replica's values, which tell Keras the shapes."""
        self.gives_first_values = True
        try:
            yield
        finally:
            self.gives_first_values = False

    # Collectives.

    def replicas_merge(self) -> bool:
        # In a graph each replica traces its own part of a collective; eager replicas run one after the other.
        return tf.executing_eagerly()

    def run_replicas(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if not tf.executing_eagerly():
            self.group.keys.align()
            if len(self.worker_devices) > 1:
                graphs.chain_by_device(tf.compat.v1.get_default_graph(), self.worker_devices)
        self._traced = traced = []  # type: ignore[var-annotated]
        leaves = tf.nest.flatten([args, kwargs])
        self._is_for_all = [not isinstance(leaf, tf.distribute.DistributedValues) for leaf in leaves]
        is_alone = self.mesh.replicas == 1 and not self.apart.is_on
        function = function if is_alone else with_own_results(function)
        results = super().run_replicas(function, args, kwargs)
        for dependence in traced:
            dependence.check_updates()
        return results

    def replica_collective(self, method: Callable, value: tf.types.experimental.TensorLike, *args: Any) -> Any:
        """Runs one of the group's collectives from within a replica, in a graph or eagerly."""
        if not tf.executing_eagerly():
            replica = runtime.replica_index()
            value = tf.convert_to_tensor(value)
            if current_run().beginning is None:
                result = method(value, replica, *args)
            else:
                result = self.shares.apart(lambda value: method(value, replica, *args), value)
            is_same = method.__func__ in (Group.all_reduce, Group.all_gather, Group.broadcast)  # type: ignore[attr-defined]
            return mark_global(result) if is_same else result

        def together(strategy: tf.distribute.Strategy, value: Any) -> Any:
            return runtime.per_replica(self.group.launch(method, self._spread(value), *args))

        return tf.distribute.get_replica_context().merge_call(together, args=(value,))

    def gathered(self, shard: tf.Variable, shape: tf.TensorShape, dtype: tf.DType, name: str) -> tf.Tensor:
        """Within a replica: the whole value of a parameter, gathered from the replicas' shards. [Note: control flow]"""
        if tf.executing_eagerly():
            if not self._told_of_eager_memory:
                self._told_of_eager_memory = True
                warnings.warn(_EAGER, stacklevel=2)
            return self._gatherer(None).whole(shard, shape, dtype)
        graph, is_in_a_loop = runtime.graph_around_control_flow(current_run().graph)
        if is_in_a_loop:
            raise RuntimeError(
                f"The parameter {name!r} is read in a tf.function that is called in a loop or a branch. There it "
                "cannot be gathered at stage 3, as replicas may take other ways. Call the function outside, or leave "
                "`tf.function` away."
            )
        if graph is tf.compat.v1.get_default_graph():
            return self._gatherer(graph).whole(shard, shape, dtype)
        with graph.as_default():
            return self._gatherer(graph).whole(shard, shape, dtype)

    def end_of_gradients(self, gradients: Iterable[tf.Tensor]) -> None:
        """Within a replica: what is done between its gradients and their exchange."""
        run = current_run()
        beginning, run.beginning = run.beginning, None
        if beginning is None:
            self.shares.warn_of_loop()
        else:
            self.shares.end(beginning, list(gradients), run.own_rows())
        self.forget_gathered()

    def forget_gathered(self) -> None:
        """Within a replica: makes later reads gather anew, because parameters change."""
        for gatherer in current_run().gatherers.values():
            gatherer.forget()

    def _gatherer(self, graph: tf.Graph | None) -> Gatherer:
        known = current_run().gatherers
        if graph not in known:
            codec = Codec.of(self._settings.compression)
            own = functools.partial(counted, extended=self)
            gathers_again = self._settings.scheme.gathers_again
            known[graph] = Gatherer(self.own_group, self.replica_collective, own, gathers_again, codec)
        return known[graph]

    def batch_fraction(self) -> tf.Tensor:
        """This replica's rows of the batch over the rows of all, float32; 1/N if `run` was given nothing with rows.

        [Note: batch fraction] A mean over this replica's samples, times the fraction, is the replica's part of the mean
        over all samples. The batch consists of those arguments of `run`'s function that were cut by rows.
        """
        unknown = tf.constant(1.0 / self.group.world_size)
        run, graph = current_run(), current_graph()
        if run is None:
            return unknown
        if graph not in run.fractions:
            rows = run.own_rows()
            if rows is None:
                return unknown
            total = self.replica_collective(self.group.all_reduce, rows)
            run.fractions[graph] = tf.cast(
                tf.math.divide_no_nan(tf.cast(rows, tf.float64), tf.cast(total, tf.float64)), tf.float32
            )
        return run.fractions[graph]

    def has_rows(self) -> tf.Tensor | None:
        """Within a replica: whether it has rows of the batch; None if it certainly has, or if that is unknown."""
        run = current_run()
        return None if run is None or (self.mesh.replicas == 1 and not self.apart.is_on) else run.has_rows()

    def count_rows(self) -> None:
        """Within a replica that begins: counts its rows, if workers train apart."""
        if self.apart.is_on and batch_leaves(current_run().arguments):
            self.apart.count(current_run().own_rows(), runtime.replica_index())

    def fed_rows(self) -> tf.Tensor | None:
        """Within a replica of a worker that trains apart: the worker's rows, int64; None where they are unknown."""
        run, graph = current_run(), current_graph()
        rows = run.known_rows() if self.apart.is_on else None
        if rows is not None and graph not in run.fed_rows:
            run.fed_rows[graph] = self.replica_collective(self.group.all_reduce, rows)
        return None if rows is None else run.fed_rows[graph]

    def dependence(self) -> Dependence:
        """Within a replica being traced: which tensors depend on its rows of the batch. [Note: kinds]"""
        run = current_run()
        if run is None:
            return Dependence([])
        if run.dependence is None:
            self._traced.append(run.look_into(self._is_for_all))
        return run.dependence

    def average(self, value: tf.Tensor) -> tf.Tensor:
        """Mean over replicas, weighted by their batch fractions."""
        if self.mesh.replicas == 1:
            return value
        fraction = self.batch_fraction()
        wide = tf.cast(value, tf.float64 if value.dtype == tf.float64 else tf.float32)
        weighted = tf.where(fraction > 0, wide * tf.cast(fraction, wide.dtype), tf.zeros_like(wide))
        return tf.cast(self.replica_collective(self.group.all_reduce, weighted), value.dtype)

    def whole_value(self, components: Sequence[tf.Variable], shape: tf.TensorShape, owner: int | None) -> tf.Tensor:
        """The whole value of a variable, from this worker's components and those of the others."""
        self.before_gathering()
        values = [tf.reshape(tf.convert_to_tensor(component), [-1]) for component in components]
        if owner is not None:
            flat = self.own_group.launch(self.own_group.all_gather_ragged, values)[0][owner]
        else:
            gathered = self.own_group.launch(self.own_group.all_gather, values)[0]
            flat = tf.reshape(gathered, [-1])[: shape.num_elements()]
        self.after_gathering()
        return tf.reshape(flat, shape)

    def _spread(self, value: Any) -> list:
        """One tensor for each local replica."""
        results = self.own_strategy.experimental_local_results(value)
        if len(results) < len(self.worker_devices):
            results = results * len(self.worker_devices)
        return [tf.convert_to_tensor(result) for result in results]

    def all_reduce_in_replica(self, reduce_op: tf.distribute.ReduceOp, value: Any) -> Any:
        def reduce(leaf: tf.types.experimental.TensorLike) -> tf.Tensor:
            total = self.replica_collective(self.group.all_reduce, tf.convert_to_tensor(leaf))
            return _divide(total, self.group.world_size) if reduce_op == tf.distribute.ReduceOp.MEAN else total

        flat = tf.nest.flatten(value)
        return tf.nest.pack_sequence_as(value, [reduce(leaf) for leaf in flat])

    def reduce_values(self, reduce_op: tf.distribute.ReduceOp, value: Any) -> Any:
        mean = reduce_op == tf.distribute.ReduceOp.MEAN
        if mean and (
            isinstance(value, tf.types.experimental.distributed.Mirrored)
            or (not self.group.is_between and not isinstance(value, tf.distribute.DistributedValues))
        ):
            return value
        values, count = self._spread(value), self.group.world_size
        if not isinstance(value, tf.distribute.DistributedValues):
            # One value for each worker: only its first replica contributes it.
            values, count = [values[0], *map(tf.zeros_like, values[1:])], count // len(values)
        totals = graphs.together(self.group.launch(self.group.all_reduce, values))
        return runtime.mirrored([_divide(total, count) if mean else total for total in totals])

    def gather_values(self, value: Any, axis: int) -> tf.distribute.DistributedValues:
        parts = graphs.together(self.group.launch(self.group.all_gather_ragged, self._spread(value)))
        if not isinstance(value, tf.distribute.DistributedValues):
            # One value for each worker: only its first replica contributes it.
            parts = [replica_parts[:: len(self.worker_devices)] for replica_parts in parts]
        return runtime.mirrored([tf.concat(replica_parts, axis) for replica_parts in parts])

    # Variables.

    def take_in(self, variables: Iterable[Any]) -> None:
        """Makes Keras variables from outside the scope this strategy's, in place; they keep their values."""
        for variable in variables:
            if getattr(variable.value, "distribute_strategy", None) is not self.own_strategy:
                with tf.init_scope(), self.own_strategy.scope():
                    runtime.remake(variable)

    def value_container(self, value: Any) -> Any:
        """What a tape notes when a replica's component is read; for a sharded parameter this is the shard itself."""
        container = super().value_container(value)
        return value if isinstance(container, ShardedParameter) else container

    def check_colocation(self, variable: object) -> None:
        if not isinstance(variable, VariableView):
            super().check_colocation(variable)

    def make_variable(self, next_creator: Callable[..., tf.Variable], **kwargs: Any) -> tf.Variable:
        view = kwargs.pop("colocate_with", None)
        if view is not None and not isinstance(view, VariableView | runtime.DistributedVariable):
            return super().make_variable(next_creator, colocate_with=view, **kwargs)
        return self.creation.create(next_creator, view, kwargs)

    # Input.

    @property
    def name_of_worker(self) -> str:
        """The name of this worker, for messages."""
        return self._name_of(self.fleet.worker)

    @property
    def should_checkpoint(self) -> bool:
        """Whether this is the worker that writes files and shows progress."""
        return self.fleet.is_chief

    def cut_batch(self, batch: Any) -> Any:
        """One global batch as per-replica values."""
        return cut_batch(batch, self.dealing.mesh, self.shares.now())

    def devices_under(self, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:{name}" for name in self._local_devices), self._settings.device_type

    def distribute(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        if not isinstance(dataset, tf.data.Dataset):
            raise ValueError(f"ZeroStrategy distributes a tf.data.Dataset, but received {dataset!r}.")
        return self.dealing.distribute(dataset)


def _divide(total: tf.Tensor, count: int) -> tf.Tensor:
    return total / tf.cast(count, total.dtype) if total.dtype.is_floating else tf.cast(total / count, total.dtype)


def _names(cluster: Cluster | None) -> Callable[[int], str]:
    return lambda worker: "this process" if cluster is None else cluster.names[worker]
