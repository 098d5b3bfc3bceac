"""TF_CONFIG and CLUSTER_SPEC as products write them. Where each sample is from stands beside it."""

import json

import pytest
import tensorflow as tf

import tfzero
from tfzero.extended import _resolver
from tfzero.workers.cluster import Cluster, cluster_from_spec, find_cluster, read_tf_config


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


@pytest.mark.parametrize(
    "config, advice",
    [
        (TFJOB_EVALUATOR, "An evaluator task takes no part in training. Run `model.evaluate`"),
        ({"task": {"type": "evaluator", "index": 0}, "cluster": {}}, "An evaluator task takes no part in training"),
        ({"cluster": {**TFJOB_HOSTS, "evaluator": ["e:1"]}, "task": {"type": "evaluator", "index": 0}}, "An evaluator"),
        (TFJOB_DYNAMIC, "enableDynamicWorker"),
        (SAGEMAKER_SERVERS, "multi_worker_mirrored_strategy"),
        (VERTEX_SERVERS, 'There is a parameter server (ps). tfzero is synchronous'),
        ({"task": {"type": "ps", "index": 0}}, "There is a parameter server (ps): this process."),
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
    resolver = _resolver(read(AI_PLATFORM))
    assert resolver.cluster_spec().as_dict() == {
        "chief": ["cmle-training-master-ab-0:2222"],
        "worker": ["cmle-training-worker-ab-0:2222"],
    }
    assert (resolver.task_type, resolver.task_id) == ("chief", 0)
    cluster = cluster_from_spec({"worker": {3: "c:3", 1: "a:1"}}, "worker", 3)
    assert cluster.names == ("worker 1", "worker 3") and cluster.tasks == [("worker", 0), ("worker", 1)]
    resolver = _resolver(cluster)
    assert resolver.cluster_spec().as_dict() == {"worker": ["a:1", "c:3"]}
    assert (resolver.task_type, resolver.task_id) == ("worker", 1)


# Cluster resolvers that users hand over.


def resolvers():
    return tf.distribute.cluster_resolver


def test_the_resolver_of_tf_config_finds_the_same_cluster(monkeypatch):
    for config in (TFJOB, AI_PLATFORM, DATABRICKS, BY_HAND):
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        assert find_cluster(resolvers().TFConfigClusterResolver()) == read(config)
