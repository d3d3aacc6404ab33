# SPDX-License-Identifier: Apache-2.0
"""What the repository's text must not say, and what every file of it must say."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPDX = "SPDX-License-Identifier: Apache-2.0"
# split, so that this file does not say what it looks for
REGISTRIES = ("pypi" + ".org", "python" + "hosted.org", "download.pytorch" + ".org", "registry.npmjs" + ".org",
              "conda.anaconda" + ".org", "files.pythonhosted" + ".org", "crates" + ".io", "ghcr" + ".io")  # fmt: skip
PRIVATE_PATHS = ("/wor" + "k/", "/ho" + "me/", "/ro" + "ot/", "/Use" + "rs/")
SHARED = "../" + "shared"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked() -> list[Path]:
    """Every file of the repository that is there, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def texts() -> dict[str, str]:
    found = {}
    for path in tracked():
        raw = path.read_bytes()
        if b"\0" not in raw:
            found[path.relative_to(ROOT).as_posix()] = raw.decode("utf-8")
    return found


@pytest.mark.parametrize("word", [*REGISTRIES, *PRIVATE_PATHS])
def test_no_file_names_a_registry_or_somebodys_own_folder(word: str) -> None:
    assert [name for name, text in texts().items() if word in text] == []


def test_the_folder_with_shared_data_is_known_to_the_makefile_alone() -> None:
    assert [name for name, text in texts().items() if SHARED in text] in ([], ["Makefile"])


def test_every_python_file_says_its_licence_on_top() -> None:
    missing = [
        name
        for name, text in texts().items()
        if name.endswith(".py") and SPDX not in "".join(text.splitlines(keepends=True)[:2])
    ]
    assert missing == []


def test_every_module_of_the_product_begins_with_its_docstring() -> None:
    tops = ("agent/", "sdk/", "converters/", "device_profiles/")
    missing = [
        name
        for name, text in texts().items()
        if name.endswith(".py") and name.startswith(tops) and not re.match(rf"# {SPDX}\nr?\"\"\"", text)
    ]
    assert missing == []


def test_every_link_in_the_docs_leads_somewhere() -> None:
    broken = []
    for name, text in texts().items():
        if not name.endswith(".md"):
            continue
        for link in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)):
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{name}: {link}")
    assert broken == []


def _anchors(path: Path) -> set[str]:
    """The anchors that a forge gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_the_docs_stands_in_their_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in sorted(pages) if page != "README.md" and f"({page})" not in index] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "adr").glob("*.md")), ids=lambda path: path.stem)
def test_a_decision_says_what_why_and_what_follows_in_few_lines(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    for heading in ("## Context", "## Decision", "## Consequences"):
        assert heading in text
