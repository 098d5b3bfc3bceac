"""Merges variables that workers have trained apart. [Note: local steps] in `plan/merging.py`

[Note: merging] Of each variable (at stage 3: of each replica's shard of it) every worker owns one part. All workers
send the owner their values of its part. It takes the mean of what they have changed since the last merge, weighted by
the rows that they trained with, as the gradient of an outer optimizer. It alone holds that optimizer's slots, and the
`master` that the optimizer updates. Then it sends the result to all. So a merge sends as much as one step of stage 0,
where an all-to-all is one (not in NCCL between processes, which gathers).

With compression workers send differences from the values of the last merge, which each keeps (`common`). The owner
sends the encoded difference between its master and these values. What that encoding loses stays in the master; what the
workers' own encoding loses stays in their `residual`, with error feedback.

[Note: window] When a window of local steps begins, the variables may be others than the last merge has left, as a file
was loaded. Element by element, where the variable is what the merge has left, the master stays as it is; else it
becomes the variable.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from tfzero.collectives import ways
from tfzero.collectives.codec import Codec
from tfzero.collectives.group import Group
from tfzero.host import keras_objects, runtime
from tfzero.plan.merging import AVERAGE, Merging
from tfzero.plan.placement import shard_elements
from tfzero.training.outer import MASTER, Part, Place, outside_of_scopes
from tfzero.training.overwriting import is_overwritten
from tfzero.training.stock_optimizers import settings_of, update_part
from tfzero.variables.classes import ShardedParameter


class Merger:
    """Merges the variables that one optimizer trains. All workers make and call it together. [Note: merging]

    Args:
        variables: the trained variables of the model.
        group: the group of all replicas, with its levels.
        settings: how to merge.
        make_outer: makes the outer optimizer; None to take the mean.
        bucket_bytes: of a message.

    Raises:
        ValueError: for an outer optimizer that cannot be applied to parts of variables.
    """

    def __init__(self, variables: Sequence[keras.Variable], group: Group, settings: Merging,
                 make_outer: Callable[[], keras.optimizers.Optimizer] | None, bucket_bytes: int) -> None:  # fmt: skip
        self.variables = tuple(variables)
        self.group, self.across = group, group.across
        self._codec = Codec.of(settings.compression) if self.across.world_size > 1 else None
        self._feedback = settings.error_feedback
        self._make_outer = make_outer
        self.places: list[Place] = outside_of_scopes(lambda: list(self._make_places(bucket_bytes)))
        self._merge: Callable[[tf.Tensor], tf.Tensor] | None = None  # traced when it is first needed
        self.begin()

    def begin(self) -> None:
        """Begins a window of local steps. [Note: window]"""
        with tf.init_scope():
            for place in self.places:
                for part in place.parts:
                    self._begin_part(place, part, part.flat)

    def flat_parts(self, index: int) -> list[tf.Tensor]:
        """What this worker's replicas hold of a variable now."""
        return [tf.identity(part.flat) for _, part in self._parts_of(index)]

    def begin_from(self, index: int, flats: Sequence[tf.Tensor]) -> None:
        """Takes other values of a variable, of `flat_parts`, for those that all workers had when the window began."""
        for (place, part), flat in zip(self._parts_of(index), flats, strict=True):
            self._begin_part(place, part, flat)

    def _begin_part(self, place: Place, part: Part, flat: tf.Tensor) -> None:
        with tf.device(self.group.devices[place.replica]):
            part.begin(flat, self.across.rank(place.replica), self.across.world_size)

    def _parts_of(self, index: int) -> list[tuple[Place, Part]]:
        return [(place, part) for place in self.places for part in place.parts if part.index == index]

    def merge(self, weights: Sequence[float]) -> np.ndarray:
        """Ends a window of local steps: all workers get the same values.

        Args:
            weights: how much each worker's values count; they add up to 1.

        Returns:
            `[workers, workers]`: the products of the workers' differences from the last common values.
        """
        if self._merge is None:
            spec = tf.TensorSpec([self.across.world_size], tf.float32)
            traced = tf.function(self._merge_all, autograph=False)
            self._merge = outside_of_scopes(lambda: traced.get_concrete_function(spec))
        return self._merge(tf.constant(weights, tf.float32)).numpy()

    def take_up(self) -> None:
        """After masters have been restored: takes the variables for what the last merge has left."""
        for part in (part for place in self.places for part in place.parts if part.common is not None):
            part.common.assign(part.flat)

    def kept(self, index: int) -> dict[str, dict[int, tf.Variable]]:
        """What is kept for a variable between merges, by kind and local replica."""
        found: dict[str, dict[int, tf.Variable]] = {}
        for place, part in self._parts_of(index):
            for kind, variable in place.kept(part).items():
                found.setdefault(kind, {})[place.replica] = variable
        return found

    def span(self, index: int, worker: int, replica: int) -> tuple[int, int]:
        """The flat elements `[begin, end)` of a variable that a worker owns at one of its replicas."""
        first, last = self.whole_span(index, replica)
        width = shard_elements(last - first, self.across.world_size)
        return min(first + worker * width, last), min(first + (worker + 1) * width, last)

    def whole_span(self, index: int, replica: int) -> tuple[int, int]:
        """The flat elements `[begin, end)` of a variable that a worker's replica merges with those of other workers."""
        value = self.variables[index].value
        elements, here = value.shape.num_elements(), self._component(index).num_elements()
        if not isinstance(value, ShardedParameter):
            return (0, elements) if replica == 0 else (0, 0)
        return min(replica * here, elements), min((replica + 1) * here, elements)

    def _component(self, index: int) -> tf.TensorShape:
        return self.variables[index].value.values[0].shape

    def held_bytes(self, index: int) -> int:
        """Bytes that the first replica holds of a variable beside the variable itself."""
        place, part = self._parts_of(index)[0]
        held = {**place.kept(part), MASTER: part.master.value}
        common = 0 if part.common is None else part.elements * 4
        return common + sum(math.prod(each.shape) * tf.as_dtype(each.dtype).size for each in held.values())

    def sent(self) -> tuple[int, int]:
        """Bytes and messages that the first replica sends in a merge, by formula."""
        others, size_bytes, messages = self.across.world_size - 1, 0, 0
        for bucket in self.places[0].buckets:
            width, dtype = sum(part.width for part in bucket), bucket[0].value.dtype
            is_encoded = bucket[0].common is not None
            row_bytes = self._codec.format.size_bytes(width) if is_encoded else width * dtype.size
            way = self.across.way(ways.ALL_TO_ALL, tf.int32 if is_encoded else dtype)
            times = self.across.world_size if way.operation == ways.ALL_GATHER else 1
            size_bytes += others * row_bytes * (times + 1)
            messages += 2 * others
        return size_bytes, messages

    @property
    def title(self) -> str:
        """What merges: the class of the outer optimizer, or "average"."""
        optimizer = self.places[0].optimizer
        return AVERAGE if optimizer is None else type(optimizer).__name__

    # Making.

    def _make_places(self, bucket_bytes: int) -> Iterator[Place]:
        for replica, device in enumerate(self.group.devices):
            with tf.device(device):
                parts = [
                    self._make_part(index, variable, replica, f"part{number}")
                    for number, (index, variable) in enumerate(self._at(replica))
                ]
                optimizer = None if self._make_outer is None or not parts else self._make_outer()
                if optimizer is not None:
                    optimizer.build([part.master for part in parts])
                yield Place(replica, parts, optimizer, bucket_bytes)

    def _at(self, replica: int) -> list[tuple[int, keras.Variable]]:
        """The variables that a replica merges: whole ones are merged by the first, and copied to the others."""
        return [
            (index, variable)
            for index, variable in enumerate(self.variables)
            if len(range(*self.whole_span(index, replica)))
        ]

    def _make_part(self, index: int, variable: keras.Variable, replica: int, name: str) -> Part:
        component = variable.value.values[replica]
        begin, end = self.whole_span(index, replica)
        elements, workers = end - begin, self.across.world_size
        width = shard_elements(elements, workers)
        wide = "float64" if component.dtype == tf.float64 else "float32"
        unknown = np.full([width], np.nan, wide)
        master = keras.Variable(unknown, dtype=wide, trainable=True, name=name, autocast=False)
        is_encoded = (
            self._codec is not None
            and component.dtype == tf.float32
            and self._codec.serves(variable.value.shape, component.dtype)
        )
        common = runtime.plain_variable(tf.fill([elements], np.float32(np.nan))) if is_encoded else None
        keeps = is_encoded and self._feedback
        residual = runtime.plain_variable(tf.zeros([workers, width])) if keeps else None
        return Part(index, component, elements, master, common, residual)

    # The end of a window.

    def _merge_all(self, weights: tf.Tensor) -> tf.Tensor:
        self.group.keys.align()
        workers = self.across.world_size
        products = tf.zeros([workers, workers])
        for place in self.places:
            with tf.device(self.group.devices[place.replica]):
                means = [self._mean_of(place, bucket, weights) for bucket in place.buckets]
                products += tf.add_n([tf.zeros([workers, workers]), *(product for _, product in means)])
                self._update(place, {part: mean for by_part, _ in means for part, mean in by_part.items()})
                for bucket in place.buckets:
                    self._hand_out(place, bucket)
        with tf.device(self.group.devices[0]):
            return self.across.all_reduce(products, 0)

    def _mean_of(self, place: Place, bucket: list[Part], weights: tf.Tensor) -> tuple[dict[Part, tf.Tensor], tf.Tensor]:
        """The mean of all workers' differences in this worker's parts, and the products of these differences."""
        workers, widths = self.across.world_size, [part.width for part in bucket]
        if bucket[0].common is None:
            sent = tf.concat([part.rows(part.flat, workers) for part in bucket], 1)
            received = self.across.all_to_all(sent, place.replica)
            masters = tf.concat([part.master.value for part in bucket], 0)
            begun = tf.cast(tf.cast(masters, received.dtype), masters.dtype)  # the value with which workers began
            differences = begun - tf.cast(received, masters.dtype)
        else:
            changes = [part.rows(part.common - part.flat, workers) for part in bucket]
            payload = self._encoded(bucket, tf.concat(changes, 1))
            received = self.across.all_to_all(payload, place.replica)
            differences = self._codec.decode(received, sum(widths))
        mean = tf.linalg.matvec(differences, tf.cast(weights, differences.dtype), transpose_a=True)
        narrow = tf.cast(differences, tf.float32)
        by_part = dict(zip(bucket, tf.split(mean, widths), strict=True))
        return by_part, tf.matmul(narrow, narrow, transpose_b=True)

    def _encoded(self, bucket: list[Part], changes: tf.Tensor) -> tf.Tensor:
        if not self._feedback:
            return self._codec.encode(changes)
        residual = tf.concat([part.residual for part in bucket], 1)
        payload, lost = tf.function(self._codec.encoded_with, jit_compile=True, autograph=False)(changes, residual)
        for part, rest in zip(bucket, tf.split(lost, [part.width for part in bucket], 1), strict=True):
            part.residual.assign(rest)
        return payload

    def _update(self, place: Place, means: dict[Part, tf.Tensor]) -> None:
        optimizer = place.optimizer
        if optimizer is None:
            for part, mean in means.items():
                part.master.value.assign_sub(mean)
            return
        rate = keras_objects.rate_now(optimizer)
        runtime.begin_update(optimizer, rate)
        for part, mean in means.items():
            update_part(optimizer, part.master, mean, rate)
        counter = runtime.iteration_counter(optimizer)
        counter.value.assign_add(tf.ones_like(counter.value))

    def _hand_out(self, place: Place, bucket: list[Part]) -> None:
        """Sends the owners' new values to all workers, and assigns them."""
        workers, own = self.across.world_size, self.across.rank(place.replica)
        masters = tf.concat([part.master.value for part in bucket], 0)
        if bucket[0].common is None:
            received = self.across.all_gather(tf.cast(masters, bucket[0].value.dtype), place.replica)
        else:
            ahead = masters - tf.concat([part.rows(part.common, workers)[own] for part in bucket], 0)
            payload = self.across.all_gather(self._codec.encode(ahead[tf.newaxis])[0], place.replica)
            received = self._codec.decode(payload, masters.shape[0])
        for part, rows in zip(bucket, tf.split(received, [part.width for part in bucket], 1), strict=True):
            flat = tf.reshape(rows, [-1])[: part.elements]
            if part.common is not None:
                flat = part.common.assign_add(flat)
            value = self.variables[part.index].value
            part.assign(
                tf.convert_to_tensor(flat), [part.value] if isinstance(value, ShardedParameter) else value.values
            )


