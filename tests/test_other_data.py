"""A run that goes on in the middle of an epoch with other batches than before says what it skips."""

import contextlib
import warnings

import pool
import pytest
from marks import sweep
from test_checkpoints import TARGETS, TOKENS, Interruption, compiled, make_strategy

import tfzero


def run(directory, strategy, *callbacks, samples=46, **arguments):
    """Four epochs, saved after every batch; gives the warnings and the samples that were trained in each epoch."""
    model = compiled(strategy)
    arguments = {"batch_size": 10, "epochs": 2, "verbose": 0, "shuffle": False} | arguments
    checkpoints = tfzero.CheckpointCallback(directory, save_every_steps=1, asynchronous=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(Interruption.Crash):
            model.fit(TOKENS[:samples], TARGETS[:samples], callbacks=[checkpoints, *callbacks], **arguments)
    return [str(each.message) for each in caught if "step-" in str(each.message)], checkpoints.step


MENDED = "Of this epoch the first 3 batches are skipped, as they are now, so samples may be left out or come twice."
CASES = {
    "batches of another size": ({"batch_size": 8}, "with 5 batches an epoch, now 6 and 10 samples a batch, now 8", 12),
    "fewer data": ({"samples": 38}, "with 5 batches an epoch, now 4", 8),
    "as many larger batches": ({"samples": 46, "batch_size": 11}, "with 10 samples a batch, now 11", 10),
    "too few data": ({"samples": 20}, "with 5 batches an epoch, now 2", 5),
    "the same": ({}, None, 10),
}


def check(directory, strategy, case):
    arguments, told, last = CASES[case]
    run(directory, strategy, Interruption(3))
    texts, step = run(directory, strategy, **arguments)
    return texts, step, told, last


DEFAULT = ("batches of another size", "too few data", "the same")


@pytest.mark.parametrize("case", [case if case in DEFAULT else sweep(case) for case in CASES])
def test_other_batches_in_the_middle_of_an_epoch_are_told(case, tmp_path):
    texts, step, told, last = check(tmp_path, make_strategy(), case)
    if told is None:
        assert texts == []
    else:
        (text,) = texts
        assert f"saved after 3 batches of an epoch, {told}. {MENDED}" in text
        assert text.endswith("It has only 2, so it ends without any.") == (case == "too few data")
    assert step == last


def test_between_epochs_nothing_is_skipped_and_nothing_told(tmp_path):
    strategy = make_strategy()
    run(tmp_path, strategy, epochs=1)
    texts, step = run(tmp_path, strategy, batch_size=8)
    assert texts == [] and step == 11


def _check_on_workers(folder, cases):
    strategy = tfzero.ZeroStrategy(min_shard_elements=8)
    return [check(f"{folder}/{case}", strategy, case)[:2] for case in cases]


@pytest.mark.parametrize("cases", [["too few data"], sweep(["fewer data", "too few data"])], ids=len)
def test_the_first_worker_tells(tmp_path, cases):
    first, second = pool.run(_check_on_workers, workers=2, args=(str(tmp_path), cases))
    assert [step for _, step in first] == [step for _, step in second] == [CASES[case][2] for case in cases]
    assert all(len(texts) == 1 and "batches are skipped" in texts[0] for texts, _ in first)
    assert all(texts == [] for texts, _ in second)
