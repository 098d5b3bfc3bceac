"""Gives each worker the data that are its own: its files of a `sharded_dataset`, and the rows that it brings."""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfzero.host import datasets
from tfzero.plan.mesh import Mesh
from tfzero.rows.input_account import InputAccount
from tfzero.rows.inputs import check_batched, cut_dataset
from tfzero.rows.sharded import ShardedFiles
from tfzero.rows.shares import RowShares
from tfzero.rows.unions import check_parts, describe_parts, union
from tfzero.workers.channel import Channel
from tfzero.workers.digests import BatchComparison

_HAS, _HAS_NOT, _IS_BEHIND = "a batch", "none", "none left"
_TOO_FEW_FILES = "Could not apply FILE based sharding"  # in TensorFlow's error
_MOST_FAULTS = 4  # told by one worker
_HASH_CHARACTERS = 8


class DealtFiles:
    """Explains why TensorFlow cannot deal a pipeline's files to the workers, which it finds when it reads."""

    def __init__(self, reader: str, workers: int) -> None:
        self._reader, self._workers = reader, workers

    def blame(self, error: tf.errors.OpError) -> Exception | None:
        """The error that tells what to do; None if the error is another one."""
        if _TOO_FEW_FILES not in str(error):
            return None
        return ValueError(
            f"{self._reader} finds fewer files in a dataset with AutoShardPolicy.FILE than there are workers, "
            f"{self._workers}, so some would read nothing. Write more files, or leave the policy at AUTO. "
            f"TensorFlow says: {error.message}"
        )


