"""A training loop of one's own: two networks that compete. To learn here: `strategy.run` with a ZeroOptimizer.

    python -m tfzero.launch --workers 2 examples/custom_loop.py

A generator draws handwritten digits, a critic tells them from scikit-learn's. Each has an optimizer of its own, whose
slots lie in shards. Gradients are summed over replicas, so each loss is divided by the size of the global batch.
"""

import argparse

import keras
import numpy as np
import sklearn.datasets
import tensorflow as tf
from keras import layers

import tfzero

BATCH, NOISE = 64, 16


def make_network(inputs: int, outputs: int, activation: str | None) -> keras.Model:
    hidden = [layers.Dense(128, activation="leaky_relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs, activation=activation)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    images = (sklearn.datasets.load_digits().data / 16).astype("float32")
    # All workers read all batches in the same order, for which they need the same seed; each replica gets its rows.
    tf.random.set_seed(1)
    dataset = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images), seed=2).batch(BATCH, drop_remainder=True)
    batches = strategy.experimental_distribute_dataset(dataset)

    with strategy.scope():
        generator, critic = make_network(NOISE, 64, "sigmoid"), make_network(64, 1, None)
        optimizers = [tfzero.ZeroOptimizer(keras.optimizers.Adam(1e-3, beta_1=0.5)) for _ in range(2)]
        noise = keras.random.SeedGenerator(3)  # draws other numbers on each replica

    def losses(real):
        drawn = generator(keras.random.normal((tf.shape(real)[0], NOISE), seed=noise))
        of_real, of_drawn = critic(real), critic(drawn)
        fooled = tf.nn.softplus(-of_drawn)  # small if the critic takes it for real
        caught = tf.nn.softplus(-of_real) + tf.nn.softplus(of_drawn)
        return tf.reduce_sum(fooled) / BATCH, tf.reduce_sum(caught) / BATCH

    def replica_step(real):
        with tf.GradientTape(persistent=True) as tape:
            both = losses(real)
        for loss, model, optimizer in zip(both, (generator, critic), optimizers, strict=True):
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return both

    @tf.function
    def step(real):
        both = strategy.run(replica_step, args=(real,))
        return [strategy.reduce("SUM", loss, axis=None) for loss in both]

    for epoch in range(options.epochs):
        means = np.mean([[float(loss) for loss in step(real)] for real in batches], 0)
        if is_chief and epoch % 5 == 4:
            print(f"epoch {epoch + 1}: generator {means[0]:.3f}, critic {means[1]:.3f}", flush=True)

    drawn = generator(np.random.default_rng(0).normal(size=(1, NOISE)).astype("float32"))
    if is_chief:
        rows = np.asarray(drawn).reshape(8, 8)
        print("\n" + "\n".join("".join(" .:*#"[min(4, int(value * 5))] * 2 for value in row) for row in rows))


if __name__ == "__main__":
    main()
