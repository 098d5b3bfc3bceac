"""Which workers a new strategy has: those of a cluster resolver, of TF_CONFIG, or of CLUSTER_SPEC."""

import os
from typing import Any

from tfzero.workers import slurm
from tfzero.workers.addresses import host_of
from tfzero.workers.cluster import Cluster, cluster_from_spec, read_cluster_spec, read_tf_config
from tfzero.workers.tasks import chosen_port, find_task

_FOR_SLURM = "Leave `cluster_resolver` away, and start with `srun python -m tfzero.launch script.py`."
_ADVICE = {
    "SlurmClusterResolver": f"It needs GPUs. {_FOR_SLURM}",
    "KubernetesClusterResolver": "It names machines, not pods: all pods must be running in the network of their "
    "machine (`hostNetwork`), one on each. Or set TF_CONFIG in the pods, as examples/cluster/kubernetes.yaml does.",
}


def find_cluster(resolver: object) -> Cluster | None:
    """The `Cluster` of a user's resolver; without one that of TF_CONFIG, or else of CLUSTER_SPEC.

    Raises:
        ValueError: if it is invalid.
        RuntimeError: if a launcher has started this process as one of several tasks, and nothing names the others.
    """
    if resolver is not None:
        import tensorflow as tf  # imported only here: launchers read TF_CONFIG without TensorFlow

        kinds = tf.distribute.cluster_resolver
        if not isinstance(resolver, kinds.ClusterResolver):
            raise ValueError(f"`cluster_resolver` must be a ClusterResolver. Received: {resolver!r}")
        if not isinstance(resolver, kinds.TFConfigClusterResolver):
            return _cluster_of(resolver)
    cluster = read_tf_config()
    if cluster is not None or os.environ.get("TF_CONFIG", "").strip():
        return cluster
    cluster = read_cluster_spec()
    task = None if cluster is not None else find_task()
    if task is not None and task.size > 1:
        raise RuntimeError(task.refusal)
    return cluster


def _cluster_of(resolver: Any) -> Cluster | None:
    """The cluster of a resolver that finds it by itself; None if it is empty."""
    name = type(resolver).__name__
    advice = _ADVICE.get(name, "")
    try:
        spec = resolver.cluster_spec()
    except Exception as error:  # of whatever kind: it comes from a service, or another library
        raise ValueError(
            f"{name} could not name the workers. {advice} Received: {type(error).__name__}: {error}"
        ) from error
    if not spec:
        return None
    if resolver.task_type is None or resolver.task_id is None:
        raise ValueError(
            f"{name} does not know which task this process is. Set `task_type = 'worker'` and `task_id = 0`, 1, 2, ... "
            "on it before the strategy is made, another number in each process. Received: "
            f"task_type={resolver.task_type!r}, task_id={resolver.task_id!r}"
        )
    try:
        cluster = cluster_from_spec(spec.as_dict(), resolver.task_type, resolver.task_id)
    except ValueError as error:
        raise ValueError(f"{name} names other workers than needed. {advice} {error}") from None
    if cluster is not None and name == "SlurmClusterResolver":
        _check_order(cluster)
    return cluster


def _check_order(cluster: Cluster) -> None:
    """Raises ValueError if worker `k` is not at the node of Slurm's task `k`. The resolver sorts nodes as text."""
    task = find_task()
    if task is None or not task.is_of_slurm:
        return
    nodes = list(map(host_of, slurm.task_addresses(os.environ, chosen_port(os.environ))))
    named = list(map(host_of, cluster.addresses))
    if nodes != named:
        raise ValueError(
            f"SlurmClusterResolver sorts nodes as text, n10 before n9, and Slurm does not. {_FOR_SLURM} Received: "
            f"workers at {', '.join(named)}, and tasks at {', '.join(nodes)}."
        )
