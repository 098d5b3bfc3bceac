"""The sentence in errors that says which worker has what."""

import json
from collections.abc import Callable, Sequence
from typing import Any

MOST_SHOWN = 8  # differences in one sentence
_MOST_CHARACTERS = 200  # of one value in it


def differences_of(values: Sequence[Any], name: Callable[[list[int]], str]) -> str:
    """Says who has what, or "" if all values are equal. For dicts it shows only the keys that differ.

    Args:
        values: JSON values of the workers, in rank order.
        name: names workers by their indexes, as "workers 0, 2".
    """
    values = [json.loads(json.dumps(value, sort_keys=True)) for value in values]  # equal dicts look equal
    table = {"": [repr(value) for value in values]}
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        table = {f"{key} is ": [repr(v[key]) if key in v else "missing" for v in values] for key in keys}
    parts = []
    for label, row in table.items():
        holders = {text: [index for index, other in enumerate(row) if other == text] for text in row}
        shown = [
            f"{text} on {name(which)}" for text, which in zip(_shortened(list(holders)), holders.values(), strict=True)
        ]
        if len(holders) > 1:
            parts.append(f"{label}{', '.join(shown[:-1])} and {shown[-1]}")
    more = f"; and {len(parts) - MOST_SHOWN} more" if len(parts) > MOST_SHOWN else ""
    return "; ".join(parts[:MOST_SHOWN]) + more


def _shortened(texts: list[str]) -> list[str]:
    """Cuts long texts, so that they begin shortly before the first character that differs."""
    shortest = min(map(len, texts))
    same = next((k for k in range(shortest) if len({text[k] for text in texts}) > 1), shortest)
    begin = max(0, same - _MOST_CHARACTERS // 2) if max(map(len, texts)) > _MOST_CHARACTERS else 0
    return [("..." if begin else "") + text[begin : begin + _MOST_CHARACTERS] for text in texts]
