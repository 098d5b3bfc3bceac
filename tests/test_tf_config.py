"""TF_CONFIG and CLUSTER_SPEC as products write them. Where each sample is from stands beside it."""

import json
from unittest import mock

import pytest
import tensorflow as tf

import tfzero
from tfzero.host.distributed import resolver_of
from tfzero.workers.cluster import Cluster, cluster_from_spec, read_cluster_spec, read_tf_config
from tfzero.workers.resolvers import find_cluster


def read(config):
    return read_tf_config({"TF_CONFIG": config if isinstance(config, str) else json.dumps(config)})


# kubeflow/training-operator, pkg/controller.v1/tensorflow/tensorflow.go: genTFConfigJSONStr, genClusterSpec.
TFJOB_HOSTS = {
    "chief": ["mnist-chief-0.kubeflow.svc:2222"],
    "worker": ["mnist-worker-0.kubeflow.svc:2222", "mnist-worker-1.kubeflow.svc:2222"],
}
TFJOB = {"cluster": TFJOB_HOSTS, "task": {"type": "worker", "index": 1}, "environment": "cloud"}
TFJOB_OF_ONE = (
    '{"cluster":{"worker":["one-worker-0.default.svc:2222"]},"task":{"type":"worker","index":0},"environment":"cloud"}'
)
TFJOB_EVALUATOR = {**TFJOB, "task": {"type": "evaluator", "index": 0}}  # an evaluator is not in the cluster
# The same file: with `enableDynamicWorker: true` a worker learns its own address only.
TFJOB_DYNAMIC = {
    "sparseCluster": {"worker": {"1": "mnist-worker-1.kubeflow.svc:2222"}, "ps": []},
    "task": {"type": "worker", "index": 1},
}
# aws/sagemaker-tensorflow-training-toolkit, src/sagemaker_tensorflow_container/training.py: _build_tf_config. With
# `parameter_server` each host is a server, too; one host alone is a master.
SAGEMAKER_SERVERS = {
    "cluster": {"master": ["algo-1:2222"], "ps": ["algo-1:2223", "algo-2:2223"], "worker": ["algo-2:2222"]},
    "environment": "cloud",
    "task": {"index": 0, "type": "worker"},
}
SAGEMAKER_OF_ONE = {
    "cluster": {"master": ["algo-1:2222"]},
    "environment": "cloud",
    "task": {"index": 0, "type": "master"},
}
SAGEMAKER = {
    "cluster": {"worker": ["algo-1:8890", "algo-2:8890"]},
    "environment": "cloud",
    "task": {"index": 1, "type": "worker"},
}
# Google's pages of distributed training: "The format of TF_CONFIG". `job` is an object, or the text of one.
VERTEX_HOSTS = {
    "chief": ["training-workerpool0-ab-0:2222"],
    "worker": ["training-workerpool1-ab-0:2222", "training-workerpool1-ab-1:2222"],
}
VERTEX = {
    "cluster": VERTEX_HOSTS,
    "environment": "cloud",
    "job": '{"python_module":"trainer.task","package_uris":[],"job_args":["--epochs\\u003d3"]}',
    "task": {"cloud": "ab12", "index": 0, "trial": "1", "type": "worker"},
}
AI_PLATFORM = {  # "chief versus master": runtime versions before 2.1
    "cluster": {"master": ["cmle-training-master-ab-0:2222"], "worker": ["cmle-training-worker-ab-0:2222"]},
    "environment": "cloud",
    "job": {"scale_tier": "CUSTOM", "worker_count": "1"},
    "task": {"cloud": "ab12", "index": 0, "trial": "1", "type": "master"},
}
VERTEX_SERVERS = {**VERTEX, "cluster": {**VERTEX_HOSTS, "ps": ["training-workerpool2-ab-0:2222"]}}
# tensorflow/ecosystem, spark_tensorflow_distributor/mirrored_strategy_runner.py: set_tf_config.
DATABRICKS = {"cluster": {"worker": ["10.0.0.4:37081", "10.0.0.5:40173"]}, "task": {"type": "worker", "index": 0}}
# ray-project/ray, python/ray/train/tensorflow/config.py: _setup_tensorflow_environment; addresses by `build_address`.
RAY = {"cluster": {"worker": ["10.0.0.4:51234", "[fd00::5]:51235"]}, "task": {"type": "worker", "index": 1}}
# Written by hand: string indices, and jobs as objects, as `tf.train.ClusterSpec` takes them.
BY_HAND = {
    "cluster": {"worker": {"0": "a:1", "1": "b:2"}},
    "task": {"type": "worker", "index": "1"},
    "rpc_layer": "grpc",
}


