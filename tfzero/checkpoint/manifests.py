"""Checks manifests. A manifest comes from a file, so nothing in it is trusted before it is checked.

The manifest of a checkpoint, as JSON:

    format, step, world_size   integers
    stage                      of the strategy; null for plain Keras
    files                      name to `[bytes, checksum]`
    variables                  list of `{"name", "shape", "dtype", "replicas"}`, and "copies" of what each worker has
    optimizers, bucket_bytes   by the model's attribute that holds the optimizer
    position                   the position in the data, or null (`checkpoint/callback.py`)
    servers                    for each parameter server, `{"done", "pushed", "layout", "scalars"}`; or null
"""

import re
from collections.abc import Callable
from typing import Any

from tfzero.plan.scheme import STAGES

MOST_BYTES = 2**28  # of a manifest; one with 100,000 variables has 2**24
_MOST = 2**53
_MOST_REPLICAS = 2**20
_INDEX = "state.index"
_FILE = re.compile(r"state\.index|state\.data-\d{5,8}-of-\d{5,8}|checkpoint")

Check = Callable[[Any], bool]


def _is_count(value: Any, least: int = 0, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_text(value[1])


def _is_table(value: Any, is_key: Check, is_value: Check) -> bool:
    return isinstance(value, dict) and all(is_key(key) and is_value(each) for key, each in value.items())


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 254 and all(map(_is_count, value))


def _is_randomness(value: Any) -> bool:
    """Whether a value is a state that `random.setstate` accepts (`runtime.random_state`)."""
    if not isinstance(value, dict) or not _or_none(lambda seed: type(seed) is int)(value.get("seed", "")):
        return False
    state = value.get("python")
    if not (isinstance(state, list) and len(state) == 3 and isinstance(state[1], list) and len(state[1]) == 625):
        return False
    version, words, gauss = state
    are_words = all(_is_count(word, most=2**32 - 1) for word in words) and words[-1] <= 624
    return version == 3 and are_words and (gauss is None or type(gauss) is float)


def _is_of_server(value: Any) -> bool:
    """Whether a value says which steps a parameter server has (`Flight` in `servers/models.py`), and its layout."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in ("done", "pushed")):
        return False
    are_three = all(isinstance(each, list) and len(each) == 3 and all(map(_is_count, each)) for each in value["pushed"])
    of_worker = are_three and all(each[1] < len(value["done"]) for each in value["pushed"])
    are_counts = value["done"] != [] and all(map(_is_count, value["done"]))
    return of_worker and are_counts and _is_text(value.get("layout")) and _are_scalars(value.get("scalars"), depth=3)


def _are_scalars(value: Any, depth: int) -> bool:
    """Whether a value is a list of lists, so deep, of numbers."""
    if not depth:
        return type(value) in (int, float)
    return isinstance(value, list) and all(_are_scalars(each, depth - 1) for each in value)


_VARIABLE: dict[str, Check] = {
    "name": lambda value: _is_text(value) and value != "",
    "shape": _is_shape,
    "dtype": _is_text,
    "replicas": _or_none(lambda value: _is_count(value, 1, _MOST_REPLICAS)),
    "copies": _or_none(lambda value: _is_count(value, 1, _MOST_REPLICAS)),
}
_POSITION: dict[str, Check] = {
    "epoch": _is_count,
    "batch": _is_count,
    "epoch_batches": _is_count,
    "first_epoch": _or_none(_is_count),
    "finished": _or_none(_is_count),
    "randomness": _or_none(_is_randomness),
    "passes": _or_none(lambda value: isinstance(value, list) and all(map(_is_count, value))),
    "steps": _or_none(_is_count),
    "batch_size": _or_none(_is_count),
    "epoch_steps": _or_none(lambda value: isinstance(value, list) and all(map(_is_count, value))),
}
_WHOLE: dict[str, Check] = {
    "step": _is_count,
    "world_size": lambda value: _is_count(value, 1, _MOST_REPLICAS),
    "stage": _or_none(lambda value: _is_count(value, STAGES[0], STAGES[-1])),
    "files": lambda value: (
        _is_table(value, lambda name: _FILE.fullmatch(name) is not None, _is_pair) and _INDEX in value
    ),
    "variables": lambda value: isinstance(value, list),
    "optimizers": lambda value: _is_table(value, _is_text, _is_text),
    "bucket_bytes": lambda value: _is_table(value, _is_text, lambda size: _is_count(size, 1)),
    "position": _or_none(lambda value: isinstance(value, dict)),
    "servers": _or_none(lambda value: isinstance(value, list) and all(map(_is_of_server, value)) and value != []),
}
# Keys that older versions of tfzero did not write.
_LATER = {"copies", "bucket_bytes", "passes", "steps", "batch_size", "epoch_steps", "servers"}


def _fault_of(value: Any, checks: dict[str, Check], where: str) -> str:
    if not isinstance(value, dict):
        return f"{where or 'it'} is {_short(value)}"
    for key, check in checks.items():
        if key not in value:
            if key not in _LATER:
                return f"{where}{key!r} is missing"
        elif not check(value[key]):
            return f"{where}{key!r} is {_short(value[key])}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def find_fault(content: Any) -> str:
    """What is wrong with the content of a manifest of this format; "" if nothing is."""
    if fault := _fault_of(content, _WHOLE, ""):
        return fault
    names = set()
    for index, variable in enumerate(content["variables"]):
        if fault := _fault_of(variable, _VARIABLE, f"variable {index}: "):
            return fault
        if variable["replicas"] not in (None, content["world_size"]):
            return f"{variable['name']!r} is of {variable['replicas']} replicas, not of {content['world_size']}"
        names.add(variable["name"])
    if len(names) != len(content["variables"]):
        return "two variables have one name"
    if len({len(each["done"]) for each in content.get("servers") or []}) > 1:
        return "its servers know other numbers of workers"
    return "" if content["position"] is None else _fault_of_position(content["position"], content["step"])


def _fault_of_position(position: Any, step: int) -> str:
    if fault := _fault_of(position, _POSITION, "position: "):
        return fault
    steps = position.get("epoch_steps") or []
    if steps != sorted(steps) or (steps and steps[-1] > step):
        return f"position: epochs that begin after the steps {_short(steps)} cannot be reached in {step} steps"
    begun = position["epoch"] - (position["first_epoch"] or 0)
    if not 0 <= begun <= step or max(position["batch"], position["epoch_batches"]) > step:
        place = ", ".join(f"{key} {position[key]}" for key in ("first_epoch", "epoch", "epoch_batches", "batch"))
        return f"position: {place} cannot be reached in {step} steps"
    return ""
