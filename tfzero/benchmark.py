"""Step time, memory and traffic of a GPT (`python -m tfzero.benchmark`), from a checkout only: see `benchmarks/gpt.py`.

The models that it trains, and PyTorch's beside them, are not part of the installed package.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line of `benchmarks/gpt.py`. Returns 0; without a checkout, says where it is and returns 2."""
    folder = CHECKOUT / "benchmarks"
    if not (folder / "gpt.py").is_file():
        print(
            "tfzero.benchmark: the benchmark is no part of the installed package: run `python -m tfzero.benchmark` "
            f"from a checkout of tfzero's repository, which has benchmarks/gpt.py (not found: {folder / 'gpt.py'}).",
            file=sys.stderr,
        )
        return 2
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # workers get it too: `run_local` passes it on
    importlib.import_module("gpt").main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
