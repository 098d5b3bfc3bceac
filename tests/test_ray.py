"""Ray Train: two real workers of `TensorflowTrainer` train as one device does, and go on after one has died."""

import json
import os
import sys

import keras
import numpy as np
import oracle
import pytest

import tfzero

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]  # Ray itself calls what it deprecates
EPOCHS = 3
DATA = oracle.Data(samples=46)
ROWS_OF_A_WORKER = 8


def make_model() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(17, activation="relu"), keras.layers.Dense(3, activation="softmax")]
    )
    random = np.random.default_rng(3)
    model.set_weights([random.normal(size=w.shape) * 0.3 for w in model.get_weights()])
    return model


def compile_it(model: keras.Model, **arguments) -> keras.Model:
    model.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"], **arguments)
    return model


# In a worker of Ray.


def train(config: dict) -> None:
    """Trains in one of the ways of `TRAIN`, and writes down what came of it."""
    strategy = tfzero.ZeroStrategy(stage=3, min_shard_elements=8)
    with strategy.scope():
        model = make_model()
    told = TRAIN[config["way"]](compile_it(model), config)
    told |= {"TF_CONFIG": json.loads(os.environ["TF_CONFIG"]), "weights": [w.tolist() for w in model.get_weights()]}
    path = f"{config['folder']}/{config['way']}-{strategy.extended.mesh.worker}.json"
    with open(path, "w") as file:
        json.dump(told, file)


def train_on_arrays(model: keras.Model, config: dict) -> dict:
    return model.fit(*DATA.arrays(), batch_size=16, epochs=EPOCHS, shuffle=False, verbose=0).history


def train_on_shards(model: keras.Model, config: dict) -> dict:
    import ray.train

    shard = ray.train.get_dataset_shard("train").to_tf("x", "y", batch_size=ROWS_OF_A_WORKER)
    try:
        model.fit(shard, verbose=0)
        refused = ""
    except ValueError as error:
        refused = str(error)
    history = model.fit(tfzero.own_rows(shard), epochs=EPOCHS, shuffle=False, verbose=0).history
    batches = [[x.numpy().tolist(), y.numpy().tolist()] for x, y in shard]
    return history | {"batches": batches, "refused": refused}


def train_with_checkpoints(model: keras.Model, config: dict) -> dict:
    """Epoch by epoch, each reported with a checkpoint. The second worker dies in the second epoch, once."""
    import ray.train

    worker = model.distribute_strategy.extended.mesh.worker
    checkpoint = ray.train.get_checkpoint()
    first, started_at = config.get("from_epoch", 0), config.get("from_checkpoint")
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = tfzero.load_checkpoint(model, folder) // 3
    elif started_at:
        tfzero.load_checkpoint(model, started_at)

    def die(batch, logs=None):
        if config["dies"] and worker == 1 and checkpoint is None and epoch == 1 and batch == 1:
            ray.train.get_all_reported_checkpoints()  # waits until Ray has what was reported
            os._exit(1)

    losses = []
    for epoch in range(first, config["epochs"]):
        dying = keras.callbacks.LambdaCallback(on_train_batch_end=die)
        losses += model.fit(*DATA.arrays(), batch_size=16, shuffle=False, verbose=0, callbacks=[dying]).history["loss"]
        folder = f"{config['folder']}/saved-{epoch}"
        tfzero.save_checkpoint(model, folder)
        ray.train.report(
            {"loss": losses[-1]}, checkpoint=None if worker else ray.train.Checkpoint.from_directory(folder)
        )
    return {"loss": losses, "first": first}


TRAIN = {
    "arrays": train_on_arrays, "shards": train_on_shards, "checkpoints": train_with_checkpoints,
    "resumed": train_with_checkpoints,
}  # fmt: skip


# In the driver.


