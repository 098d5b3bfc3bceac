"""What local steps do to the result, and what they send, beside synchronous training.

    python benchmarks/local_steps.py quality            # a character model on text; 2 and 4 workers, three seeds
    sudo python benchmarks/local_steps.py cable         # a GPT of 57 M between two networks joined by 100 Mbit/s

`quality` is the validation loss of the character model of `quality.py` after the same number of samples. Synchronous
training is that of one device, whatever the number of workers.

`cable` needs root, `ip` and `tc` (Linux). It takes the mean time of the steps of whole windows, merges included, and
counts what TCP brings the first worker in a step. Synchronous int8 and local steps take turns.
"""

import argparse
import json
import statistics
import time

import tfzero

EVERY = 20
WARM_UP = 100  # synchronous steps
MODES: dict[str, dict] = {
    "DiLoCo": {"sync_every": EVERY},
    "DiLoCo int8": {"sync_every": EVERY, "compression": "int8", "error_feedback": True},
    "average": {"sync_every": EVERY, "outer_optimizer": "average"},
    "DiLoCo warm": {"sync_every": EVERY, "sync_warmup": WARM_UP},
    "average warm": {"sync_every": EVERY, "outer_optimizer": "average", "sync_warmup": WARM_UP},
}
CONTESTANTS: dict[str, dict] = {
    "stage 0": {"stage": 0},
    "stage 2 int8": {"stage": 2, "compression": "int8"},
    "DiLoCo": {"stage": 2, **MODES["DiLoCo"]},
    "DiLoCo int8": {"stage": 2, **MODES["DiLoCo int8"]},
}


def loss_of(settings: dict, seed: int, steps: int) -> tuple[float, float | None]:
    """The validation loss of a training in this process and the other workers', and the last merge's cosine."""
    import keras
    from quality import characters

    from tfzero.training.local_steps import local_steps_of

    strategy = tfzero.ZeroStrategy(2, **settings)
    train, held_out, make, batch = characters(seed, steps)
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        model = make()
    rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*train, batch_size=batch, shuffle=False, verbose=0)
    loss = model.evaluate(*held_out, batch_size=200, verbose=0)
    latest = local_steps_of(model, strategy).latest
    return loss, None if latest is None else latest.cosine


def quality(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        ((plain, _),) = tfzero.run_local(loss_of, 1, args=({}, seed, options.steps), timeout_seconds=3600)
        print(json.dumps({"seed": seed, "mode": "synchronous", "loss": plain}), flush=True)
        for workers in options.workers:
            for mode in options.modes:
                fleet = tfzero.run_local(
                    loss_of, workers, args=(MODES[mode], seed, options.steps), timeout_seconds=3600
                )
                loss, cosine = fleet[0]
                row = {"seed": seed, "workers": workers, "mode": mode, "loss": loss, "cosine": cosine}
                print(json.dumps({**row, "change_percent": round(100 * (loss / plain - 1), 2)}), flush=True)


def measure(contestant: str) -> dict:
    """Mean seconds of a step of one whole window, or of a few synchronous steps, and bytes received in a step."""
    import keras
    import numpy as np
    import tensorflow as tf
    from gpt_worker import LENGTH, VOCABULARY, Work, make_model, received_bytes

    tf.config.threading.set_inter_op_parallelism_threads(2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    settings = CONTESTANTS[contestant]
    strategy = tfzero.ZeroStrategy(timeout_seconds=600, **settings)
    with strategy.scope():
        model = make_model(Work())
    window = settings.get("sync_every", 4)
    rows = strategy.num_replicas_in_sync
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2 * window * rows, LENGTH + 1)).astype("int32")
    marks: list = []

    def mark(batch, logs):
        if batch + 1 in (window, 2 * window):
            marks.append((time.perf_counter(), received_bytes()))

    note = keras.callbacks.LambdaCallback(on_train_batch_end=mark)
    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=rows, shuffle=False, verbose=0, callbacks=[note])
    (start, before), (end, after) = marks
    formula = strategy.report().sent_bytes
    return {"seconds": (end - start) / window, "bytes": (after - before) / window, "formula": formula}


def cable(options: argparse.Namespace) -> None:
    from slow_network import told_by_first

    found: dict = {name: [] for name in options.contestants}
    for _ in range(options.rounds):
        for name, figures in found.items():
            figures.append(told_by_first(options.mbit, [__file__, "worker", name], timeout_seconds=1200))
            print(json.dumps({"contestant": name, **figures[-1]}), flush=True)
    seconds = {name: statistics.median(each["seconds"] for each in figures) for name, figures in found.items()}
    for name, median in seconds.items():
        ratio = seconds["stage 2 int8"] / median if "stage 2 int8" in seconds else float("nan")
        received = statistics.median(each["bytes"] for each in found[name])
        told = (
            f"{1000 * median:.0f} ms a step, {ratio:.2f} times as fast as stage 2 int8; {received / 1e6:.2f} MB a step"
        )
        print(f"{options.mbit} Mbit/s, {name}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_quality = parts.add_parser("quality")
    of_quality.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    of_quality.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    of_quality.add_argument("--steps", type=int, default=1000)
    of_quality.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    of_cable = parts.add_parser("cable")
    of_cable.add_argument("--mbit", type=int, default=100)
    of_cable.add_argument("--rounds", type=int, default=3)
    of_cable.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS)[1:])
    of_worker = parts.add_parser("worker")
    of_worker.add_argument("contestant", choices=CONTESTANTS)
    options = parser.parse_args()
    if options.part == "worker":
        print(json.dumps(measure(options.contestant)))
    else:
        {"quality": quality, "cable": cable}[options.part](options)


if __name__ == "__main__":
    main()
