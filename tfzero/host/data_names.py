"""The private names of `tf.data`, and of what Keras makes with it, a row for each. See `host/registry.py`."""

from tfzero.host.keras_names import KERAS
from tfzero.host.registry import rows
from tfzero.host.tensorflow_names import TENSORFLOW

_DATA = "tensorflow.python.data.ops"

ROWS = (
    *rows(
        _DATA,
        TENSORFLOW,
        "test_pipelines_tell_what_they_are_made_of",
        {
            "dataset_ops.DatasetV2._inputs(self)": "what a data set is made from",
            "dataset_ops.DatasetV2._functions(self)": "the functions of a data set's stages",
        },
    ),
    *rows(
        _DATA,
        TENSORFLOW,
        "test_shuffle_seeds",
        {
            "shuffle_op._ShuffleDataset._seed": "workers must shuffle alike",
            "shuffle_op._ShuffleDataset._seed2": "workers must shuffle alike",
        },
    ),
    *rows(
        _DATA,
        TENSORFLOW,
        "test_stages_that_keep_no_order",
        {
            "map_op._ParallelMapDataset._deterministic": "a stage may keep no order, whatever the options say",
            "batch_op._ParallelBatchDataset._deterministic": "a stage may keep no order, whatever the options say",
        },
    ),
    *rows(
        "tensorflow.python.data.experimental.ops.distribute",
        TENSORFLOW,
        "test_files_are_dealt_by_the_policy",
        {
            "_AutoShardDataset(UnaryDataset)": "each worker reads its files only; strategies do it inside",
            "compute_batch_size(dataset)": "rows of a whole batch, of which each worker brings its part",
        },
    ),
    *rows(
        _DATA,
        TENSORFLOW,
        "test_rows_of_arrays_by_their_indices",
        {
            "dataset_ops._OptionsDataset(UnaryUnchangedStructureDataset)": "a stage that changes no element",
            "prefetch_op._PrefetchDataset(UnaryUnchangedStructureDataset)": "a stage that changes no element",
            "map_op._ParallelMapDataset(UnaryDataset)": "Keras takes the rows of arrays in one",
            "map_op._ParallelMapDataset._map_func": "Keras's function, to take a worker's own rows only",
            "structured_function.StructuredFunctionWrapper._func": "that function as Keras wrote it",
        },
    ),
    *rows(
        "keras.src.trainers.data_adapters.array_data_adapter",
        KERAS,
        "test_rows_of_arrays_by_their_indices",
        {
            "ArrayDataAdapter(DataAdapter)": "where Keras makes batches of arrays",
            "ArrayDataAdapter.get_tf_dataset(self)": "a function in it takes the rows of a batch",
        },
    ),
)
