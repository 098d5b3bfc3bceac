"""Work that all workers do together, and that fails on all if it fails on one."""

from collections.abc import Callable

import tensorflow as tf

from tfzero.checkpoint.commits import DamagedCheckpointError
from tfzero.workers.channel import Channel

SAVING_SECONDS = 3600.0  # for the others to wait for the one that writes

# As what the others raise an error of one worker. What else goes wrong is a RuntimeError.
_KINDS: tuple[tuple[type[Exception], tuple[type[BaseException], ...]], ...] = (
    (DamagedCheckpointError, (DamagedCheckpointError,)),
    (OSError, (OSError, tf.errors.OpError)),
    (ValueError, (ValueError, TypeError)),
)


def together(channel: Channel, topic: str, function: Callable, timeout_seconds: float | None = None) -> list:
    """What `function` gives on each worker, as JSON has it. All workers call it.

    Args:
        channel: between the workers.
        topic: what they do, for messages.
        function: this worker's part, without an argument.
        timeout_seconds: how long to wait for the others; by default as long as the channel does.

    Raises:
        Exception: on all workers, if it fails on one, whose error and name the text tells: a DamagedCheckpointError,
            OSError (of TensorFlow's file operations too), ValueError or RuntimeError.
    """
    answer, error = None, None
    try:
        answer = function()
    except BaseException as raised:
        error = raised
    problem = None if error is None else [_kind_of(error), f"{type(error).__name__}: {error}"]
    answers = channel.all_gather(topic, [answer, problem], timeout_seconds)
    if error is not None and not isinstance(error, Exception):
        raise error  # told to end
    problems = [(worker, *each) for worker, (_, each) in enumerate(answers) if each]
    if problems:
        kinds = {kind.__name__: kind for kind, _ in _KINDS}
        text = "; ".join(f"worker {worker}: {told}" for worker, _, told in problems)
        raise kinds.get(problems[0][1], RuntimeError)(text) from error
    return [answer for answer, _ in answers]


def _kind_of(error: BaseException) -> str:
    return next((kind.__name__ for kind, those in _KINDS if isinstance(error, those)), "RuntimeError")