@pytest.fixture(scope="module")
def ray_results(tmp_path_factory):
    """What each worker of each run wrote down, by way: all in one Ray of this machine, which ends here."""
    import ray
    import ray.train
    from ray.train.tensorflow import TensorflowTrainer

    folder = tmp_path_factory.mktemp("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.cloudpickle.register_pickle_by_value(oracle)

    def fit(way: str, workers: int = 2, datasets=None, failures=0, **config):
        trainer = TensorflowTrainer(
            train,
            train_loop_config={"way": way, "folder": str(folder), **config},
            datasets=datasets,
            scaling_config=ray.train.ScalingConfig(num_workers=workers),
            run_config=ray.train.RunConfig(
                name=way, storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=failures)
            ),
        )
        result = trainer.fit()
        return result, [json.loads((folder / f"{way}-{worker}.json").read_text()) for worker in range(workers)]

    ray.init(num_cpus=3, object_store_memory=10**8, include_dashboard=False, log_to_driver=False)
    try:
        rows = ray.data.from_items([{"x": x, "y": y} for x, y in zip(*DATA.arrays(), strict=True)])
        runs = {"arrays": fit("arrays")[1], "shards": fit("shards", datasets={"train": rows})[1]}
        result, runs["checkpoints"] = fit("checkpoints", failures=1, epochs=EPOCHS, dies=True)
        onward = {"from_checkpoint": result.checkpoint.path, "from_epoch": EPOCHS}
        runs["resumed"] = fit("resumed", 1, epochs=EPOCHS + 1, dies=False, **onward)[1]
    finally:
        ray.shutdown()
    return runs


def one_device(batches=None, epochs=EPOCHS) -> tuple:
    """Losses and weights of plain Keras."""
    model = compile_it(make_model(), jit_compile=False)
    if batches is None:
        losses = model.fit(*DATA.arrays(), batch_size=16, epochs=epochs, shuffle=False, verbose=0).history["loss"]
    else:
        import tensorflow as tf

        spec = (tf.TensorSpec((None, 8)), tf.TensorSpec((None, 3)))
        data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)
        data = data.apply(tf.data.experimental.assert_cardinality(len(batches)))
        losses = model.fit(data, epochs=epochs, shuffle=False, verbose=0).history["loss"]
    return losses, model.get_weights()


def assert_same(run: dict, losses: list, weights: list) -> None:
    np.testing.assert_allclose(run["loss"], losses[-len(run["loss"]) :], rtol=2e-4, atol=2e-5)
    for mine, theirs in zip(run["weights"], weights, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)


def test_arrays(ray_results):
    reference = one_device()
    for index, run in enumerate(ray_results["arrays"]):
        assert_same(run, *reference)
        assert run["TF_CONFIG"]["task"] == {"type": "worker", "index": index}
        assert list(run["TF_CONFIG"]["cluster"]) == ["worker"] and len(run["TF_CONFIG"]["cluster"]["worker"]) == 2


def test_shards_of_a_dataset_of_ray(ray_results):
    """Equal to one device that gets the union of the workers' batches."""
    runs = ray_results["shards"]
    assert all("own_rows" in run["refused"] for run in runs)
    sizes = [sum(len(x) for x, _ in run["batches"]) for run in runs]
    assert sum(sizes) == DATA.samples and min(sizes) > 0
    steps = max(len(run["batches"]) for run in runs)
    unions = []
    for step in range(steps):
        parts = [run["batches"][step] for run in runs if step < len(run["batches"])]
        unions.append(tuple(np.concatenate([np.array(part[k], "float32") for part in parts]) for k in (0, 1)))
    reference = one_device(unions)
    for run in runs:
        assert_same(run, *reference)


def test_a_failing_worker_is_restarted_from_the_reported_checkpoint(ray_results):
    reference = one_device()
    for run in ray_results["checkpoints"]:
        assert run["first"] == 1  # the first epoch was not trained again
        assert_same(run, *reference)


def test_a_reported_checkpoint_is_resumed_on_another_number_of_workers(ray_results):
    (run,) = ray_results["resumed"]
    assert run["first"] == EPOCHS and len(run["TF_CONFIG"]["cluster"]["worker"]) == 1
    assert_same(run, *one_device(epochs=EPOCHS + 1))
