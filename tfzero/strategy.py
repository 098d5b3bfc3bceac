"""ZeroStrategy: a `tf.distribute.Strategy` that shards optimizer state, gradients and parameters over its replicas."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import tensorflow as tf

from tfzero.collectives.joining import join
from tfzero.collectives.network import DEFAULT_BUCKET_BYTES
from tfzero.collectives.transport import Surroundings
from tfzero.collectives.transport_choice import choose
from tfzero.extended import ZeroExtended
from tfzero.host import patches
from tfzero.host.devices import choose_devices, configure_cpu_devices, in_order
from tfzero.plan.merging import check_merging
from tfzero.plan.serving import check_serving
from tfzero.plan.settings import (
    DEFAULT_COMPARE_BATCHES,
    DEFAULT_MIN_SHARD_ELEMENTS,
    Settings,
    check_given,
    choose_levels,
)
from tfzero.plan.shares import EVEN, check_length, check_rows
from tfzero.report import Report, make_report
from tfzero.rows.dependence import is_global
from tfzero.rows.inputs import DataPosition, counts_batches, without_tuning
from tfzero.servers.serve import serve
from tfzero.servers.served_steps import ServedSteps
from tfzero.training.local_steps import LocalSteps
from tfzero.training.outer import outer_maker
from tfzero.variables.classes import ShardedVariable, agree_on_sharded
from tfzero.workers.cluster import Cluster, others_of, sizes_of
from tfzero.workers.device_agreement import agree_on_devices
from tfzero.workers.digests import BatchComparison
from tfzero.workers.resolvers import find_cluster
from tfzero.workers.stopping import AgreedStop


class ZeroStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """Synchronous data parallelism with sharded optimizer state, gradients and parameters.

    ZeRO, https://arxiv.org/abs/1910.02054. It is built on `CollectiveAllReduceStrategy` of
    `tensorflow/python/distribute/collective_all_reduce_strategy.py`.

    Use it in place of `tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`: create the model under
    `strategy.scope()`, then `compile` and `fit` as on one device, with the global batch size. The result does not
    depend on the number of replicas.

    | stage | parameters | gradients                            | optimizer slots |
    |-------|------------|--------------------------------------|-----------------|
    | 0     | whole      | whole                                | whole           |
    | 1     | whole      | whole, when they are accumulated     | shard           |
    | 2     | whole      | shard, bucket by bucket              | shard           |
    | 3     | shard      | shard                                | shard           |

    Args:
        stage: how much is sharded: 0, 1, 2 or 3.
        devices: this process's devices, in any order, such as `["GPU:0", "GPU:1"]`. The default is all its GPUs, or all
            its logical CPU devices if it has no GPU. Every worker must have as many devices, all of one type.
        cluster_resolver: a `tf.distribute.cluster_resolver.ClusterResolver` that names the workers. The default is
            `TF_CONFIG`, or `CLUSTER_SPEC`; without them this process is the only worker.
        bucket_bytes: gradients travel in buckets of at most this many bytes (a larger variable travels alone). "auto"
            measures the network when the optimizer is built, and picks a size for the model.
        min_shard_elements: variables with fewer elements stay whole on every replica.
        timeout_seconds: how long a worker waits for the others before it gives up with an error: at the start, and in
            every exchange of a step. The value of the latest strategy applies to all strategies of the process.
        reshard_after_forward: at stage 3, whether gathered parameters are freed after the forward pass and gathered
            again in the backward pass (the default). False keeps them: a third less to send, and more memory.
        compression: wire format of float32 matrices: None (not encoded), "bf16", "fp16" or "int8" (the latter two with
            one scale for each 256 elements). Gradients are summed in float32. At stages 1 and 2 parameters travel as
            differences, and owners keep float32 master values (4/N more bytes per parameter). At stage 3 replicas
            compute with encoded weights, as in ZeRO++ (https://arxiv.org/abs/2306.10209). Vectors are never encoded.
            Up to stage 2 neither are variables with a constraint, nor those that one owner updates whole. Between GPUs
            of several processes only parameters are encoded, gradients are not.
        error_feedback: with "int8", whether replicas keep what the encoding of gradients loses and add it to the next
            gradients (4 more bytes per parameter).
        hierarchical: with several devices in each of several workers, whether gradients are summed within each worker
            first and then across workers, in float32 if compression is used. "auto" enables this on CPU devices,
            unless stage, `error_feedback` or the number of devices leave nothing to gain.
        overlap_param_gather: at stages 1 and 2, in `fit` with `steps_per_execution` of 2 or more, whether updated
            parameters are gathered during the next step's forward pass, as with Megatron-LM's option of this name,
            instead of while gradients are still in flight. It pays off on slow networks.
        compare_batches: number of batches that workers compare, by shape and content, at the start of every pass over
            data, before a step takes them. 0 turns this off, for data that may rightly differ.
        rows: how the rows of each batch are dealt to the replicas, which makes no difference to the result: "even";
            "measured", by their speed in `fit` (at stages 0 to 2; shares change once in 32 steps at most, and every
            worker reads whole batches); or a share for each replica, those of the first worker first, such as `[2, 1]`.
            Data of which each worker brings its own rows are dealt to that worker's replicas.
        sync_every: how many steps of `fit` or `train_on_batch` each worker takes alone before all are merged. Its own
            devices stay synchronous, and shard as `stage` says. None: all workers take every step together.
            `compression` and `error_feedback` are then for what merges send.
        outer_optimizer: merges workers: None for `SGD(0.7, momentum=0.9, nesterov=True)` (DiLoCo,
            https://arxiv.org/abs/2311.08105), or with `sync_every=1` the mean; "average" for the mean of their weights
            (local SGD, https://arxiv.org/abs/1808.07217); the name or config of an element-wise Keras optimizer, or a
            function that makes one. Its slots are sharded over workers.
        sync_warmup: with `sync_every`, how many first steps all workers take together, as without it.
        max_staleness: with parameter servers ("ps" in `TF_CONFIG`), how many steps a worker may be ahead of the
            slowest: at 0 all take each step together; None sets no bound. A server's process serves within this
            constructor, and exits when all workers have left.
        staleness_aware: with `max_staleness` above 0, whether servers divide the learning rate of an update by its
            staleness, the number of other updates since its worker pulled (https://arxiv.org/abs/1511.05950).

    Raises:
        ValueError: for settings, devices or a `TF_CONFIG` that are invalid or differ between workers.
        TimeoutError: if a worker does not arrive within `timeout_seconds`; the message names it.
        RuntimeError: if TensorFlow was used before the strategy was made, with several workers; or if `srun`, `mpirun`
            or `torchrun` started this process as one of several tasks, and nothing names the other workers.

    Example:

    ```python
    strategy = tfzero.ZeroStrategy(stage=2)
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(512), keras.layers.Dense(3)])
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, y, batch_size=16)  # x: [samples, 8], y: [samples, 3]; 16 samples a step over all replicas
    ```
    """

    def __init__(
        self,
        stage: int = 2,
        *,
        devices: Sequence[str] | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        bucket_bytes: int | str = DEFAULT_BUCKET_BYTES,
        min_shard_elements: int = DEFAULT_MIN_SHARD_ELEMENTS,
        timeout_seconds: float = 60.0,
        reshard_after_forward: bool | None = None,
        compression: str | None = None,
        error_feedback: bool = False,
        hierarchical: bool | str = "auto",
        overlap_param_gather: bool = False,
        compare_batches: int = DEFAULT_COMPARE_BATCHES,
        rows: str | Sequence[float] = EVEN,
        sync_every: int | None = None,
        outer_optimizer: str | dict | Callable[[], Any] | None = None,
        sync_warmup: int = 0,
        max_staleness: int | None = 0,
        staleness_aware: bool = False,
    ) -> None:
        patches.install()
        check_given(
            stage, bucket_bytes, min_shard_elements, timeout_seconds, reshard_after_forward, compression,
            error_feedback, overlap_param_gather, compare_batches,
        )  # fmt: skip
        merging = check_merging(
            sync_every, outer_optimizer, sync_warmup, compression=compression, error_feedback=error_feedback,
            rows=rows, hierarchical=hierarchical,
        )  # fmt: skip
        self.fleet = find_cluster(cluster_resolver)
        serving = check_serving(
            *sizes_of(self.fleet), max_staleness, staleness_aware, compression=compression, rows=rows,
            error_feedback=error_feedback, overlap_param_gather=overlap_param_gather, sync_every=sync_every,
        )  # fmt: skip
        if self.fleet is not None and self.fleet.is_server:
            raise SystemExit(serve(self.fleet))
        cluster = None if serving else others_of(self.fleet)
        configure_cpu_devices()
        named = choose_devices(devices)
        local = in_order(named)
        workers = 1 if cluster is None else cluster.size
        self.settings = Settings(
            stage, bucket_bytes, min_shard_elements, float(timeout_seconds), len(local), local[0].split(":")[0],
            reshard_after_forward is not False, None if merging else compression, error_feedback and not merging,
            False if merging else hierarchical, overlap_param_gather, compare_batches,
            check_rows(rows, stage, named, local), merging, serving,
        )  # fmt: skip
        self._choose_transport(len(local), workers)
        self.optimizers: weakref.WeakSet = weakref.WeakSet()  # those built for its variables
        self.announced: weakref.WeakSet = weakref.WeakSet()  # those whose report `fit` has printed
        self.data_position: DataPosition | None = None  # where the next training data begin
        self.sharded_numbers = itertools.count()  # number its sharded variables, alike on all workers
        self._join(cluster, local)
        self.local_steps = LocalSteps(self)
        self.served = None if serving is None else ServedSteps(self, self.fleet)
        self.make_outer = outer_maker(outer_optimizer, merging)  # as it uses TensorFlow

    def _choose_transport(self, devices: int, workers: int) -> None:
        kind = self.settings.device_type
        self._surroundings = Surroundings(kind, devices, workers)
        self.transport = choose(self._surroundings)  # chosen again when the workers have met
        self.levels = choose_levels(self.settings, workers, self.transport.obstacle_of_levels(kind))
        self.transport.check(self.settings, workers)

    def _join(self, cluster: Cluster | None, devices: Sequence[str]) -> None:
        """Meets the other workers, agrees with them on the settings, and forms the group of all replicas."""
        joined = join(cluster, self.settings.timeout_seconds)
        self.channel, self.saving_channel = joined.channel, joined.saving_channel
        self.stop = AgreedStop() if joined.pulse is None else joined.pulse.stop_together
        if cluster is not None:
            agree_on_devices(self.channel, cluster, devices)
        check_length(self.settings.rows, len(devices) * (1 if cluster is None else cluster.size))
        agreed = {**asdict(self.settings), "transport": self.transport.name}
        self.channel.agree("making a ZeroStrategy", agreed, "settings")
        self.transport = choose(replace(self._surroundings, connections=joined.connections))
        joined.wait_at_most(self.settings.timeout_seconds)
        workers, on_loss = (1, print) if joined.pulse is None else (cluster.size, joined.pulse.hear_of_loss)
        self.comparison = BatchComparison(joined.batch_channel, workers, self.settings.compare_batches, on_loss)
        self._check_batch = self.comparison.of_given("those given to `cut_batch`")
        self.check_predicted = self.comparison.of_given("those given to `predict_on_batch`")
        self.transport.prepare()
        # The stock constructor would make its own extended.
        tf.distribute.Strategy.__init__(self, ZeroExtended(self, cluster, devices))
        made = {"key of the new group": self.extended.group.key}
        self.channel.agree("starting TensorFlow's servers", made, "earlier strategies")
        if joined.pulse is not None:
            joined.pulse.add(self.extended.group)
        name = "this process" if cluster is None else cluster.name
        with self.transport.meeting(name, self.settings.timeout_seconds):
            self.extended.meet()

    def distribute_datasets_from_function(
        self, dataset_fn: Callable[[tf.distribute.InputContext], tf.data.Dataset], options: Any = None
    ) -> Any:
        """As TensorFlow's: a distributed dataset of what a function gives each worker, which `tf.data` does not tune.

        Args:
            dataset_fn: gives this worker's batches, for a `tf.distribute.InputContext`.
            options: `tf.distribute.InputOptions`, or None.

        Returns:
            A distributed dataset, for `fit` and for iteration.

        Example:

        ```python
        def read(context):
            whole = tf.data.Dataset.from_tensor_slices((x, y))
            own = whole.shard(context.num_input_pipelines, context.input_pipeline_id)
            return own.batch(context.get_per_replica_batch_size(16))
        model.fit(strategy.distribute_datasets_from_function(read), steps_per_epoch=2, shuffle=False)
        ```
        """
        self.extended.shares.note_ready_parts()
        fleet = self.extended.fleet
        context = tf.distribute.InputContext(fleet.workers, fleet.worker, fleet.replicas)
        return super().distribute_datasets_from_function(lambda _: without_tuning(dataset_fn(context)), options)

    def reduce(self, reduce_op: str | tf.distribute.ReduceOp, value: Any, axis: int | None = None) -> Any:
        """Reduces the values of all replicas to one, like `tf.distribute.Strategy.reduce`. All workers call it.

        Each value of a structure is reduced. Keras's trainer (`keras/src/backend/tensorflow/trainer.py`) needs two
        more cases: the first replica's values, from which it only learns shapes; and scalars along axis 0
        (`reduce_per_replica`), which can only mean a reduction over replicas.

        Args:
            reduce_op: "SUM" or "MEAN", or a `tf.distribute.ReduceOp`.
            value: the result of `strategy.run`: a tensor `[*shape]` for each replica, or a structure of them.
            axis: None to reduce over replicas only, or an axis of the tensors to reduce along as well.

        Returns:
            A tensor `[*shape]`, without the axis if one was given; or a structure of them.

        Example:

        ```python
        counts = strategy.run(tf.function(lambda: tf.constant([1.0, 2.0])))  # [2] on each replica
        total = strategy.reduce("SUM", counts, axis=None)  # [2]: replicas times [1, 2]
        ```
        """
        if tf.nest.is_nested(value) and not isinstance(value, tf.distribute.DistributedValues):
            if self.extended.gives_first_values:
                return tf.nest.map_structure(lambda v: self.experimental_local_results(v)[0], value)
            return tf.nest.map_structure(lambda v: None if v is None else self.reduce(reduce_op, v, axis), value)
        if counts_batches(value):  # all must know whether one has a batch left, also while they train apart
            with self.extended.apart.paused():
                return super().reduce(reduce_op, value, axis)
        first = self.experimental_local_results(value)[0]
        if is_global(first) and str(getattr(reduce_op, "value", reduce_op)).upper() == "MEAN":
            return first
        is_number = isinstance(first, int | float)  # logs of an eager step, in older versions of Keras
        if axis == 0 and (is_number or getattr(getattr(first, "shape", None), "rank", None) == 0):
            axis = None
        return super().reduce(reduce_op, value, axis)

    def report(self) -> Report:
        """Reports settings, placements, bytes and messages. `print(strategy.report())` shows all of it.

        `fit` prints `strategy.report().summary()` when it starts, on the first worker at `verbose=1`. Trained variables
        and traffic are included once an optimizer has been built.

        Returns:
            A `Report`: `options`, `variables` (bytes of each on this worker's first replica), and `sent_bytes` and
            `messages` of one step on each replica.

        Example:

        ```python
        report = strategy.report()
        print(report)
        sharded = [variable.name for variable in report.variables if variable.placement == "sharded"]
        ```
        """
        trained = [optimizer.trained for optimizer in self.optimizers]
        made = make_report(self.settings, self.extended.own_group, self.levels, self.extended.mesh, trained)
        account = self.extended.input_account
        return replace(
            made,
            options={**made.options, "rows": str(self.extended.shares)},
            batches=account.batches,
            input_seconds=account.seconds,
            read_bytes=account.bytes,
        )

    def merge(self, reason: str = "`strategy.merge`") -> None:
        """Merges all models that workers have trained apart, with `sync_every`. All workers call it together.

        `fit` does so by itself: after every `sync_every` steps, at the end of an epoch, and before validation,
        predictions and saves. Call it after the last `train_on_batch`, before weights are read. With parameter servers
        this worker takes what they have now.

        Args:
            reason: what for; in messages.

        Raises:
            RuntimeError: if workers are at different places of the program.
            TimeoutError: if a worker does not come.

        Example:

        ```python
        model.train_on_batch(x[:16], y[:16])
        strategy.merge()  # without `sync_every` there is nothing to merge
        ```
        """
        if self.settings.merging is not None:
            self.local_steps.meet(reason)
        if self.served is not None:
            self.served.refresh()

    def cut_batch(self, batch: Any) -> Any:
        """Cuts one global batch into per-replica values, as `experimental_distribute_dataset` does.

        Args:
            batch: a structure of tensors or arrays `[samples, ...]`, the same on all workers.

        Returns:
            The same structure, for `strategy.run`: each replica's tensors are its rows. The last replicas may have
            fewer rows than the others, or none.

        Example:

        ```python
        features, targets = strategy.cut_batch((x[:10], y[:10]))
        rows = strategy.run(lambda part: tf.shape(part)[0], args=(features,))  # on two replicas 5 and 5
        ```
        """
        self._check_batch(batch)
        return self.extended.cut_batch(batch)

    @contextlib.contextmanager
    def gathered(self, variables: Any) -> Iterator[None]:
        """Holds whole values of sharded variables on every worker; on exit, assigned values are written back.

        Use it to read and change parameters between steps without a collective for each access. All workers must enter
        and leave it. If they assign different values, the first worker's values count. Replicas see assigned values
        after the context. A nested `gathered` shares the values that the outer one holds. Variables that are whole
        anyway are left alone.

        Args:
            variables: a Keras variable of this strategy, or a list of them.

        Raises:
            ValueError: for variables of another strategy or of none, or if workers name different variables.
            TimeoutError: if a worker does not arrive within `timeout_seconds`.

        Example:

        ```python
        kernel = model.layers[-1].kernel
        with strategy.gathered([kernel]):
            kernel.assign(keras.ops.clip(kernel, -0.1, 0.1))  # whole, whatever each replica holds of it
        ```
        """
        variables = list(variables) if isinstance(variables, list | tuple) else [variables]
        values = [getattr(variable, "value", variable) for variable in variables]
        strange = [v.name for v in values if getattr(v, "distribute_strategy", None) is not self]
        if strange:
            raise ValueError(f"`gathered` takes variables made under this strategy's scope, but received {strange}.")
        sharded = {value.number: value for value in values if isinstance(value, ShardedVariable)}
        held = [sharded[number] for number in sorted(sharded)]
        self.merge("gathering variables")
        agree_on_sharded(self.channel, "gathering variables", held, "variables to gather")
        for value in held:
            value.hold()
        completed = False
        try:
            yield
            self.channel.all_gather("writing gathered variables back", None)
            completed = True
        finally:
            for value in held:
                value.let_go(write_back=completed)
