"""Private symbols of TensorFlow about clusters of processes, each with its reason. See `host/runtime.py`."""

import contextlib
import functools
from collections.abc import Iterator

# TensorFlow's coordination service and its collectives are configured on the context alone.
from tensorflow.python.eager import context


def leave_watch_out() -> None:
    """Lets TensorFlow's servers start without a watch of their own; call it before TensorFlow makes its devices.

    Its coordination service ends all collectives of workers that have sent no heartbeat for 10 s, whatever limit they
    were given, and takes SIGTERM from them: from their children too, which then do not end. `collectives/pulse.py` is
    the one watch. The stock strategy configures the service only if nobody has (`CollectiveAllReduceExtended.
    _initialize_multi_worker`), so an empty one stays.
    """
    context.context().configure_coordination_service(service_type="")


@contextlib.contextmanager
def with_nccl(is_wanted: bool) -> Iterator[None]:
    """Within it a stock strategy configures TensorFlow for NCCL between the GPUs of several processes, if wanted.

    The worker that leads a group chooses the implementation, from a request that carries no hint: without
    `collective_nccl` in its configuration it finds none for a reduce-scatter. TensorFlow reads the configuration when
    its server starts, which is in the constructor of `CollectiveAllReduceExtended`; that configures the context with
    arguments of its own, and a second configuration must be equal to the first. On CPUs it makes no difference.
    """
    target = context.context()
    if not is_wanted:
        yield
        return
    target.configure_collective_ops = functools.partial(target.configure_collective_ops, use_nccl_communication=True)
    try:
        yield
    finally:
        del target.configure_collective_ops  # of this object; its class has its own


def uses_nccl() -> bool:
    """Whether TensorFlow is configured for NCCL between processes."""
    return bool(context.context().config.experimental.collective_nccl)


def watch() -> str:
    """The kind of TensorFlow's coordination service in this process; "" for none."""
    configured = context.context().coordination_service
    return "" if configured is None else configured.service_type
