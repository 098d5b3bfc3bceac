"""Each worker reads only its own data: files in virtual shards, and rows that workers bring."""

import os
import shutil
import time
import types
import unittest.mock
import warnings
from pathlib import Path

import keras
import numpy as np
import oracle
import pool
import pytest
import scipy.sparse
import tensorflow as tf
from keras.src.trainers.data_adapters import array_data_adapter
from marks import sweep

import tfzero
from tfzero.host import datasets
from tfzero.host.batch_rows import own_rows
from tfzero.plan.file_shards import FileShards
from tfzero.plan.mesh import Mesh
from tfzero.rows.input_account import InputAccount
from tfzero.rows.inputs import cut_dataset
from tfzero.rows.own_data import DealtFiles
from tfzero.rows.sharded import sharded_dataset, source_of
from tfzero.rows.unions import check_parts, union
from tfzero.workers.digests import BatchComparison

SIZES = (11, 7, 9, 12, 8, 10, 9)  # samples of each file: shards end at different times
SHARDS, BATCH = 4, 12
EXACT = {"rtol": 2e-4, "atol": 2e-5}


def write(folder, sizes=SIZES) -> list[str]:
    """TFRecord files whose samples tell them apart."""
    x, y = oracle.Data(samples=sum(sizes)).arrays()
    files, begin = [], 0
    for number, size in enumerate(sizes):
        files.append(str(Path(folder) / f"part-{number}.tfrecord"))
        with tf.io.TFRecordWriter(files[-1], "GZIP") as writer:
            for row in range(begin, begin + size):
                writer.write(tf.io.serialize_tensor(np.concatenate([x[row], y[row]])).numpy())
        begin += size
    return files


def make(path):
    return tf.data.TFRecordDataset(path, compression_type="GZIP")


def decode(record):
    row = tf.ensure_shape(tf.io.parse_tensor(record, tf.float32), [11])
    return row[:8], row[8:]


def data_of(files, **arguments):
    given = {"shards": SHARDS, "batch_size": BATCH, "decode": decode, "shuffle": 5, "seed": 3} | arguments
    return sharded_dataset(files, make, **given)


def model_of(strategy=None):
    keras.utils.set_random_seed(4)
    if strategy is None:
        return oracle.dense_model()
    with strategy.scope():
        return oracle.dense_model()


def compiled(model, steps=1):
    jit = {} if isinstance(model.distribute_strategy, tfzero.ZeroStrategy) else {"jit_compile": False}
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=steps,
        **jit,
    )
    return model


