"""Watches during `fit` that everything that must be equal on all replicas still is."""

import hashlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfzero.checkpoint.state import state_of
from tfzero.plan.settings import check_number


class DriftCallback(keras.callbacks.Callback):
    """Stops the training when something that must be equal on all replicas is not.

    Args:
        check_every: number of batches from one comparison to the next. A comparison reads all variables that every
            replica holds whole.

    Raises:
        ValueError: if `check_every` is not an integer of at least 1.
        RuntimeError: from `fit`, on all workers; names the variable and each replica's digest of it.

    Example:

    ```python
    model.fit(x, y, batch_size=16, callbacks=[tfzero.DriftCallback(check_every=2)])
    ```
    """

    def __init__(self, check_every: int) -> None:
        super().__init__()
        check_number("check_every", check_every, int, 1)
        self.check_every = check_every
        self._batches = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._batches += 1
        if self._batches % self.check_every == 0:
            check_drift(self.model)


def check_drift(model: keras.Model) -> None:
    """Compares a digest of every variable that all replicas hold whole. All workers must call it.

    This includes variables that Keras does not know: every `tf.Variable` made under the scope. While workers train
    apart (`sync_every`), replicas of one worker are compared.

    Raises:
        RuntimeError: on all workers; names the variables that differ.
    """
    strategy = model.distribute_strategy
    items = state_of(model)
    apart = strategy.settings.merging is not None and strategy.local_steps.steps > 0
    equal = {item.name: item.value for item in items if item.is_equal_everywhere}
    within = set(equal) if apart else set()
    own = [item for item in items if item.is_local and not item.is_in_shards]  # equal within a worker
    equal |= {item.name: item.value for item in own}
    within |= {item.name for item in own}
    known = {id(value) for value in equal.values()}
    others = sorted(strategy.extended.creation.layer_variables.items())
    more = {f"{number}/{value.name}": value for number, value in others if id(value) not in known}
    equal, within = equal | more, within | set(more if apart else ())
    digests = {name: [_digest(part) for part in getattr(value, "values", [value])] for name, value in equal.items()}
    answers = strategy.channel.all_gather("comparing replicas", digests)
    differing = []
    # A worker may have dropped a variable of another model before the others do.
    for name in [name for name in digests if all(name in answer for answer in answers)]:
        of_ranks = [digest for answer in answers for digest in answer[name]]
        groups = [answer[name] for answer in answers] if name in within else [of_ranks]
        if any(len(set(group)) > 1 for group in groups):
            shown = ", ".join(f"{digest} on replica {rank}" for rank, digest in enumerate(of_ranks))
            differing.append(f"{name!r} ({shown})")
    if differing:
        raise RuntimeError(
            f"The replicas have drifted apart in {len(differing)} of {len(digests)} variables: "
            f"{'; '.join(differing[:5])}. Something changed them on one replica only. Go on from a checkpoint."
        )


def _digest(component: tf.Variable) -> str:
    return hashlib.blake2b(np.ascontiguousarray(component.numpy()).data, digest_size=8).hexdigest()
