"""Work that all workers do together. If it fails on one, it fails on all."""

from collections.abc import Callable

import tensorflow as tf

from tfzero.checkpoint.commits import DamagedCheckpointError
from tfzero.workers.channel import Channel

SAVING_SECONDS = 3600.0  # how long the others wait for the worker that writes

# The error that all workers raise for an error of one worker. Other errors become a RuntimeError.
_KINDS: tuple[tuple[type[Exception], tuple[type[BaseException], ...]], ...] = (
    (DamagedCheckpointError, (DamagedCheckpointError,)),
    (FileNotFoundError, (FileNotFoundError,)),
    (OSError, (OSError, tf.errors.OpError)),
    (ValueError, (ValueError, TypeError)),
)
KINDS = {kind.__name__: kind for kind, _ in _KINDS}


def together(channel: Channel, topic: str, function: Callable, timeout_seconds: float | None = None) -> list:
    """Returns the results of `function` on all workers, which travel as JSON. All workers call it.

    Args:
        channel: between the workers.
        topic: what they do, for messages.
        function: this worker's part, without arguments.
        timeout_seconds: how long to wait for the others; by default as long as the channel does.

    Raises:
        Exception: on all workers, if it fails on one. The text names that worker and its error. The type is one of
            `KINDS`; TensorFlow's file operations raise OSError.
    """
    answer, error = None, None
    try:
        answer = function()
    except BaseException as raised:
        error = raised
    problem = None if error is None else [kind_of(error), f"{type(error).__name__}: {error}"]
    answers = channel.all_gather(topic, [answer, problem], timeout_seconds)
    if error is not None and not isinstance(error, Exception):
        raise error  # this process is told to end
    problems = [(worker, *each) for worker, (_, each) in enumerate(answers) if each]
    if problems:
        text = "; ".join(f"worker {worker}: {told}" for worker, _, told in problems)
        raise KINDS.get(problems[0][1], RuntimeError)(text) from error
    return [answer for answer, _ in answers]


def kind_of(error: BaseException) -> str:
    """The name of the kind of error that all workers raise for one."""
    return next((kind.__name__ for kind, those in _KINDS if isinstance(error, those)), "RuntimeError")