def outcome(strategy, train, evaluated=None, predicted=None, steps=1):
    """What `fit`, and then `evaluate` and `predict`, leave."""
    model = compiled(model_of(strategy), steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        history = model.fit(train, epochs=2, verbose=0, shuffle=False).history
        found = {"weights": model.get_weights(), "history": history}
        if evaluated is not None:
            found["evaluated"] = model.evaluate(evaluated, verbose=0)
        if predicted is not None:
            found["predicted"] = model.predict(predicted, verbose=0)
    return found


def assert_equal(ours, one_device):
    assert list(ours) == list(one_device)
    for mine, theirs in zip(tf.nest.flatten(ours), tf.nest.flatten(one_device), strict=True):
        np.testing.assert_allclose(mine, theirs, **EXACT)


# The arithmetic.


@pytest.mark.parametrize("shuffles", [False, True])
def test_every_file_is_dealt_to_one_shard(shuffles):
    dealing = FileShards(11, 4, 8, shuffles, seed=2)
    for epoch in range(3):
        dealt = dealing.deal(epoch)
        assert sorted(file for files in dealt for file in files) == list(range(11))
        assert [len(files) for files in dealt] == [3, 3, 3, 2]
    assert (dealing.deal(0) == dealing.deal(1)) is not shuffles
    assert [set(files) for files in dealing.deal(0)] == [set(files) for files in dealing.deal(1)]  # as long passes
    assert dealing.deal(1) == FileShards(11, 4, 8, shuffles, seed=2).deal(1)
    assert (dealing.deal(1) == FileShards(11, 4, 8, shuffles, seed=3).deal(1)) is not shuffles
    for workers in (1, 2, 4):
        read = [shard for worker in range(workers) for shard in dealing.shards_of(worker, workers)]
        assert sorted(read) == list(range(4))
    assert dealing.shards_of(1, 2) == [1, 3]
    with pytest.raises(ValueError, match=r"4 shards can be read by \[1, 2, 4\] workers.*Received: 3 workers"):
        dealing.shards_of(0, 3)


def test_whole_files_are_skipped_if_their_counts_are_known():
    dealing = FileShards(4, 2, 4, counts=(5, 5, 7, 2))
    assert dealing.batches == 6
    start = dealing.start(0, 4, [0, 1])
    assert (start.files, start.skips) == ([[2], []], [3, 1])
    assert FileShards(4, 2, 4, counts=(4, 4, 7, 2)).start(0, 2, [0, 1]).files == [[2], [3]]  # at the end of files
    assert FileShards(4, 2, 4).start(0, 4, [0, 1]).files == [[0, 2], [1, 3]]


# The batches.


def batches_of(dataset):
    return [[np.array(part) for part in batch] for batch in dataset]


@pytest.mark.parametrize("counts", [sweep(None), SIZES])
def test_batches_are_the_union_of_all_shards_whoever_reads_them(tmp_path, counts):
    files = write(tmp_path)
    x, _ = oracle.Data(samples=sum(SIZES)).arrays()
    data = data_of(files, counts=counts)
    passes = []
    for _ in range(2):
        tf.random.set_seed(len(passes))  # makes no difference
        passes.append(batches_of(data))
    for epoch, whole in enumerate(passes):
        samples = np.concatenate([batch[0] for batch in whole])
        assert len(samples) == len(x)
        assert np.array_equal(np.unique(samples, axis=0), np.unique(x, axis=0))
        for workers in (2, 4):
            source = source_of(data_of(files, counts=counts))
            source.seek(epoch, 0)
            read = [source.dealing.shards_of(worker, workers) for worker in range(workers)]
            parts = [batches_of(source.read(shards)) for shards in read]
            for number, batch in enumerate(whole):
                rows = np.concatenate([part[number][0] for part in parts if number < len(part)])
                assert np.array_equal(np.unique(rows, axis=0), np.unique(batch[0], axis=0))
    first, second = (np.concatenate([batch[0] for batch in whole]) for whole in passes)
    assert not np.array_equal(first, second)


def test_nothing_is_agreed_ahead_of_its_step(tmp_path):
    """Else workers that stop in the middle of their data would agree on batches that others never ask for."""
    asked = []

    def goes_on(index, has_batch):
        asked.append((int(index), bool(has_batch)))
        return index < 6

    turns = types.SimpleNamespace(asked=lambda index: True, goes_on=goes_on)
    parts = iter(union(rows_of_worker(0, 2, False), 2, turns))
    next(parts)
    next(parts)
    time.sleep(0.3)
    assert asked == [(0, True), (1, True)]
    rows = [[int(own_rows(part)) for part in x.values] for x, _ in parts]
    assert rows == [[2, 2], [0, 0], [0, 0], [0, 0]]  # after its own three batches only padding
    assert asked[-1] == (6, False)
    data = data_of(write(tmp_path))
    for _ in zip(range(7), data, strict=False):  # all, but not what follows
        time.sleep(0.05)
    assert source_of(data).passes == 0


@pytest.mark.parametrize("counts", [None, SIZES])
def test_skipping_decodes_nothing(tmp_path, counts):
    files, decoded = write(tmp_path), []

    def counting(record):
        tf.py_function(lambda: decoded.append(1), [], [])
        return decode(record)

    whole = batches_of(data_of(files, shuffle=5, seed=1))
    source = source_of(data_of(files, seed=1, decode=counting, counts=counts))
    source.seek(0, 4)
    opened, note = [], source._note_open
    source._note_open = lambda file, shard: opened.append(int(file)) or note(file, shard)
    rest = batches_of(source.counted(source.read(range(SHARDS))))
    for mine, theirs in zip(rest, whole[4:], strict=True):
        assert np.array_equal(mine[0], theirs[0])
    assert len(decoded) == sum(len(batch[0]) for batch in rest)
    left = source.dealing.start(0, 4, range(SHARDS)).files
    assert sorted(opened) == sorted(file for files in left for file in files)
    assert (len(opened) < len(SIZES)) == (counts is not None)
    assert source.passes == 1


def test_elements_of_any_structure(tmp_path):
    """Vectors of different lengths, sparse and nested ones, text, and arrays of NumPy."""
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.npy"))
        np.save(files[-1], np.arange(number * 10, number * 10 + 5))

    def load(path):
        return np.load(path.decode())

    def elements(path):
        numbers = tf.data.Dataset.from_tensor_slices(tf.ensure_shape(tf.numpy_function(load, [path], tf.int64), [None]))
        return numbers.map(lambda n: {"n": n, "long": tf.range(n), "sparse": tf.sparse.from_dense(tf.range(n) * 2)})

    def total(element):
        return tf.stack([element["n"], tf.reduce_sum(element["long"]), tf.sparse.reduce_sum(element["sparse"])])

    data = tfzero.sharded_dataset(files, elements, shards=3, batch_size=6, decode=total)
    rows = np.concatenate([batch.numpy() for batch in data])
    assert sorted(rows[:, 0].tolist()) == [*range(5), *range(10, 15), *range(20, 25)]
    assert all(row[1] == row[0] * (row[0] - 1) // 2 and row[2] == 2 * row[1] for row in rows)
    assert next(iter(data)).numpy()[:, 0].tolist() == [0, 1, 10, 11, 20, 21]
    text = []
    for number in range(2):
        text.append(str(tmp_path / f"{number}.txt"))
        Path(text[-1]).write_text(f"a{number}\nb{number}\n")
    lines = tfzero.sharded_dataset(text, tf.data.TextLineDataset, shards=2, batch_size=2)
    assert [batch.numpy().tolist() for batch in lines] == [[b"a0", b"a1"], [b"b0", b"b1"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10}, r"multiple of `shards`.*batch_size=10, shards=4"),
        ({"shards": 8, "batch_size": 8}, r"fewer files than shards.*7 files, shards=8"),
        ({"shards": 0}, "`shards` must be an integer of at least 1"),
        ({"shuffle": -1}, "`shuffle` must be an integer of at least 0"),
        ({"counts": (1, 2)}, r"`counts` must have a positive number for each of 7 files"),
        ({"counts": (0,) * 7}, r"`counts` must have a positive number"),
        ({"parallel_calls": 0}, "`parallel_calls` must be"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        data_of([str(tmp_path / str(k)) for k in range(7)], **arguments)
    with pytest.raises(ValueError, match="must be a list of paths"):
        data_of("a file")


def test_bytes_read_and_the_time_of_waiting_are_counted(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 2_000_000)
    account = InputAccount()

    def read(number):
        time.sleep(0.05)
        return len((tmp_path / "large").read_bytes()) * number

    source = tf.data.Dataset.range(3).map(lambda number: tf.numpy_function(read, [number], tf.int64))
    nested = account.watch(source.map(lambda number: ({"a": number}, tf.sparse.from_dense([number]))))
    assert (account.batches, account.seconds) == (0, 0.0)
    for number, (parts, _) in enumerate(nested):
        time.sleep(0.1)  # a step, which is not waiting
        assert int(parts["a"]) == 2_000_000 * number and account.batches == number + 1
    assert 0.15 <= account.seconds < 0.3
    assert 6_000_000 <= account.bytes < 7_000_000


@pytest.mark.parametrize("compared", [0, 2])
@pytest.mark.parametrize("worker", [0, 1])
def test_of_arrays_a_worker_gathers_its_own_rows(worker, compared):
    """The parts are those of whole batches. Only batches to compare are gathered."""
    x, _ = oracle.Data(samples=23).arrays()
    arrays = ({"dense": x, "sparse": scipy.sparse.csr_matrix(np.maximum(x, 0))}, x[:, :2])
    adapter = array_data_adapter.ArrayDataAdapter(arrays[0], arrays[1], batch_size=9, shuffle=False)
    mesh, given = Mesh(workers=2, devices_per_worker=2, worker=worker), adapter.get_tf_dataset()
    noted = []

    class Channel:
        def compare(self, topic, own):
            noted.append(own)
            return [own, own], {}

    def parts_of(dataset):
        del noted[:]
        cut = cut_dataset(dataset, mesh, BatchComparison(Channel(), 2, compared, print))
        return [tf.nest.flatten(batch) for batch in cut], noted[:]

    elements, gather = datasets.rows_by_index(given)
    taken = []

    def counting(indices, data):
        with tf.control_dependencies([tf.py_function(lambda k: taken.append(int(tf.size(k))), [indices], [])]):
            return gather(tf.identity(indices), data)

    with unittest.mock.patch.object(datasets, "rows_by_index", lambda dataset: (elements, counting)):
        mine, mine_noted = parts_of(given)
    whole, whole_noted = parts_of(given.take(3))
    assert mine_noted == whole_noted and len(mine_noted) == compared
    for ours, theirs in zip(mine, whole, strict=True):
        for part, other in zip(ours, theirs, strict=True):
            assert [int(own_rows(v)) for v in part.values] == [int(own_rows(v)) for v in other.values]
            for value, expected in zip(part.values, other.values, strict=True):
                dense = [tf.sparse.to_dense(v) if isinstance(v, tf.SparseTensor) else v for v in (value, expected)]
                np.testing.assert_array_equal(*dense)
    wholes = [9, 9, 5][:compared]
    own = [max(1, int(rows)) for batch in mine for rows in map(own_rows, batch[0].values)]
    assert sorted(taken) == sorted(own + wholes)


def test_fewer_files_than_workers_are_named(tmp_path):
    """TensorFlow finds it when it reads, and only on the first worker."""
    dataset = by_files(write(tmp_path, sizes=(5,)))
    with pytest.raises(tf.errors.InvalidArgumentError) as found:
        next(iter(datasets.files_of_worker(dataset, 2, 0, 6)))
    reader = DealtFiles("worker 0", 2)
    text = str(reader.blame(found.value))
    assert "worker 0 finds fewer files" in text and "workers, 2" in text and "only has 1 file(s)" in text
    assert reader.blame(tf.errors.InvalidArgumentError(None, None, "something else")) is None


# Training.


@pytest.mark.parametrize("devices", [sweep(1), 2])
def test_one_process(tmp_path, devices):
    files = write(tmp_path)
    strategy = tfzero.ZeroStrategy(2, devices=[f"CPU:{k}" for k in range(devices)], min_shard_elements=8)
    sets = [[data_of(files), data_of(files), data_of(files, shuffle=0)] for _ in range(2)]
    assert_equal(outcome(strategy, *sets[0]), outcome(None, *sets[1]))
    assert source_of(sets[0][0]).passes == source_of(sets[1][0]).passes == 2
    report = strategy.report()
    assert report.batches > 0 and report.input_seconds > 0 and report.read_bytes > sum(map(os.path.getsize, files))
    assert f"Input: {report.batches} batches, waited for" in str(report) and "has read" in str(report)


def steps_of(model, data, epochs, *callbacks, halt=None):
    """Trains, and tells the number of steps of each epoch; ends after `halt` steps in all."""
    steps = []

    def note(batch, logs):
        steps[-1] += 1
        if sum(steps) == halt:
            raise RuntimeError("halted")

    noting = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: steps.append(0), on_train_batch_end=note)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        try:
            model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=[*callbacks, noting])
        except RuntimeError as error:
            assert str(error) == "halted"
    return steps


@pytest.mark.parametrize("counts", [None, SIZES])
@pytest.mark.parametrize("replicas", [0, 1])
def test_all_passes_are_as_long_and_counted(tmp_path, replicas, counts):
    """Else Keras, which takes the first pass's length for that of all, would cut longer ones off."""
    data = data_of(write(tmp_path), counts=counts, batch_size=SHARDS)
    steps = steps_of(compiled(model_of(strategy_of(1) if replicas else None)), data, 4)
    assert len(set(steps)) == 1 and source_of(data).passes == 4


@pytest.mark.parametrize("counts", [None, SIZES])
def test_where_a_run_goes_on(tmp_path, counts):
    files, strategy = write(tmp_path), strategy_of(1)
    whole = steps_of(compiled(model_of()), data_of(files, counts=counts), 1)[0]

    def interrupted(name, halt, made=lambda data: data):
        folder = tmp_path / name
        saving = tfzero.CheckpointCallback(folder, save_every_steps=1, asynchronous=False)
        model = compiled(model_of(strategy))
        steps_of(model, made(data_of(files, counts=counts)), 3, saving, halt=halt)
        return tfzero.CheckpointCallback(folder, save_every_epochs=9)

    # After the last batch of an epoch; if its number is known, that batch is saved when the epoch ends.
    data = data_of(files, counts=counts)
    steps = steps_of(compiled(model_of(strategy)), data, 3, interrupted("at the end", whole))
    assert sum(steps) == 2 * whole + (counts is not None) and source_of(data).passes == 3
    # A pass that was begun in its middle and left is begun anew.
    data = data_of(files, counts=counts)
    assert steps_of(compiled(model_of(strategy)), data, 1, interrupted("in the middle", 3), halt=2) == [2]
    assert steps_of(compiled(model_of(strategy)), data, 1) == [whole]

    # What is made from it goes on in the right order, too.
    def mapped(data):
        return data.map(lambda x, y: (x, y))

    uninterrupted, resumed = compiled(model_of(strategy)), compiled(model_of(strategy))
    steps_of(uninterrupted, mapped(data_of(files, counts=counts)), 3)
    callback = interrupted("mapped", 2 * whole - 1, mapped)  # when all of the pass may be prepared
    steps_of(resumed, mapped(data_of(files, counts=counts)), 3, callback)
    # With other steps per execution it goes on with the same batch.
    several = compiled(model_of(strategy), steps=4)
    steps_of(several, data_of(files, counts=counts), 3, interrupted("one step at a time", 3))
    for model in (resumed, several):
        for mine, theirs in zip(model.get_weights(), uninterrupted.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, **EXACT)


def test_what_cannot_be_read_is_named(tmp_path):
    files, strategy = write(tmp_path), strategy_of(1)
    bad, model = damaged(files, tmp_path / "run"), compiled(model_of(strategy))
    for read in (
        lambda: model.predict(data_of(bad, shuffle=0), verbose=0),
        lambda: model.fit(data_of(bad, shuffle=0).map(lambda x, y: (x, y)), verbose=0, shuffle=False),
    ):
        assert "this process cannot read" in error_of(read) and "damaged.tfrecord" in error_of(read)
    counts = [*SIZES[:6], SIZES[6] + 1]
    text = error_of(lambda: model.fit(data_of(files, counts=counts), verbose=0, shuffle=False))
    assert "part-6.tfrecord" in text and "it has 9 elements, and `counts` says 10" in text
    failing = sharded_dataset(files, lambda path: fail_for(path), shards=SHARDS, batch_size=BATCH, decode=decode)
    assert "`make` fails for" in error_of(lambda: model.fit(failing, verbose=0, shuffle=False))
    rows = tf.data.Dataset.from_tensor_slices(oracle.Data(samples=9).arrays())
    assert "must be batched" in error_of(
        lambda: model.fit(tfzero.own_rows(rows.map(lambda x, y: (x, y[0]))), shuffle=False)
    )
    loose = rows.batch(3).map(lambda x, y: (tf.numpy_function(lambda v: v, [x], tf.float32), y))
    with pytest.raises(ValueError, match="but part 0 is TensorSpec"):
        check_parts(loose)
    with pytest.raises(ValueError, match=r"but part 2 is NoneTensorSpec.*leave out a part that is None"):
        check_parts(rows.batch(3).map(lambda x, y: (x, y, None)))


def fail_for(path):
    """A `make` that fails outside graphs."""
    if tf.executing_eagerly():
        raise KeyError("no such column")
    return make(path)


def test_parts_that_are_none(tmp_path):
    x, y = oracle.Data().arrays()
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).map(lambda x, y: (x, y, None))
    assert_equal(outcome(strategy_of(2), data), outcome(None, data))


