"""A language model of KerasHub learns a grammar with LoRA. To learn here: frozen parameters in shards, `generate`.

    python -m tfzero.launch --workers 2 examples/lora.py

Parameters start from random numbers, so that nothing is downloaded; `from_preset` under the scope takes pretrained
ones. Only the LoRA pairs and biases of the attention train, so only they have slots. All other parameters lie in shards
as well. Needs `pip install -e ".[hub]"`.
"""

import argparse

import keras
import keras_hub
import numpy as np

import tfzero

WORDS = ["<end>", "the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "old", "small", "."]
LENGTH = 12


def sentence(random: np.random.Generator) -> list:
    """A subject, a verb, an object: "the old cat sees a bird ."."""

    def noun() -> list:
        return [random.choice(["the", "a"]), *random.choice(["old", "small"], random.integers(2)),
                random.choice(["cat", "dog", "bird"])]  # fmt: skip

    return [*noun(), random.choice(["sees", "hears", "likes"]), *noun(), "."]


def tokens_of(sentences: list) -> dict:
    """Token ids and padding mask `[sentences, LENGTH]`."""
    ids = np.zeros((len(sentences), LENGTH), "int32")
    for row, words in enumerate(sentences):
        ids[row, : len(words)] = [WORDS.index(word) for word in words]
    return {"token_ids": ids, "padding_mask": (ids != 0).astype("int32")}


def make_model() -> keras.Model:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(WORDS), num_layers=2, num_heads=4, hidden_dim=64, intermediate_dim=128, dropout=0.0,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    backbone.enable_lora(rank=8)
    return keras_hub.models.GPT2CausalLM(backbone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    strategy = tfzero.ZeroStrategy(stage=3)  # before anything else of TensorFlow
    is_chief = strategy.cluster_resolver is None or strategy.cluster_resolver.task_id == 0
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    tokens = tokens_of([sentence(random) for _ in range(512)])
    targets = np.pad(tokens["token_ids"][:, 1:], ((0, 0), (0, 1)))
    weights = tokens["padding_mask"].astype("float32")
    with strategy.scope():
        model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(2e-2), loss, weighted_metrics=["accuracy"], sampler="greedy")
    arguments = {"batch_size": 32, "epochs": options.epochs, "shuffle": False, "verbose": 2 if is_chief else 0}
    model.fit(tokens, targets, sample_weight=weights, **arguments)

    prompts = tokens_of([["the"], ["a", "small"], ["the", "old", "dog"], ["a", "bird", "hears"]])
    with strategy.gathered(model.variables):  # once, not for every token
        written = model.generate(prompts, stop_token_ids=None)["token_ids"]
    if is_chief:
        trained = strategy.report().variables
        print(f"\n{model.count_params():,} parameters, of which {sum(np.prod(v.shape) for v in trained):,} train")
        print(tfzero.estimate_memory(model, model.optimizer, world_size=strategy.num_replicas_in_sync))
        for row in np.array(written):
            print("it writes:", " ".join(WORDS[token] for token in row).partition(" <end>")[0])


if __name__ == "__main__":
    main()