def make_merger(
    given: Sequence[keras.Variable],
    optimizers: Sequence[keras.optimizers.Optimizer],
    strategy: tf.distribute.Strategy,
    bucket_bytes: int,
) -> Merger | None:
    """The merger of the variables that optimizers are built for; None if workers do not train apart.

    Raises:
        ValueError: for variables that cannot be merged; as `Merger`.
    """
    settings = strategy.settings.merging
    if settings is None:
        return None
    averaged = [type(each).__name__ for each in optimizers if each.use_ema]
    if averaged:
        raise ValueError(
            f"`use_ema=True` of {averaged} keeps averages of one worker's own weights, which workers that train apart "
            "cannot merge. Leave `use_ema` or `sync_every` away."
        )
    if overwritten := [variable.path for variable in given if is_overwritten(variable)]:
        raise ValueError(
            f"The variables {overwritten} are overwritten by their gradients, as in float8 layers. Those of workers "
            "that train apart cannot be merged: leave `sync_every` away."
        )
    made = Merger(given, strategy.extended.all_group, settings, strategy.make_outer, bucket_bytes)
    parts = [part for place in made.places for part in place.parts]
    has_effect = settings.compression is None or any(part.common is not None for part in parts)
    if strategy.extended.mesh.workers > 1 and not has_effect:
        raise ValueError(
            f"compression={settings.compression!r} has no effect: only float32 matrices travel encoded in merges, and "
            "the optimizer has none. Leave `compression` away."
        )
    outer = made.places[0].optimizer
    strategy.channel.agree(
        "making an outer optimizer", {} if outer is None else settings_of([outer]), "outer optimizers"
    )
    return made


def cosine(products: np.ndarray) -> float | None:
    """Mean cosine between the differences of each two workers; None for one worker, or if one has changed nothing."""
    norms = np.sqrt(np.diag(products))
    count = len(norms)
    if count == 1 or not np.all(norms > 0):
        return None
    cosines = products / np.outer(norms, norms)
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1)))


def distance(products: np.ndarray, weights: Sequence[float]) -> float:
    """Root of the weighted mean square of the workers' distances from their mean."""
    mean = np.asarray(weights) @ products @ np.asarray(weights)
    spread = float(np.dot(weights, np.diag(products)) - mean)
    return math.sqrt(spread) if spread > 0 or math.isnan(spread) else 0.0
