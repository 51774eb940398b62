"""What the documents name is there: modules, files and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src" / "vllm_flying"
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FILES = re.compile(r"`((?:tests|docs|configs|bench|src|core|controller|frontend|worker|scheduler|loader)/[\w./-]*\w)`")
LINKS = re.compile(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)")


def test_every_module_has_its_line() -> None:
    named = (REPOSITORY / "docs" / "architecture.md").read_text().split("## Modules")[1]
    missing = []
    for file in PACKAGE.rglob("*.py"):
        module = file.relative_to(PACKAGE).with_suffix("")
        written = {f"`{module}`", f"`{module.parts[0]}/*`"} | ({f"`{module.name}`"} if module.parts[0] == "patches" else set())
        if not module.name.startswith("__") and not any(name in named for name in written):
            missing.append(str(module))
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_is_there(document: Path) -> None:
    text = document.read_text()
    for name in FILES.findall(text):
        places = [root / f"{name}{end}" for root in (REPOSITORY, PACKAGE) for end in ("", ".py", ".md")]
        assert any(place.exists() for place in places), name
    for link in LINKS.findall(text):
        assert (document.parent / link).exists(), link
