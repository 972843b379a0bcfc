"""What the docs name is there: files, headings, config keys."""

import re
from pathlib import Path

import pytest

from config import RELEASED_KEYS, get_default_config, leaves
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEYS = {*leaves(get_default_config()), *RELEASED_KEYS}
SECTIONS = {key[:end] for key in KEYS for end in range(len(key)) if key[end] == "."}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_keys(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{page.name}: {link}"
    for key in re.findall(r"`((?:DATA|MODEL|TRAIN|AUG|TEST|DETECTION)\.[A-Z_.]*[A-Z])\b", text):
        assert key in KEYS or key in SECTIONS, f"{page.name}: {key}"
