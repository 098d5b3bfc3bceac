"""KerasHub: a causal language model with LoRA, trained at stage 3, writes what one device writes."""

import contextlib

import keras
import numpy as np
import pool
import pytest

import tfzero

pytestmark = pytest.mark.peers
VOCABULARY, LENGTH, PROMPT = 64, 16, 5


def make_model() -> keras.Model:
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=2, num_heads=4, hidden_dim=64, intermediate_dim=128, dropout=0.0,
        max_sequence_length=LENGTH,
    )  # fmt: skip
    backbone.enable_lora(4)
    return keras_hub.models.GPT2CausalLM(backbone)


def train_and_write(strategy, initial=None) -> dict:
    """Trains, writes, trains again and writes again: in `gathered` and token by token."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (44, LENGTH + 1)).astype("int32")
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((44, LENGTH), "int32")}
    mask = np.tile(np.arange(LENGTH) < PROMPT, (3, 1))
    prompts = {"token_ids": tokens[:3, :LENGTH] * mask, "padding_mask": mask.astype("int32")}
    keras.utils.set_random_seed(3)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make_model()
    if initial is not None:
        model.set_weights(initial)
    result = {"initial": model.get_weights(), "written": [], "history": []}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    no_xla = {} if strategy else {"jit_compile": False}
    model.compile(keras.optimizers.Adam(1e-2), loss, weighted_metrics=["accuracy"], sampler="greedy", **no_xla)
    for _ in range(2):
        history = model.fit(x, tokens[:, 1:], batch_size=8, epochs=2, verbose=0, shuffle=False).history
        result["history"].append(history["loss"] + history["accuracy"])
        with strategy.gathered(model.variables) if strategy else contextlib.nullcontext():
            result["written"].append(np.array(model.generate(prompts, stop_token_ids=None)["token_ids"]))
    model.generate_function = None
    result["written"].append(np.array(model.generate(prompts, stop_token_ids=None)["token_ids"]))
    result["weights"] = model.get_weights()
    result["trained"] = sum(v.shape.num_elements() for v in model.trainable_variables)
    result["parameters"] = model.count_params()
    if strategy:
        result["slots"] = sum(v.slot_bytes for v in strategy.report().variables)
        result["estimate"] = tfzero.estimate_memory(model, model.optimizer, world_size=2, stage=3)
        result["held"] = sum(np.prod(v.value.values[0].shape) * 4 for v in model.variables)
    return result


def train_in_worker() -> dict:
    return train_and_write(tfzero.ZeroStrategy(stage=3))


@pytest.fixture(scope="module")
def one_device_and_workers():
    workers = pool.run(train_in_worker)
    return train_and_write(None, workers[0]["initial"]), workers


def test_weights_and_text_are_those_of_one_device(one_device_and_workers):
    reference, workers = one_device_and_workers
    assert any(np.any(a != b) for a, b in zip(reference["weights"], reference["initial"], strict=True))
    assert np.any(reference["written"][0] != reference["written"][1])  # it has learnt between
    for ours in workers:
        for mine, theirs in zip(ours["weights"], reference["weights"], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(ours["history"], reference["history"], rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(ours["written"], reference["written"])


def test_only_lora_has_slots_and_frozen_parameters_lie_in_shards(one_device_and_workers):
    """In bytes: Adam's two slots for what is trained, and about half of all parameters."""
    for ours in one_device_and_workers[1]:
        assert ours["trained"] < 0.1 * ours["parameters"]
        assert 4 * ours["trained"] <= ours["slots"] <= 8 * ours["trained"]  # some are too small for shards
        assert ours["held"] == ours["estimate"].parameter_bytes < 0.55 * 4 * ours["parameters"]
        assert ours["slots"] == ours["estimate"].slot_bytes
