"""ZeroStrategy: a `tf.distribute.Strategy` that shards the optimizer's work over its replicas."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import tensorflow as tf

from tfzero import _compat
from tfzero.cluster import Channel, Cluster, cluster_from_spec, read_tf_config
from tfzero.collectives import Group
from tfzero.inputs import Seats, check_shardable, cut_batch, cut_dataset, rows_of
from tfzero.variables import (
    AveragedVariable,
    OnReadVariable,
    ReplicatedVariable,
    ShardedVariable,
    VariableView,
    local_part,
)

STAGES = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """What all workers must agree on. See `ZeroStrategy`."""

    stage: int
    bucket_bytes: int
    min_shard_elements: int
    timeout_seconds: float
    devices_per_worker: int
    device_type: str


class ZeroStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """Synchronous data parallelism with sharded optimizer state and gradients (ZeRO, https://arxiv.org/abs/1910.02054).

    Use it in place of `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`: create the model under
    `strategy.scope()`, then `compile` and `fit` as on one device, with the global batch size. The result does not depend
    on the number of replicas.

    | stage | parameters | gradients                            | optimizer slots |
    |-------|------------|--------------------------------------|-----------------|
    | 0     | whole      | whole                                | whole           |
    | 1     | whole      | whole, when they are accumulated     | shard           |
    | 2     | whole      | shard, bucket by bucket              | shard           |

    Args:
        stage: how much is sharded: 0, 1 or 2.
        devices: this process's devices, such as `["GPU:0", "GPU:1"]`; by default all its GPUs, or else all its logical
            CPU devices. Every worker must have equally many, of one type.
        cluster_resolver: a `tf.distribute.cluster_resolver.ClusterResolver` that names the workers; by default
            `TF_CONFIG` does, and without it this process is the only one.
        bucket_bytes: gradients travel together in buckets of at most this many bytes (a larger variable travels alone).
        min_shard_elements: variables with fewer elements stay whole on every replica.
        timeout_seconds: how long a worker waits for the others before it gives up with an error: when it starts, and
            in every exchange of a step.

    Raises:
        ValueError: for settings, devices or a `TF_CONFIG` that make no sense, or that differ between workers.
        NotImplementedError: for stage 3.
        TimeoutError: if a worker does not come within `timeout_seconds`; the message names it.
        RuntimeError: if TensorFlow was used before the strategy was made in one of several workers.
    """

    def __init__(
        self,
        stage: int = 2,
        *,
        devices: Sequence[str] | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        bucket_bytes: int = 25 * 2**20,
        min_shard_elements: int = 1024,
        timeout_seconds: float = 60.0,
    ) -> None:
        _check_stage(stage)
        _check_number("bucket_bytes", bucket_bytes, int, 1)
        _check_number("min_shard_elements", min_shard_elements, int, 0)
        _check_number("timeout_seconds", timeout_seconds, (int, float), 1)
        cluster = _find_cluster(cluster_resolver)
        _configure_cpu_devices()
        local = _choose_devices(devices)
        self.settings = Settings(
            stage, bucket_bytes, min_shard_elements, float(timeout_seconds), len(local), local[0].split(":")[0]
        )
        if cluster is not None and _compat.runtime_is_initialized():
            raise RuntimeError(
                "TensorFlow was used before the ZeroStrategy was made, and then it cannot join other workers any more. "
                "Make the strategy at the start of the program, before any tensor, variable or model."
            )
        self.channel = Channel.join(cluster or Cluster(("localhost:1",), ("worker 0",), 0), timeout_seconds)
        self.channel.agree("making a ZeroStrategy", asdict(self.settings), "settings")
        # The stock constructor would make its own extended.
        _compat.distribute_lib.Strategy.__init__(self, ZeroExtended(self, cluster, local))
        self.extended.meet()

    def reduce(self, reduce_op, value, axis=None):
        """As `tf.distribute.Strategy.reduce`. Of a structure of values it returns the first replica's, for its specs:

        Keras's trainer asks for that to learn shapes (`_maybe_symbolic_build`). It also asks to reduce scalars along
        axis 0 (`reduce_per_replica`), which can only mean over replicas.
        """
        if tf.nest.is_nested(value) and not isinstance(value, tf.distribute.DistributedValues):
            return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)
        first = self.experimental_local_results(value)[0]
        if is_global(first) and str(getattr(reduce_op, "value", reduce_op)).upper() == "MEAN":
            return first
        if axis == 0 and getattr(getattr(first, "shape", None), "rank", None) == 0:
            axis = None
        return super().reduce(reduce_op, value, axis)

    def cut_batch(self, batch):
        """One global batch as per-replica values, cut as `experimental_distribute_dataset` cuts it."""
        parts = cut_batch(batch, self.extended.seats)
        return tf.nest.map_structure(lambda *leaves: _compat.per_replica(leaves), *parts)

    @contextlib.contextmanager
    def agreed_randomness(self):
        """Within it a data pipeline that is built shuffles alike on all workers: as the first worker would."""
        if self.extended.seats.workers == 1:
            yield
            return
        state = self.channel.broadcast("preparing data", _compat.random_state())
        unseeded = state["seed"] is None
        if unseeded:
            draw = int.from_bytes(os.urandom(4), "little")
            state["seed"] = self.channel.broadcast("drawing a seed to shuffle by", draw)
        _compat.set_random_state(state)
        try:
            yield
        finally:
            if unseeded:
                tf.random.set_seed(None)


class ZeroExtended(_compat.CollectiveAllReduceExtended):
    """What TensorFlow and Keras call when they meet replicas: variables, collectives and input."""

    def __init__(self, strategy: ZeroStrategy, cluster: Cluster | None, devices: Sequence[str]) -> None:
        self._local_devices = tuple(devices)
        self._creating_optimizer_state = False
        self._settings = strategy.settings
        self._channel = strategy.channel
        options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=strategy.settings.timeout_seconds)
        resolver = None if cluster is None else _resolver(cluster)
        super().__init__(strategy, resolver, options, devices=None if cluster else list(devices))
        # Every replica gets an element of every batch (`inputs.py`), so nobody need ask who has one.
        self.experimental_enable_get_next_as_optional = False
        self.seats = Seats(self._id_in_cluster, self._num_workers, len(self.worker_devices))
        self.group = Group(
            self.worker_devices,
            self._num_replicas_in_sync,
            self._id_in_cluster * len(self.worker_devices),
            strategy.settings.timeout_seconds,
            "NCCL" if strategy.settings.device_type == "GPU" else "RING",
        )

    def meet(self) -> None:
        """Forms the collective group, and makes sure that TensorFlow numbers its members as tfzero does."""
        ranks = [tf.constant([self.group.rank(k)]) for k in range(len(self.worker_devices))]
        seen = self.group.launch(self.group.all_gather, ranks)[0]
        if seen.numpy().ravel().tolist() != list(range(self.group.world_size)):
            raise RuntimeError(f"TensorFlow ordered the replicas {seen.numpy().ravel().tolist()}, not by rank.")

    # Collectives.

    def _use_merge_call(self) -> bool:
        # In a graph every replica's part of a collective is traced with it; eager replicas run one after the other.
        return tf.executing_eagerly()

    def replica_collective(self, method, value, *args):
        """One of the group's collectives from within a replica, in a graph or eagerly."""
        if not tf.executing_eagerly():
            return method(value, _compat.replica_index(), *args)

        def together(strategy, value):
            return _compat.per_replica(self.group.launch(method, self._spread(value), *args))

        return tf.distribute.get_replica_context().merge_call(together, args=(value,))

    def share(self) -> tf.Tensor | None:
        """This replica's rows of the batch over the rows of all, float32; None if `run` was given nothing with rows.

        [Note: share] The batch is the first argument of the function that `run` runs. The share is what a mean over
        this replica's samples must be multiplied with to be its part of the mean over all samples.
        """
        thread = _compat.replica_thread()
        if thread is None:
            return None
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        known = thread.__dict__.setdefault("_tfzero_shares", {})
        if graph not in known:
            leaves = tf.nest.flatten([thread.main_args, thread.main_kwargs])
            rows = next((rows for rows in map(rows_of, leaves) if rows is not None), None)
            if rows is None:
                return None
            total = self.replica_collective(self.group.all_reduce, rows)
            known[graph] = tf.cast(tf.math.divide_no_nan(tf.cast(rows, tf.float64), tf.cast(total, tf.float64)), tf.float32)
        return known[graph]

    def average(self, value: tf.Tensor) -> tf.Tensor:
        """Mean over replicas, weighted by their shares of the batch."""
        if self.group.world_size == 1:
            return value
        share = self.share()
        if share is None:
            share = tf.constant(1.0 / self.group.world_size)
        wide = tf.cast(value, tf.float64 if value.dtype == tf.float64 else tf.float32)
        weighted = tf.where(share > 0, wide * tf.cast(share, wide.dtype), tf.zeros_like(wide))
        return tf.cast(self.replica_collective(self.group.all_reduce, weighted), value.dtype)

    def whole_value(self, parts: Sequence[tf.Variable], shape: tf.TensorShape, owner: int | None) -> tf.Tensor:
        """A variable from the parts that its replicas hold."""
        values = [tf.reshape(tf.convert_to_tensor(part), [-1]) for part in parts]
        if owner is not None:
            flat = self.group.launch(self.group.all_gather_parts, values)[0][owner]
        else:
            flat = tf.reshape(self.group.launch(self.group.all_gather, values)[0], [-1])[: shape.num_elements()]
        return tf.reshape(flat, shape)

    def _spread(self, value) -> list:
        """One tensor for each local replica."""
        results = self._container_strategy().experimental_local_results(value)
        if len(results) < len(self.worker_devices):
            results = results * len(self.worker_devices)
        return [tf.convert_to_tensor(result) for result in results]

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        del options

        def reduce(leaf):
            total = self.replica_collective(self.group.all_reduce, tf.convert_to_tensor(leaf))
            return _divide(total, self.group.world_size) if reduce_op == tf.distribute.ReduceOp.MEAN else total

        flat = tf.nest.flatten(value)
        return tf.nest.pack_sequence_as(value, [reduce(leaf) for leaf in flat])

    def _reduce_to(self, reduce_op, value, destinations, options):
        del destinations, options
        mean = reduce_op == tf.distribute.ReduceOp.MEAN
        if mean and (
            isinstance(value, tf.types.experimental.distributed.Mirrored)
            or (self._num_workers == 1 and not isinstance(value, tf.distribute.DistributedValues))
        ):
            return value
        values, count = self._spread(value), self.group.world_size
        if not isinstance(value, tf.distribute.DistributedValues):
            # One value for each worker: its first replica speaks for it.
            values, count = [values[0], *map(tf.zeros_like, values[1:])], self._num_workers
        totals = self.group.launch(self.group.all_reduce, values)
        return _compat.mirrored([_divide(total, count) if mean else total for total in totals])

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        return [self._reduce_to(reduce_op, value, where, options) for value, where in value_destination_pairs]

    def _gather_to_implementation(self, value, destinations, axis, options):
        del destinations, options
        parts = self.group.launch(self.group.all_gather_parts, self._spread(value))
        if not isinstance(value, tf.distribute.DistributedValues):
            # One value for each worker: its first replica speaks for it.
            parts = [replica_parts[:: len(self.worker_devices)] for replica_parts in parts]
        return _compat.mirrored([tf.concat(replica_parts, axis) for replica_parts in parts])

    def _batch_gather_to(self, value_destination_pairs, axis, options=None):
        return [self._gather_to_implementation(value, where, axis, options) for value, where in value_destination_pairs]

    # Variables.

    @contextlib.contextmanager
    def creating_optimizer_state(self):
        """Within it new variables are an optimizer's, which all replicas update alike."""
        self._creating_optimizer_state = True
        try:
            yield
        finally:
            self._creating_optimizer_state = False

    def take_in(self, variables) -> None:
        """Makes Keras variables that were made outside the scope this strategy's, with their values, in place."""
        for variable in variables:
            if getattr(variable.value, "distribute_strategy", None) is not self._container_strategy():
                with tf.init_scope(), self._container_strategy().scope():
                    _compat.remake(variable)

    def _validate_colocate_with_variable(self, colocate_with_variable):
        if not isinstance(colocate_with_variable, VariableView):
            super()._validate_colocate_with_variable(colocate_with_variable)

    def _create_variable(self, next_creator, **kwargs):
        view = kwargs.pop("colocate_with", None)
        if view is not None and not isinstance(view, VariableView | _compat.DistributedVariable):
            return super()._create_variable(next_creator, colocate_with=view, **kwargs)
        with tf.device(self.worker_devices[0]):
            initial_value = _initial_value(kwargs)
        if isinstance(view, VariableView):
            return self._create_slot(next_creator, view, initial_value, kwargs)
        self._agree_on_variable(kwargs.get("name"), initial_value)
        if initial_value.dtype != tf.string and self._num_workers > 1:
            copies = self.group.launch(self.group.broadcast, [initial_value] * len(self.worker_devices))
        else:
            copies = [initial_value] * len(self.worker_devices)
        return self._replicate(next_creator, copies, kwargs)

    def _agree_on_variable(self, name: str | None, initial_value: tf.Tensor) -> None:
        what = {"shape": str(initial_value.shape), "dtype": initial_value.dtype.name}
        self._channel.agree("creating a variable", what, f"models (at the variable {name!r})")

    def _replicate(self, next_creator, copies: Sequence[tf.Tensor], kwargs: dict):
        """A distributed variable of one component for each local replica."""

        def components(**kwargs):
            values: list[tf.Variable] = []
            for device, copy in zip(self.worker_devices, copies, strict=True):
                values.append(_component(next_creator, device, copy, values, kwargs))
            return values

        averaged = (
            copies[0].dtype.is_floating
            and kwargs.get("trainable") is False
            and kwargs.get("aggregation", tf.VariableAggregation.NONE) == tf.VariableAggregation.NONE
            and not self._creating_optimizer_state
        )
        classes = {
            tf.VariableSynchronization.ON_WRITE: AveragedVariable if averaged else ReplicatedVariable,
            tf.VariableSynchronization.ON_READ: OnReadVariable,
        }
        return _compat.create_mirrored_variable(self._container_strategy(), components, classes, {}, **kwargs)

    def _create_slot(self, next_creator, view: VariableView, initial_value: tf.Tensor, kwargs: dict):
        """An optimizer's slot: as the plan places its variable, or a replica's own when it accumulates whole."""
        if self._settings.stage < 2 and _compat.is_accumulator_name(kwargs["name"]):
            kwargs |= {
                "synchronization": tf.VariableSynchronization.ON_READ,
                "aggregation": tf.VariableAggregation.SUM,
            }
            return self._replicate(next_creator, [initial_value] * len(self.worker_devices), kwargs)
        if not view.sharded:
            return self._replicate(next_creator, [initial_value] * len(self.worker_devices), kwargs)
        kwargs.pop("shape", None)
        values: list[tf.Variable] = []
        for replica, device in enumerate(self.worker_devices):
            part = local_part(initial_value, view.owner, self.group.rank(replica), self.group.world_size)
            values.append(_component(next_creator, device, part, values, kwargs))
        return ShardedVariable(self._container_strategy(), values, initial_value.shape, view.owner)

    # Input.

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        del cluster_resolver
        return tuple(f"{worker_device}/device:{name}" for name in self._local_devices), self._settings.device_type

    def _experimental_distribute_dataset(self, dataset, options):
        if not isinstance(dataset, tf.data.Dataset):
            raise ValueError(f"ZeroStrategy distributes a tf.data.Dataset, but received {dataset!r}.")
        check_shardable(dataset, self._num_workers)
        return _compat.get_distributed_datasets_from_function(
            lambda _: cut_dataset(dataset, self.seats),
            self._input_workers_with_options(options),
            [self._make_input_context()],
            self._container_strategy(),
            options,
        )


def mark_global(tensor: tf.Tensor) -> tf.Tensor:
    """Notes that a tensor has the same value on all replicas, so that nobody need reduce it."""
    tensor._tfzero_global = True
    return tensor


def is_global(tensor) -> bool:
    """Whether `mark_global` was called on a tensor."""
    return getattr(tensor, "_tfzero_global", False)


def _divide(total: tf.Tensor, count: int) -> tf.Tensor:
    return total / tf.cast(count, total.dtype) if total.dtype.is_floating else tf.cast(total / count, total.dtype)


def _initial_value(kwargs: dict) -> tf.Tensor:
    value = kwargs["initial_value"]
    if callable(value):
        value = value()
    value = getattr(value, "wrapped_value", value)  # a value restored from a checkpoint
    return tf.convert_to_tensor(value, dtype=kwargs.get("dtype"))


def _component(next_creator, device: str, value: tf.Tensor, made: Sequence[tf.Variable], kwargs: dict) -> tf.Variable:
    """One replica's variable; names as in TensorFlow's mirrored_strategy.py."""
    kwargs = dict(kwargs)
    if made:
        kwargs["name"] = f"{made[0].name.split(':')[0]}/replica_{len(made)}/"
    with tf.device(device):
        kwargs["initial_value"] = tf.identity(value)
        return next_creator(**kwargs)


def _check_stage(stage) -> None:
    if stage == 3 and stage is not True:
        raise NotImplementedError("stage=3 (sharded parameters) is not there yet. Use stage 0, 1 or 2.")
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"`stage` must be one of {STAGES}. Received: stage={stage!r}")


