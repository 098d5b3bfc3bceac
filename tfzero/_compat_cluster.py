"""Private symbols of TensorFlow about clusters of processes, each with its reason. See `_compat.py`."""

# TensorFlow's coordination service is configured on the context alone.
from tensorflow.python.eager import context


def leave_watch_out() -> None:
    """Lets TensorFlow's servers start without a watch of their own; call it before TensorFlow makes its devices.

    Its coordination service ends all collectives of workers that have sent no heartbeat for 10 s, whatever limit they
    were given, and takes SIGTERM from them: from their children too, which then do not end. `pulse.py` is the one
    watch. The stock strategy configures the service only if nobody has (`CollectiveAllReduceExtended.
    _initialize_multi_worker`), so an empty one stays.
    """
    context.context().configure_coordination_service(service_type="")


def watch() -> str:
    """The kind of TensorFlow's coordination service in this process; "" for none."""
    configured = context.context().coordination_service
    return "" if configured is None else configured.service_type