@pytest.mark.parametrize(
    "config, addresses, names, index",
    [
        (TFJOB, [*TFJOB_HOSTS["chief"], *TFJOB_HOSTS["worker"]], ["chief 0", "worker 0", "worker 1"], 2),
        (TFJOB_OF_ONE, ["one-worker-0.default.svc:2222"], ["worker 0"], 0),
        (SAGEMAKER, ["algo-1:8890", "algo-2:8890"], ["worker 0", "worker 1"], 1),
        (SAGEMAKER_OF_ONE, ["algo-1:2222"], ["chief 0"], 0),
        (VERTEX, [*VERTEX_HOSTS["chief"], *VERTEX_HOSTS["worker"]], ["chief 0", "worker 0", "worker 1"], 1),
        (
            AI_PLATFORM,
            ["cmle-training-master-ab-0:2222", "cmle-training-worker-ab-0:2222"],
            ["chief 0", "worker 0"],
            0,
        ),
        (DATABRICKS, ["10.0.0.4:37081", "10.0.0.5:40173"], ["worker 0", "worker 1"], 0),
        (RAY, ["10.0.0.4:51234", "[fd00::5]:51235"], ["worker 0", "worker 1"], 1),
        (BY_HAND, ["a:1", "b:2"], ["worker 0", "worker 1"], 1),
    ],
)
def test_what_a_product_writes_is_read(config, addresses, names, index):
    assert read(config) == Cluster(tuple(addresses), tuple(names), index)


def test_servers_are_named_beside_the_workers():
    cluster = read(SAGEMAKER_SERVERS)
    assert (cluster.name, cluster.servers) == ("worker 0", ("algo-1:2223", "algo-2:2223"))
    assert read({**SAGEMAKER_SERVERS, "task": {"type": "ps", "index": 1}}).address == "algo-2:2223"
    assert read(VERTEX_SERVERS).servers == ("training-workerpool2-ab-0:2222",)