def _check_number(name: str, value, kinds, least) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        kind = "an integer" if kinds is int else "a number"
        raise ValueError(f"`{name}` must be {kind} of at least {least}. Received: {name}={value!r}")


def _find_cluster(resolver) -> Cluster | None:
    if resolver is None:
        return read_tf_config()
    if not isinstance(resolver, tf.distribute.cluster_resolver.ClusterResolver):
        raise ValueError(f"`cluster_resolver` must be a ClusterResolver. Received: {resolver!r}")
    spec = resolver.cluster_spec()
    return cluster_from_spec(spec.as_dict() if spec else {}, resolver.task_type, resolver.task_id)


def _resolver(cluster: Cluster) -> tf.distribute.cluster_resolver.SimpleClusterResolver:
    jobs: dict[str, list[str]] = {}
    for name, address in zip(cluster.names, cluster.addresses, strict=True):
        jobs.setdefault(name.split(" ")[0], []).append(address)
    job, index = cluster.name.split(" ")
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(jobs), task_type=job, task_id=int(index), rpc_layer="grpc"
    )


def _configure_cpu_devices() -> None:
    """`python -m tfzero.launch --cpu-devices K` asks for K logical CPU devices in each worker."""
    count = os.environ.get("TFZERO_CPU_DEVICES")
    if count is None or _compat.runtime_is_initialized():
        return
    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(count))


