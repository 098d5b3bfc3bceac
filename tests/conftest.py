"""Four logical CPU devices for the whole suite; strategies take as many as they need."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TFZERO_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))  # for tests/gpu
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # its allocator counts bytes, and is there by default on some CPUs only

import pytest
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

# Of all processes that tests start. What `workers_path/sitecustomize.py` does, it does there.
TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "workers_path"), str(TESTS.parent)])

# The files that take longest, so that no process is left with one of them at the end.
LONGEST = (
    "test_workers", "test_step", "test_checkpoints", "test_survival", "test_menagerie", "test_keras_scripts",
    "test_recurrent_state", "test_examples", "test_bad_input", "test_workers_agree", "test_saving_workers",
    "test_blame", "test_stalls", "test_layer_state", "test_stage3", "test_compression", "test_optimizers",
)  # fmt: skip

# `pytest -m fast`: what a push should wait for. No workers are started there, and next to nothing is trained.
FAST = (
    "test_agreement", "test_backend", "test_batches_compared", "test_cluster", "test_commits",
    "test_directories", "test_edges", "test_house", "test_package", "test_plan", "test_versions",
)  # fmt: skip

# `pytest -m cells`: what may differ between versions of TensorFlow and Keras (`.ci/cells`), by names of functions or of
# their cases; by None all of a file. Of the fleets of `test_workers` one runs.
CELLS = {
    "test_checkpoints": (
        "test_another_number_of_replicas_goes_on_as_one_device",
        "test_other_steps_per_execution_go_on_with_the_same_batch[2-3-4-arrays]",
    ),
    "test_compat": None,
    "test_keras_files": ("test_one_worker_writes", "test_plain_keras_loads_what_workers_saved"),
    "test_late_gathers": ("test_result_is_that_of_gathers_at_once[int8]", "test_an_error_tells_what_it_leaves"),
    "test_optimizers": tuple(
        f"test_an_optimizer_does_as_on_one_device[{name}]"
        for name in ("adafactor-1-3", "adam-3-3", "loss_scale_lamb-2-3", "sgd_nesterov-2-2")
    ),
    "test_patches": ("test_what_is_patched_is_as_it_was",),
    "test_step": (
        "test_added_losses_and_regularizers", "test_losses_of_the_users_own[OwnStep-scalar]", "test_masked_losses",
    ),
    "test_workers": ("test_case",),
}  # fmt: skip
FLEET_OF_CELLS = "2x2-stage3"

# A shell that starts the tests in the background has them, and all that they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Full collections walk through all that TensorFlow and earlier tests have left, and find little.
gc.freeze()
gc.set_threshold(700, 10, 100)


def pytest_xdist_auto_num_workers():
    """One more than there are cores, as tests of processes spend a part of their time waiting."""
    return os.cpu_count() + 1


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in FAST and not item.get_closest_marker("sweep"):
            item.add_marker("fast")
        names = CELLS.get(item.path.stem, ())
        is_chosen = names is None or item.originalname in names or item.name in names
        if is_chosen and (item.path.stem != "test_workers" or FLEET_OF_CELLS in item.name):
            item.add_marker("cells")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
