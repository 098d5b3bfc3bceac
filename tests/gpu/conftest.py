"""Tests that need a GPU are skipped where nvidia-smi lists none; that is asked before TensorFlow is needed."""

import os

import pytest

from tfzero.workers.gpus import visible_gpus


def _why_not() -> str:
    """Why there is no GPU to test with; "" if there is one."""
    # The suite itself runs without GPUs: `tests/conftest.py` has put aside what was visible before.
    before = os.environ.get("TFZERO_TEST_GPUS", "all")
    environ = {} if before == "all" else {"CUDA_VISIBLE_DEVICES": before}
    try:
        return "" if visible_gpus(environ) else "no GPU is visible (nvidia-smi -L, CUDA_VISIBLE_DEVICES)"
    except ValueError as error:
        return str(error)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    needing = [item for item in items if str(item.path).startswith(here) and "needs_gpu" in item.fixturenames]
    reason = _why_not() if needing else ""
    for item in needing:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def needs_gpu():
    """The environment of a process that may use the GPUs which were visible to the suite."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    before = environment.pop("TFZERO_TEST_GPUS", "all")
    return environment if before == "all" else environment | {"CUDA_VISIBLE_DEVICES": before}