def _machine_devices(kind: str) -> list[str]:
    """Names of this process's logical devices, without making TensorFlow create them yet."""
    configurations = [tf.config.get_logical_device_configuration(d) for d in tf.config.list_physical_devices(kind)]
    return [f"{kind}:{k}" for k in range(sum(len(c) if c else 1 for c in configurations))]


def _choose_devices(devices: Sequence[str] | None) -> list[str]:
    cpus, gpus = _machine_devices("CPU"), _machine_devices("GPU")
    if devices is None:
        return gpus or cpus
    if isinstance(devices, str) or not devices:
        raise ValueError(f"`devices` must be a list of device names, such as ['CPU:0']. Received: {devices!r}")
    try:
        specs = [tf.DeviceSpec.from_string(d if d.startswith("/") else f"/device:{d}") for d in devices]
    except (AttributeError, ValueError) as error:
        raise ValueError(f"`devices` must name devices, such as ['CPU:0']. Received: {devices!r}") from error
    names = [f"{spec.device_type}:{spec.device_index or 0}" for spec in specs]
    known = gpus + cpus
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"Unknown devices {unknown}: this process has {known}. For more logical CPU devices call "
            f"`tf.config.set_logical_device_configuration` first. Received: devices={list(devices)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"A device may be named once only. Received: devices={list(devices)}")
    if len({name.split(":")[0] for name in names}) > 1:
        raise ValueError(f"All replicas need devices of one type, CPU or GPU. Received: devices={list(devices)}")
    return names
