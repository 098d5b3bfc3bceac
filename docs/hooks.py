"""What MkDocs does with pages before it makes them.

The public names are imported at first use (`tfzero/__init__.py`), which no reader of source can follow. So
`::: tfzero.NAME` on a page is led to the module that has it.
"""

import ast
import re
from pathlib import Path

_SOURCE = Path(__file__).parents[1] / "tfzero" / "__init__.py"


def homes() -> dict[str, str]:
    """The module of each public name."""
    for node in ast.parse(_SOURCE.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    raise LookupError(f"{_SOURCE} has no `_HOMES`, the table of public names.")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called for every page."""
    table = homes()
    return re.sub(
        r"^::: tfzero\.(\w+)$", lambda found: f"::: {table[found[1]]}.{found[1]}", markdown, flags=re.MULTILINE
    )
