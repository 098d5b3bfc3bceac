"""What tests share of running: which cases only `-m sweep` runs, and how long a fleet of workers may take."""

import pytest

FLEET_SECONDS = 600  # against hanging: several times what slow cores need with other tests beside it


def sweep(*values):
    """A case of `parametrize` that only `-m sweep` runs."""
    return pytest.param(*values, marks=pytest.mark.sweep)
