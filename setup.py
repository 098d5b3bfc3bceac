"""What `pyproject.toml` cannot say: README.md as a package index shows it, which has no files that it could link to."""

import re
from pathlib import Path

from setuptools import setup


def without_relative_links(text: str) -> str:
    """Markdown whose links into the repository are their text alone."""
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    long_description=without_relative_links(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