class OwnData:
    """Distributes data of which every worker reads its own.

    Args:
        mesh: who the workers are.
        channel: among the workers.
        comparison: of batches, whose connection is used while batches are handed out.
        name_of: names a worker by its index.
        account: of what input costs.
        shares: of a batch, by which rows are dealt to a worker's replicas.
    """

    def __init__(
        self,
        mesh: Mesh,
        channel: Channel,
        comparison: BatchComparison,
        name_of: Callable[[int], str],
        account: InputAccount,
        shares: RowShares,
    ) -> None:
        self._mesh, self._channel, self._comparison, self._name_of = mesh, channel, comparison, name_of
        self._account, self._shares = account, shares
        self._batches: weakref.WeakKeyDictionary[tf.data.Dataset, int | None] = weakref.WeakKeyDictionary()
        self._readers: weakref.WeakKeyDictionary[tf.data.Dataset, DealtFiles] = weakref.WeakKeyDictionary()

    def batches_of(self, distributed: Any, given: int | None) -> int | None:
        """Number of batches of an epoch, the same on all workers; None if it is unknown.

        Args:
            distributed: what `distribute` or TensorFlow made of a worker's data.
            given: the number that this worker knows of the data that it was given.
        """
        if isinstance(distributed, tf.data.Dataset):
            return self._batches.get(distributed, given)
        # Of `distribute_datasets_from_function`.
        told = self._channel.all_gather("counting batches of each worker", given)
        return given if all(each == given for each in told) else None

    def of_files(self, source: ShardedFiles, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """This worker's part of a `sharded_dataset`, as per-replica values.

        Raises:
            ValueError: on all workers, if they differ, or if a file cannot be read; the error names worker and file.
        """
        mesh = self._mesh
        shards = source.dealing.shards_of(mesh.worker, mesh.workers)
        source.reader = self._name_of(mesh.worker)
        described = {**source.describe(), **describe_parts(dataset)}
        self._channel.agree("distributing a sharded_dataset", described, "sharded datasets")
        self._agree_on_files(source)
        told = self._channel.all_gather("looking at files", source.find_missing(shards)[:_MOST_FAULTS])
        faults = [f"{self._name_of(w)}: {'; '.join(map(str, each))}" for w, each in enumerate(told) if each]
        if faults:
            raise ValueError(
                f"Files of a sharded_dataset cannot be read: {'. '.join(faults)}. All workers must see all files; "
                "leave out those without elements."
            )
        if mesh.workers == 1:
            cut = cut_dataset(source.read(shards), mesh, self._comparison, self._shares)
            return self._account.watch(source.counted(cut))  # behind all that is prepared ahead
        return self._union(source.read(shards), source)

    def of_own_rows(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The batches that this worker brings, as per-replica values. [Note: union]

        Raises:
            ValueError: if elements are no batches, or workers' structures differ.
        """
        check_batched(dataset)
        self._channel.agree("distributing rows of its own", describe_parts(dataset), "data sets")
        if self._mesh.workers == 1:
            return self._account.watch(cut_dataset(dataset, self._mesh, self._comparison, self._shares))
        return self._union(dataset, None)

    def of_dealt_files(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """This worker's part of a pipeline of files with AutoShardPolicy.FILE: its files, and its part of a batch.

        Raises:
            ValueError: on all workers, if the pipeline does not read files that can be dealt, or if the size of a batch
                cannot be told, or is smaller than the number of workers.
        """
        workers, worker = self._mesh.workers, self._mesh.worker
        size, part, fault = datasets.whole_batch_size(dataset), None, ""
        if size is None or size < workers:
            known = "cannot be told from its pipeline" if size is None else f"is {size}"
            fault = (
                f"its batch size {known}; end the pipeline with `batch(batch_size)`, of a row for each worker at least"
            )
        else:
            rows = size // workers + (worker < size % workers)
            try:
                part = datasets.files_of_worker(dataset, workers, worker, rows)
            except tf.errors.NotFoundError:  # TensorFlow finds no source of files
                fault = (
                    "it does not read files: it has none at its start, such as those of TFRecordDataset, "
                    "TextLineDataset, or of `interleave` over names of files"
                )
        self._channel.agree("dealing files", {"batch size": size, "why files cannot be dealt": fault}, "data sets")
        if part is None:
            raise ValueError(
                f"AutoShardPolicy.FILE deals a dataset's files to {workers} workers, but {fault}. Leave the policy at "
                "AUTO, so that every worker reads all and keeps its rows; or divide files by `tfzero.sharded_dataset`, "
                f"and data that are divided already by `tfzero.own_rows`. Received: {dataset!r}"
            )
        reader = DealtFiles(self._name_of(worker), workers)
        self._comparison.note_reader(reader)
        result = self.of_own_rows(part)
        self._readers[result] = reader
        return result

    def _union(self, dataset: tf.data.Dataset, source: ShardedFiles | None) -> tf.data.Dataset:
        check_parts(dataset)
        self._shares.note_own_rows()
        turns, devices = _Turns(self._comparison, source, self._name_of), self._mesh.devices_per_worker
        result = self._account.watch(union(dataset, devices, turns, self._shares.of_this_worker))
        own = dataset.cardinality() if source is None else tf.data.UNKNOWN_CARDINALITY
        if source is None or source.dealing.counts is None:
            told = self._channel.all_gather("counting batches", int(own))
            self._batches[result] = max(told) if min(told) >= 0 else None
        return result

    def _agree_on_files(self, source: ShardedFiles) -> None:
        """Checks that all workers list the same files, of which there are as many, and see the same sizes."""
        files = source.described_files()
        _, differences = self._channel.compare("comparing lists of files", _hash(files, 32))
        if not differences:
            return
        hashes = self._channel.all_gather("finding the first file that differs", [_hash([each]) for each in files])
        first = next(k for k, each in enumerate(zip(*hashes, strict=False)) if len(set(each)) > 1)
        self._channel.agree("comparing files", {f"file {first}": files[first]}, "lists of files")


class _Turns:
    """Agrees on the batches of a union, one by one. See `unions.Turns`.

    Args:
        comparison: whose connection it uses.
        source: the files; None for rows that workers bring.
        name_of: names a worker by its index.
    """

    def __init__(self, comparison: BatchComparison, source: ShardedFiles | None, name_of: Callable[[int], str]) -> None:
        self._comparison, self._source, self._name_of = comparison, source, name_of
        self._name, self._pass = comparison.new_data_set(), 0

    def asked(self, index: np.int64) -> bool:
        self._pass += index == 0
        if self._source is None or self._source.dealing.counts is None:
            self._comparison.owes(self._topic(index))
        return True

    def goes_on(self, index: np.int64, has_batch: np.bool_) -> bool:
        source = self._source
        known = None if source is None else source.handed_out(int(index))
        if known is not None:
            return known
        state = _HAS if has_batch else _HAS_NOT if source is None or source.is_at_start else _IS_BEHIND
        states = self._comparison.gather(self._topic(index), state)
        self._check(states, index)
        if _HAS not in states and source is not None:
            source.end()
        return _HAS in states

    def _topic(self, index: np.int64) -> str:
        return f"batch {index} of pass {self._pass} over {self._name}"

    def _check(self, states: Sequence[str], index: np.int64) -> None:
        """Refuses a batch that a worker fails to read, and a pass in which it has nothing, not even a first batch."""
        failed = {worker: each for worker, each in enumerate(states) if each not in (_HAS, _HAS_NOT, _IS_BEHIND)}
        if failed:
            told = ". ".join(f"{self._name_of(worker)}: {each}" for worker, each in failed.items())
            raise self._comparison.refuse(RuntimeError(f"Reading {self._topic(index)} failed on {told}"))
        without = [self._name_of(worker) for worker, state in enumerate(states) if state == _HAS_NOT]
        if without and index == 0:
            raise self._comparison.refuse(
                ValueError(
                    f"{', '.join(without)} brought no row to {self._name}. Every worker must have at least one row in "
                    "an epoch. An iterator or a generator that was used up gives no more."
                )
            )


def _hash(names: Sequence[str], characters: int = _HASH_CHARACTERS) -> str:
    return hashlib.blake2b("\0".join(names).encode()).hexdigest()[:characters]
