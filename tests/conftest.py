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
    "test_directories", "test_edges", "test_house", "test_package", "test_plan",
)  # fmt: skip

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
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