@pytest.mark.parametrize("method", ["reduce", "gather"])
def test_a_replica_does_not_go_on_while_another_one_takes_part_in_a_collective(method):
    """Else the end of data, which raises an error, ends the step of a worker where another worker waits for it."""
    strategy, found = strategy_of(2), []

    @tf.function(autograph=False)
    def together(value):
        is_gather = method == "gather"
        found.append(strategy.gather(value, axis=0) if is_gather else strategy.reduce("SUM", value, axis=None))
        return tf.identity(found[0])

    graph = together.get_concrete_function(tf.TensorSpec([3])).graph
    collectives = {op for op in graph.get_operations() if op.type.startswith("Collective")}
    before, ahead = set(), [found[0].op]  # not what is returned, which waits for all
    while ahead:
        op = ahead.pop()
        if op not in before:
            before.add(op)
            ahead += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    assert len(collectives) >= 2 and collectives <= before


# Workers.


def error_of(call):
    """The text of a refusal."""
    try:
        call()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rows_of_worker(worker, workers, is_union):
    """Batches of a worker, of different numbers and sizes; for one device their unions."""
    x, y = oracle.Data(samples=40).arrays()
    sizes = [[5, 3, 4], [2, 6, 1, 3, 2]]
    begin, parts = 0, [[], []]
    for number in range(5):
        for each in range(2):
            if number < len(sizes[each]):
                parts[each].append(slice(begin, begin + sizes[each][number]))
                begin += sizes[each][number]
    if is_union:
        rows = [np.r_[tuple(part[k] for part in parts if k < len(part))] for k in range(5)]
    else:
        rows = parts[worker]

    def batches():
        for each in rows:
            yield x[each], y[each]

    signature = (tf.TensorSpec([None, 8]), tf.TensorSpec([None, 3]))
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


