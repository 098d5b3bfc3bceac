"""ZeRO for TensorFlow 2 and Keras 3: shards optimizer state, gradients and parameters in plain `model.fit`."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are imported on first use: launching workers must not wait for TensorFlow.
_HOMES = {
    "CheckpointCallback": "tfzero.checkpoint.callback",
    "DamagedCheckpointError": "tfzero.checkpoint.commits",
    "DriftCallback": "tfzero.views.drift",
    "TensorBoardCallback": "tfzero.views.tensorboard",
    "audit": "tfzero.views.audit",
    "ZeroOptimizer": "tfzero.optimizer",
    "ZeroStrategy": "tfzero.strategy",
    "WorkerError": "tfzero.launch",
    "estimate_memory": "tfzero.memory",
    "load_checkpoint": "tfzero.checkpoint.saving",
    "own_rows": "tfzero.rows.unions",
    "run_local": "tfzero.launch",
    "save_checkpoint": "tfzero.checkpoint.saving",
    "sharded_dataset": "tfzero.rows.sharded",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfzero' has no attribute {name!r}")
    if _HOMES[name] != "tfzero.launch":
        importlib.import_module("tfzero.host.backend")  # before anything imports Keras
    return getattr(importlib.import_module(_HOMES[name]), name)
