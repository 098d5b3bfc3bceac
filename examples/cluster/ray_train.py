"""Digits, read in parts by the workers of Ray Train. To learn here: `own_rows`, and going on after a failure.

    python examples/cluster/ray_train.py --storage /shared/run --workers 2

Ray starts the workers and sets TF_CONFIG. Each reads its own part of Ray's data set. Each epoch is reported with a
checkpoint, from which Ray starts all workers again if one has failed, and from which a later run goes on with another
number of workers. Needs `pip install -e ".[examples,ray]"`.
"""

import argparse
import os


def train(config: dict) -> None:
    """What each worker does, in a process of its own."""
    import keras
    import ray.train

    import tfzero

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_first = ray.train.get_context().get_world_rank() == 0
    keras.utils.set_random_seed(0)
    with strategy.scope():
        hidden = keras.layers.Dense(128, activation="relu")
        model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            tfzero.load_checkpoint(model, folder)
        first = checkpoint.get_metadata()["epochs"]

    rows = 64 // ray.train.get_context().get_world_size()  # the batch size is one worker's
    for epoch in range(first, config["epochs"]):
        shard = ray.train.get_dataset_shard("train").to_tf("x", "y", batch_size=rows)
        history = model.fit(tfzero.own_rows(shard), shuffle=False, verbose=0).history
        # All workers write into one folder; the first reports it.
        saved = os.path.join(config["storage"], "saved", f"epoch-{epoch}-{ray.train.get_context().get_world_size()}")
        tfzero.save_checkpoint(model, saved)
        reported = None
        if is_first:
            reported = ray.train.Checkpoint.from_directory(saved)
            reported.set_metadata({"epochs": epoch + 1})
            print(f"epoch {epoch + 1}: accuracy {history['accuracy'][0]:.3f}", flush=True)
        ray.train.report({name: values[0] for name, values in history.items()}, checkpoint=reported)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True, help="a folder that all machines share")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    import ray.train
    import sklearn.datasets
    from ray.train.tensorflow import TensorflowTrainer

    storage = os.path.abspath(options.storage)
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    data = ray.data.from_items([{"x": row, "y": label} for row, label in zip(x, y, strict=True)])
    trainer = TensorflowTrainer(
        train,
        train_loop_config={"epochs": options.epochs, "storage": storage},
        datasets={"train": data},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers),
        run_config=ray.train.RunConfig(
            name="digits", storage_path=storage, failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    )
    figures = trainer.fit().metrics
    if figures is None:
        print("\nnothing was left to train")
    else:
        print(f"\nafter {options.epochs} epochs: {figures['accuracy']:.1%} are told apart")


if __name__ == "__main__":
    main()