@pytest.mark.parametrize(
    "config, advice",
    [
        (TFJOB_EVALUATOR, "An evaluator task takes no part in training. Run `model.evaluate`"),
        ({"task": {"type": "evaluator", "index": 0}, "cluster": {}}, "An evaluator task takes no part in training"),
        ({"cluster": {**TFJOB_HOSTS, "evaluator": ["e:1"]}, "task": {"type": "evaluator", "index": 0}}, "An evaluator"),
        (TFJOB_DYNAMIC, "enableDynamicWorker"),
        ({"task": {"type": "ps", "index": 0}}, "This process is a parameter server (ps), but nothing"),
        ({"cluster": {"chief": ["a:1"], "master": ["b:2"]}, "task": {"type": "chief", "index": 0}}, "beside a"),
        ({"cluster": {"master": ["a:1", "b:2"]}, "task": {"type": "master", "index": 0}}, "more than one chief"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_train_is_told_what_to_do(config, advice):
    with pytest.raises(ValueError) as raised:
        read(config)
    assert advice in str(raised.value) and "Received: " in str(raised.value)


def test_a_cluster_may_list_an_evaluator():
    cluster = {"worker": ["a:1", "b:2"], "evaluator": ["e:3"], "ps": []}
    assert read({"cluster": cluster, "task": {"type": "worker", "index": 0}}).addresses == ("a:1", "b:2")


def test_an_evaluator_makes_no_strategy(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", json.dumps(TFJOB_EVALUATOR))
    with pytest.raises(ValueError, match="An evaluator task takes no part"):
        tfzero.ZeroStrategy()


def test_tensorflow_gets_jobs_and_indices_that_it_knows():
    """It calls the first worker chief, and numbers tasks 0, 1, 2, ..."""
    resolver = resolver_of(read(AI_PLATFORM))
    assert resolver.cluster_spec().as_dict() == {
        "chief": ["cmle-training-master-ab-0:2222"],
        "worker": ["cmle-training-worker-ab-0:2222"],
    }
    assert (resolver.task_type, resolver.task_id) == ("chief", 0)
    cluster = cluster_from_spec({"worker": {3: "c:3", 1: "a:1"}}, "worker", 3)
    assert cluster.names == ("worker 1", "worker 3") and cluster.tasks == [("worker", 0), ("worker", 1)]
    resolver = resolver_of(cluster)
    assert resolver.cluster_spec().as_dict() == {"worker": ["a:1", "c:3"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)


# CLUSTER_SPEC.

# Google's pages of distributed training: "The format of CLUSTER_SPEC".
VERTEX_POOLS = {
    "workerpool0": ["cmle-training-workerpool0-ab-0:2222"],
    "workerpool1": ["cmle-training-workerpool1-ab-0:2222", "cmle-training-workerpool1-ab-1:2222"],
    "workerpool2": ["cmle-training-workerpool2-ab-0:2222", "cmle-training-workerpool2-ab-1:2222"],
    "workerpool3": ["cmle-training-workerpool3-ab-0:2222"],
}


def vertex(pool, index, pools=4):
    cluster = dict(list(VERTEX_POOLS.items())[:pools])
    task = {"type": pool, "index": index, "trial": "TRIAL_ID"}
    return {"cluster": cluster, "environment": "cloud", "task": task, "job": {"worker_pool_specs": []}}


def read_spec(config, **environ):
    return read_cluster_spec({"CLUSTER_SPEC": config if isinstance(config, str) else json.dumps(config), **environ})


def test_pools_of_vertex_are_jobs():
    addresses = (*VERTEX_POOLS["workerpool0"], *VERTEX_POOLS["workerpool1"])
    names = ("chief 0", "worker 0", "worker 1")
    assert read_spec(vertex("workerpool0", 0)) == Cluster(addresses, names, 0)
    assert read_spec(vertex("workerpool1", 1)) == Cluster(addresses, names, 2)
    assert read_spec(vertex("workerpool0", 0, pools=1)) == Cluster(addresses[:1], names[:1], 0)
    for pool, advice in (("workerpool2", "parameter server"), ("workerpool3", "An evaluator task")):
        with pytest.raises(ValueError, match=advice):
            read_spec(vertex(pool, 0))


def test_a_cluster_alone_has_its_task_beside_it():
    """As TonY of LinkedIn sets it."""
    cluster = {"worker": ["a:1", "b:2"]}
    assert read_spec(cluster, JOB_NAME="worker", TASK_INDEX="1") == Cluster(("a:1", "b:2"), ("worker 0", "worker 1"), 1)
    assert read_spec({**cluster, "ps": ["c:3"]}, JOB_NAME="ps", TASK_INDEX="0").name == "ps 0"
    with pytest.raises(ValueError, match=r"task type is unknown.*Set TF_CONFIG to say who the workers are, or to '{}'"):
        read_spec(cluster)


@pytest.mark.parametrize("text", ["", "{}", "prod-gpu", "[1]", '{"cluster": "prod"}', '{"size": 3}', "3"])
def test_another_programs_cluster_spec_is_left_alone(text):
    assert read_spec(text) is None


def test_tf_config_comes_before_cluster_spec(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setenv("CLUSTER_SPEC", json.dumps(vertex("workerpool1", 0)))
    assert find_cluster(None).size == 3
    assert find_cluster(resolvers().TFConfigClusterResolver()).size == 3
    monkeypatch.setenv("TF_CONFIG", json.dumps(DATABRICKS))
    assert find_cluster(None).size == 2
    monkeypatch.setenv("TF_CONFIG", "{}")
    assert find_cluster(None) is None


# Tasks without either.

TASKS = {
    "Slurm": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    "Hydra": {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"},
    "PyTorch": {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
}
ALONE = {
    "a step of one task": {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    # gist.github.com/jerinphilip/212b3814264c3b8da512afc2cfda4bcb: `env | grep SLURM` in a batch script.
    "a batch script": {
        "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0",
        "SLURM_JOB_NODELIST": "gnode[10,20,25,37]", "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_NPROCS": "4",
    },
    "sizes without ranks": {"WORLD_SIZE": "4", "MASTER_ADDR": "node1", "PMI_SIZE": "4", "PMI_RANK": "1"},
    "a rank without a master": {"WORLD_SIZE": "4", "RANK": "1"},
}  # fmt: skip


@pytest.fixture
def no_launcher(monkeypatch):
    """Without the variables of any launcher that these tests may run under."""
    for name in {"TF_CONFIG", "CLUSTER_SPEC", *(name for each in (*TASKS.values(), *ALONE.values()) for name in each)}:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("launcher", TASKS)
def test_one_of_several_tasks_does_not_train_alone(launcher, no_launcher):
    for name, value in TASKS[launcher].items():
        no_launcher.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"task 1 of 2 that .*{launcher}.*started.*it would train alone") as raised:
        tfzero.ZeroStrategy()
    assert "python -m tfzero.launch script.py" in str(raised.value) and "TF_CONFIG='{}'" in str(raised.value)
    no_launcher.setenv("TF_CONFIG", "{}")
    assert tfzero.ZeroStrategy().num_replicas_in_sync >= 1


@pytest.mark.parametrize("case", ALONE)
def test_a_single_task_trains_alone(case, no_launcher):
    for name, value in ALONE[case].items():
        no_launcher.setenv(name, value)
    assert find_cluster(None) is None


# Cluster resolvers that users hand over.


def resolvers():
    return tf.distribute.cluster_resolver


def test_the_resolver_of_tf_config_finds_the_same_cluster(monkeypatch):
    for config in (TFJOB, AI_PLATFORM, DATABRICKS, BY_HAND):
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        assert find_cluster(resolvers().TFConfigClusterResolver()) == read(config)


class _Pods:
    """A stand-in for the client of Kubernetes."""

    def __init__(self, *pods):
        self.pods = pods

    def list_pod_for_all_namespaces(self, label_selector):
        def pod(name, host_ip, phase):
            status = mock.Mock(host_ip=host_ip, phase=phase)
            metadata = mock.Mock()
            metadata.name = name
            return mock.Mock(metadata=metadata, status=status)

        return mock.Mock(items=[pod(*each) for each in self.pods])


def kubernetes(*pods, **task):
    resolver = resolvers().KubernetesClusterResolver(override_client=_Pods(*pods))
    for name, value in task.items():
        setattr(resolver, name, value)
    return resolver


RUNNING = ("w-0", "10.0.0.1", "Running"), ("w-1", "10.0.0.2", "Running")


def test_kubernetes():
    cluster = find_cluster(kubernetes(*RUNNING, task_type="worker", task_id=1))
    assert cluster == Cluster(("10.0.0.1:8470", "10.0.0.2:8470"), ("worker 0", "worker 1"), 1)


@pytest.mark.parametrize(
    "pods, task, problem",
    [
        (RUNNING, {}, "does not know which task this process is. Set `task_type = 'worker'` and `task_id = 0`"),
        ((RUNNING[0], ("w-1", "10.0.0.2", "Pending")), {}, 'RuntimeError: Pod "w-1" is not running; phase: "Pending"'),
        (((*RUNNING[0],), ("w-1", "10.0.0.1", "Running")), {"task_type": "worker", "task_id": 1}, "same address"),
    ],
)
def test_kubernetes_that_cannot_work_says_what_to_do(pods, task, problem):
    with pytest.raises(ValueError, match="^KubernetesClusterResolver ") as raised:
        find_cluster(kubernetes(*pods, **task))
    assert problem in str(raised.value)
    assert ("hostNetwork" in str(raised.value)) == (problem[:4] != "does")


def slurm_step(monkeypatch, nodes, rank=0):
    step = {"NUM_TASKS": "2", "NODELIST": nodes, "TASKS_PER_NODE": "1(x2)", "ID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", str(rank))


def test_the_resolver_of_slurm(no_launcher):
    slurm_step(no_launcher, "n[1-2]", rank=1)
    resolver = resolvers().SlurmClusterResolver(gpus_per_node=1, auto_set_gpu=False)
    assert find_cluster(resolver) == Cluster(("n1:8888", "n2:8888"), ("worker 0", "worker 1"), 1)


@pytest.mark.parametrize(
    "nodes, gpus, problem",
    [("n[9-10]", 1, "sorts nodes as text.*workers at n10, n9, and tasks at n9, n10"), ("n[1-2]", 0, "needs GPUs")],
)
def test_the_resolver_of_slurm_that_cannot_work_says_what_to_do(nodes, gpus, problem, no_launcher):
    slurm_step(no_launcher, nodes)
    resolver = resolvers().SlurmClusterResolver(gpus_per_node=gpus, auto_set_gpu=False)
    with pytest.raises(ValueError, match=problem) as raised:
        find_cluster(resolver)
    assert "srun python -m tfzero.launch" in str(raised.value)
