"""Which cases of a test only `-m sweep` runs."""

import pytest


def sweep(*values):
    """A case of `parametrize` that only `-m sweep` runs."""
    return pytest.param(*values, marks=pytest.mark.sweep)