def for_replicas(worker, rows=3):
    """Batches of three rows for each of two replicas of a worker, of which worker 0 has more."""
    x, y = oracle.Data(samples=40).arrays()
    mine = (slice(0, 26), slice(26, 40))[worker]
    return tf.data.Dataset.from_tensor_slices((x[mine], y[mine])).batch(rows)


def by_files(files, policy=tf.data.experimental.AutoShardPolicy.FILE):
    """A pipeline of files that TensorFlow deals to workers."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = policy
    rows = tf.data.Dataset.from_tensor_slices(files).interleave(make, cycle_length=2).map(decode)
    return rows.batch(BATCH).with_options(options)


def by_workers(files):
    """What each of two workers reads then."""
    return [by_files(files[worker::2]).rebatch(BATCH // 2) for worker in range(2)]


def unions_of(parts):
    """The global batches that workers' batches make."""
    read = [list(part.as_numpy_iterator()) for part in parts]
    together = [[part[k] for part in read if k < len(part)] for k in range(max(map(len, read)))]
    batches = [tuple(np.concatenate(rows) for rows in zip(*batch, strict=True)) for batch in together]
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=parts[0].element_spec)


def strategy_of(devices, **arguments):
    return tfzero.ZeroStrategy(2, devices=[f"CPU:{k}" for k in range(devices)], min_shard_elements=8, **arguments)


