"""The code blocks of a page of the documentation, by the heading that they stand under."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ADDRESS = "127.0.0.1:3000"


def blocks_of(page: str) -> list[tuple[str, str, str]]:
    """Heading, language and text of each block of `docs/PAGE` that can be run."""
    found: list[tuple[str, str, str]] = []
    text = (REPOSITORY / "docs" / page).read_text()
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading = section.partition("\n")[0]
        for language, block in re.findall(r"^```(bash|python|js)\n(.*?)^```", section, re.DOTALL | re.M):
            found.append((heading, language, block))
    return found
