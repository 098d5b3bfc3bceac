"""What Python runs first in every process that a test starts, as `conftest.py` puts this folder on its path.

Keras imports scikit-learn, pandas and matplotlib where it finds them, for wrappers that no worker uses: more than
one of the four seconds that a worker takes to start. So they are not found, but by Keras only.

`TFZERO_TEST_WITHOUT` names a patch of Keras that shall be missing, to see a test fail without it (`test_patches.py`).
"""

import os
import sys

OPTIONAL = {"matplotlib", "pandas", "sklearn"}


class NotForKeras:
    """A finder that refuses what Keras can do without."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in OPTIONAL:
            frame = sys._getframe(1)
            while frame.f_globals.get("__name__", "").startswith("importlib."):
                frame = frame.f_back
            if frame.f_globals.get("__name__", "").startswith("keras."):
                raise ModuleNotFoundError(f"{name} is left out for Keras in tests", name=name)


sys.meta_path.insert(0, NotForKeras)

if without := os.environ.get("TFZERO_TEST_WITHOUT"):
    from tfzero.host import patches

    all_rows = patches.registry
    patches.registry = lambda: tuple(row for row in all_rows() if row.target != without)