def run_cases(files, folder, devices, is_short):
    strategy = strategy_of(devices)
    mesh = strategy.extended.mesh
    own = tfzero.own_rows(rows_of_worker(mesh.worker, 2, False))
    found = {"files": outcome(strategy, data_of(files), data_of(files), data_of(files, shuffle=0))}
    report = strategy.report()
    found["account"] = report.batches, report.input_seconds > 0, report.read_bytes
    if not is_short:
        found["counted"] = outcome(strategy, data_of(files, counts=SIZES))
    found["own rows"] = outcome(strategy, own, own.prefetch(1))
    found["two steps at a time"] = outcome(strategy, own, steps=2)
    found["by files"] = outcome(strategy, by_files(files))
    replicas = strategy.distribute_datasets_from_function(lambda context: for_replicas(context.input_pipeline_id))
    found["from a function"] = outcome(strategy, replicas)
    model = compiled(model_of(strategy))

    def fit(data, epochs=1):
        model.fit(data, epochs=epochs, verbose=0, shuffle=False)

    off = tf.data.Options()
    off.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    empty = own.take(0) if mesh.worker else own
    found["errors"] = {
        "off": error_of(lambda: fit(own_of_whole().with_options(off))),
        "without saying so": error_of(lambda: fit(rows_of_worker(mesh.worker, 2, False))),
        "no row": error_of(lambda: fit(empty)),
        "used up": error_of(lambda: fit(tfzero.own_rows(once_of(own)), epochs=2)),
        "used up, from a function": error_of(
            lambda: fit(strategy.distribute_datasets_from_function(lambda _: once_of(own)), epochs=2)
        ),
        "used up by all": error_of(lambda: fit(once_of(own_of_whole()), epochs=2)),
        "other structure": error_of(lambda: fit(own.map(lambda x, y: (x, y[:, : 2 + mesh.worker])))),
        "other files": error_of(lambda: fit(data_of([*files[:6], f"other {mesh.worker}"]))),
        "other contents": error_of(lambda: fit(data_of([*files[:6], other_contents(folder, mesh.worker)]))),
        "other seed": error_of(lambda: fit(data_of(files, seed=mesh.worker))),
        "missing": error_of(lambda: fit(data_of([*files[:5], "nowhere", files[6]], shuffle=0))),
        "shards": error_of(lambda: fit(data_of(files, shards=3))),
    }  # fmt: skip
    callback = tfzero.CheckpointCallback(folder, save_every_steps=1, asynchronous=False)
    found["halted"] = error_of(lambda: halted(strategy, data_of(files), callback))
    found["errors"] |= {
        "fails": error_of(lambda: fit(failing(own, at=2 if mesh.worker else None))),
        "fails at once": error_of(lambda: fit(failing(own, at=None if mesh.worker else 0))),
        "fails on all": error_of(lambda: fit(failing(own, at=1))),
        "damaged": error_of(lambda: fit(data_of(damaged(files, folder), shuffle=0))),
    }
    found["after errors"] = outcome(strategy, own)
    return found


