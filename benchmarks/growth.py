"""How the time outside compute grows with the number of replicas: logical CPU devices of one process.

    python benchmarks/growth.py --replicas 2 4 8 --stages 2 3

A step of N replicas, less N gradients taken at once without any exchange, beside the bytes that all replicas send
together: 2(N-1) times the parameters, 3(N-1) at stage 3. Each N has a process of its own; rounds go by turns.
"""

import argparse
import statistics
import time

import tfzero

WIDTH, LAYERS, ROWS = 1024, 8, 4  # rows of each replica
WARM_UP = 3


def seconds_of_a_step(replicas: int, stage: int, steps: int) -> tuple[float, float]:
    """Medians of a whole step and of its gradients alone, in a process with so many devices."""
    import keras
    import tensorflow as tf

    strategy = tfzero.ZeroStrategy(stage)
    assert strategy.num_replicas_in_sync == replicas

    def make():
        layers = [keras.layers.Dense(WIDTH, use_bias=False, activation="relu") for _ in range(LAYERS)]
        return keras.Sequential([keras.Input((WIDTH,)), *layers])

    with strategy.scope():
        model = make()
    model.compile("adam", "mse")
    x = tf.random.normal([ROWS * replicas, WIDTH])
    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors((x, x)).repeat())
    batch = next(iter(data))
    plain = [make() for _ in range(replicas)]
    shares = [x[ROWS * k : ROWS * (k + 1)] for k in range(replicas)]

    @tf.function
    def step():
        return strategy.experimental_local_results(strategy.run(model.train_step, args=(batch,)))[0]["loss"]

    @tf.function
    def gradients():
        parts = []
        for k, (network, rows) in enumerate(zip(plain, shares, strict=True)):
            with tf.device(f"CPU:{k}"), tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(network(rows) - rows))
            with tf.device(f"CPU:{k}"):
                parts += [tf.reduce_sum(g[:1]) for g in tape.gradient(loss, network.trainable_variables)]
        return tf.add_n(parts)

    seconds: dict = {step: [], gradients: []}
    for _ in range(steps + WARM_UP):
        for function, taken in seconds.items():
            start = time.perf_counter()
            function().numpy()
            taken.append(time.perf_counter() - start)
    return tuple(statistics.median(taken[WARM_UP:]) for taken in seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    for stage in options.stages:
        outside: dict = {replicas: [] for replicas in options.replicas}
        for _ in range(options.rounds):
            for replicas, found in outside.items():
                [(whole, compute)] = tfzero.run_local(
                    seconds_of_a_step,
                    workers=1,
                    cpu_devices=replicas,
                    args=(replicas, stage, options.steps),
                    timeout_seconds=300,
                )
                found.append((whole - compute, whole))
        first = options.replicas[0]
        base = statistics.median(rest for rest, _ in outside[first])
        for replicas, found in outside.items():
            rest = statistics.median(rest for rest, _ in found)
            whole = statistics.median(whole for _, whole in found)
            print(
                f"stage {stage}, {replicas} replicas: step {whole * 1e3:.0f} ms, outside compute {rest * 1e3:.0f} ms, "
                f"{rest / base:.2f} times that of {first}; bytes {(replicas - 1) / (first - 1):.2f} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
