"""Which workers a dataset is dealt to, and how each gets its part."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator

import tensorflow as tf

from tfzero.plan.mesh import Mesh
from tfzero.rows import sharded, unions
from tfzero.rows.input_account import InputAccount
from tfzero.rows.inputs import check_shardable, cut_dataset, describe_dataset, in_order, is_dealt_by_files
from tfzero.rows.own_data import OwnData
from tfzero.rows.shares import RowShares
from tfzero.workers.channel import Channel
from tfzero.workers.digests import BatchComparison

_READ_BY_EACH = (
    "Workers of parameter servers do not agree on who reads which file, as `sharded_dataset` needs. Give every worker "
    "the same data, of which each takes its rows, or its own with `tfzero.own_rows`."
)
_CUT_BEFORE = (
    "The data were distributed before `fit`. Workers of parameter servers train with their rows of each batch, and "
    "evaluate all: give `fit` the data set itself."
)


class Dealing:
    """Deals data to workers.

    Args:
        of_group: the workers that take steps together.
        fleet: all workers; others than `of_group` if each of them trains by itself, with servers.
        channel: among the workers of the group.
        comparison: of batches.
        name_of: names a worker by its index.
        account: of what input costs.
        shares: of a batch.

    Attributes:
        mesh: the workers that the next data are dealt to.
        own_data: data of which every worker reads its own.
    """

    def __init__(self, of_group: Mesh, fleet: Mesh, channel: Channel, comparison: BatchComparison,
                 name_of: Callable[[int], str], account: InputAccount, shares: RowShares) -> None:  # fmt: skip
        self.mesh = self._of_group = of_group
        self._fleet, self._channel, self._comparison = fleet, channel, comparison
        self._account, self._shares = account, shares
        self.own_data = OwnData(of_group, channel, comparison, name_of, account, shares)
        self._cut_datasets: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # what each was made from
        self._cut_by: weakref.WeakKeyDictionary[tf.data.Dataset, Mesh] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def for_training(self, is_wanted: bool = True) -> Iterator[None]:
        """While active, data are dealt to all workers, until `end_training` is called."""
        former, self.mesh = self.mesh, self._fleet if is_wanted else self._of_group
        try:
            yield
        finally:
            self.mesh = former

    def end_training(self) -> None:
        """The next data are not for training."""
        self.mesh = self._of_group

    def distribute(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of each local replica's part of another's batches."""
        if dataset in self._cut_datasets:
            if self._cut_by[dataset] != self.mesh:
                raise ValueError(_CUT_BEFORE)
            return dataset
        cut = self._own_part(dataset)
        if cut is None:
            cut = self._part_of_all(dataset)
        self._cut_datasets[cut], self._cut_by[cut] = dataset, self.mesh
        return cut

    def origin_of(self, distributed: tf.data.Dataset) -> tf.data.Dataset | None:
        """The dataset that a distributed one was made from; None if it came about otherwise."""
        return self._cut_datasets.get(distributed)

    def _own_part(self, dataset: tf.data.Dataset) -> tf.data.Dataset | None:
        """What this worker reads by itself of a dataset; None if every worker reads all."""
        source, within = sharded.source_of(dataset), sharded.sources_within(dataset)
        if within and self._fleet is not self._of_group:
            raise ValueError(_READ_BY_EACH)
        for each in within:
            each.seek(each.passes, 0)  # a place that an interrupted run has left
            self._comparison.note_reader(each)
        # Predictions come in the order of whole batches.
        if source is not None and not self._comparison.only_predicts:
            return self.own_data.of_files(source, dataset)
        if unions.is_own(dataset):
            return self.own_data.of_own_rows(dataset)
        if self.mesh.workers > 1 and is_dealt_by_files(dataset) and self._fleet is self._of_group:
            return self.own_data.of_dealt_files(dataset)
        if self.mesh.workers > 1 and within and source is None:
            warnings.warn(sharded.READ_WHOLE, stacklevel=2)
        return None

    def _part_of_all(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """This worker's replicas' parts of batches that every worker reads."""
        check_shardable(dataset, self.mesh.workers)
        self._channel.agree("distributing a dataset", describe_dataset(dataset), "data sets")
        if self.mesh.workers > 1:
            dataset = in_order(dataset)
        return self._account.watch(cut_dataset(dataset, self.mesh, self._comparison, self._shares))