def failing(dataset, at):
    """The same batches, of which one cannot be made."""
    bad = -1 if at is None else at

    def check(index, batch):
        with tf.control_dependencies([tf.debugging.Assert(index != bad, ["a bad batch"])]):
            return tf.nest.map_structure(tf.identity, batch)

    return dataset.enumerate().map(check)


def other_contents(folder, worker):
    """A file that each worker sees otherwise, by a path of the same name."""
    local = Path(folder).parent / f"of worker {worker}"
    local.mkdir(exist_ok=True)
    os.chdir(local)
    Path("part-6").write_bytes(bytes(10 + worker))
    return "part-6"


def damaged(files, folder):
    """The same files, of which the sixth ends too early."""
    name = Path(folder).parent / "damaged.tfrecord"
    whole = Path(files[5]).read_bytes()
    name.write_bytes(whole[: len(whole) // 2])
    return [*files[:5], str(name), files[6]]


def own_of_whole():
    return rows_of_worker(0, 2, True)


def once_of(dataset):
    """Data that are used up after one pass."""
    # Of arrays: a pipeline that runs within another one's Python function waits for threads that wait for it.
    iterator = iter(list(dataset.as_numpy_iterator()))
    return tf.data.Dataset.from_generator(lambda: iterator, output_signature=dataset.element_spec)


def halted(strategy, data, *callbacks, after=12):
    """Trains until it is ended in the middle of the second epoch."""
    seen = []

    def note(batch, logs):
        seen.append(batch)
        if len(seen) == after:
            raise RuntimeError("halted")

    ending = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    fit = compiled(model_of(strategy)).fit
    fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[*callbacks, ending], validation_data=data)


@pytest.mark.parametrize(("devices", "is_short"), [(2, True), sweep(2, False), sweep(1, False)])
def test_workers(tmp_path, devices, is_short):
    files, folder = write(tmp_path), tmp_path / "run"
    arguments = (files, str(folder), devices, is_short)
    fleet = pool.run(run_cases, 2, args=arguments, cpu_devices=devices, is_last=True)
    one_device = {
        "files": outcome(None, data_of(files), data_of(files), data_of(files, shuffle=0)),
        "own rows": outcome(None, own_of_whole(), own_of_whole()),
        "after errors": outcome(None, own_of_whole()),
        "two steps at a time": outcome(None, own_of_whole(), steps=2),
        "by files": outcome(None, unions_of(by_workers(files))),
        "from a function": outcome(None, unions_of([for_replicas(worker, 6) for worker in range(2)])),
    }
    if not is_short:
        one_device["counted"] = outcome(None, data_of(files, counts=SIZES))
    for worker, found in enumerate(fleet):
        for case, expected in one_device.items():
            assert_equal(found[case], expected)
        batches, has_waited, read_bytes = found["account"]
        assert batches == fleet[0]["account"][0] > 0 and has_waited and read_bytes > 0
        errors = found["errors"]
        assert "tfzero.own_rows" in errors["off"] and "OFF" in errors["off"]
        assert "batches differ" in errors["without saying so"] and "tfzero.own_rows" in errors["without saying so"]
        assert "worker 1 brought no row to data set" in errors["no row"]
        assert "worker 0, worker 1 brought no row" in errors["used up"]
        assert "The data gave no batch in this epoch on worker" in errors["used up, from a function"]
        assert "The data gave no batch in this epoch on worker" in errors["used up by all"]
        assert "part 1 of a batch is" in errors["other structure"] and "(None, 3)" in errors["other structure"]
        assert "file 6 is 'other 0 (NotFoundError)' on worker 0 and 'other 1 (NotFound" in errors["other files"]
        assert "part-6 (10 bytes)' on worker 0" in errors["other contents"]
        assert "part-6 (11 bytes)' on worker 1" in errors["other contents"]
        assert "seed is 0 on worker 0 and 1 on worker 1" in errors["other seed"]
        assert "worker 1: 'nowhere' cannot be read" in errors["missing"]
        assert "3 shards can be read by [1, 3] workers" in errors["shards"]
        assert found["halted"] == "RuntimeError: halted"
        assert "worker 1 cannot read" in errors["damaged"] and "damaged.tfrecord" in errors["damaged"]
        for case, at, bad in (("fails", 2, 1), ("fails at once", 0, 0), ("damaged", 3, 1)):
            told = f"RuntimeError: Reading batch {at} of pass 1 over data set"
            assert (told in errors[case] and f"failed on worker {bad}: " in errors[case]) is (worker != bad)
        assert "a bad batch" in errors["fails"] and "a bad batch" in errors["fails at once"]
        assert errors["fails on all"].startswith("InvalidArgumentError") and "a bad batch" in errors["fails on all"]
    resumed_elsewhere(files, folder, [SIZES] if is_short else [None, SIZES])


def resumed_elsewhere(files, folder, known):
    """On another number of workers a run goes on in the middle of an epoch, without decoding what lies behind."""
    uninterrupted = compiled(model_of())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        data = data_of(files)
        uninterrupted.fit(data, epochs=3, verbose=0, shuffle=False, validation_data=data)  # which counts its passes
        for number, counts in enumerate(known):
            decoded = []

            def counting(record, decoded=decoded):
                tf.py_function(lambda: decoded.append(1), [], [])
                return decode(record)

            again = shutil.copytree(folder, folder.parent / f"run {number}")
            model = compiled(model_of(strategy_of(len(known) - number)))
            callback = tfzero.CheckpointCallback(again, save_every_epochs=9)
            data = data_of(files, decode=counting, counts=counts)
            model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[callback], validation_data=data)
            assert 0 < len(decoded) < (2 + 2) * sum(SIZES)
            for mine, theirs in zip(model.get_weights(), uninterrupted.get_weights(), strict=True):
                np.testing.assert_allclose(mine, theirs, **EXACT)
