"""Four logical CPU devices for the whole suite; strategies take as many as they need."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import oracle  # noqa: F401 - sets how graphs are made
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)

# Of all processes that tests start. What `workers_path/sitecustomize.py` does, it does there.
TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "workers_path"), str(TESTS.parent)])

# The files that take longest, so that no process is left with one of them at the end.
LONGEST = (
    "test_workers", "test_step", "test_checkpoints", "test_survival", "test_examples", "test_bad_input",
    "test_stage3", "test_compression", "test_optimizers",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
