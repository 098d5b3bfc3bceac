"""What tests share of running: which cases only `-m sweep` runs, and how long a fleet of workers may take."""

import keras
import pytest

from tfzero.host import versions

FLEET_SECONDS = 600  # against hanging: several times what slow cores need with other tests beside it


def sweep(*values):
    """A case of `parametrize` that only `-m sweep` runs."""
    return pytest.param(*values, marks=pytest.mark.sweep)


def since_keras(version):
    """Marks a test, or a case, of what Keras has since a version, such as "3.15"."""
    return pytest.mark.skipif(not versions.is_between("keras", version, ""), reason=f"Keras has it since {version}")


def muon_or_lamb(rate):
    """Muon; Lamb, which needs the whole tensor too, where plain Keras cannot train with Muon on TensorFlow."""
    optimizers = keras.optimizers
    return (optimizers.Muon if versions.is_between("keras", "3.13", "") else optimizers.Lamb)(rate)
