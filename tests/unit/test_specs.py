"""Every requirement in specs/ is cited by a test, and every citation names a requirement."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def found(pattern: str, files: str) -> list[str]:
    texts = [path.read_text("utf-8") for path in sorted(ROOT.glob(files))]
    return [match for text in texts for match in re.findall(pattern, text, re.MULTILINE)]


REQUIRED = found(r"^- \*\*([A-Z]+-\d+)\*\* ", "specs/*/spec.md")
CITED = found(r'^@pytest\.mark\.spec\("([A-Z]+-\d+)"\)$', "tests/**/test_*.py")


def in_order(ids: set[str]) -> list[str]:
    return sorted(ids, key=lambda name: (name.partition("-")[0], int(name.partition("-")[2])))


def test_there_are_requirements_and_citations() -> None:
    assert REQUIRED
    assert CITED


def test_every_requirement_is_cited_by_a_test() -> None:
    assert in_order(set(REQUIRED) - set(CITED)) == []


def test_every_citation_names_a_requirement() -> None:
    assert in_order(set(CITED) - set(REQUIRED)) == []


def test_no_two_requirements_have_one_id() -> None:
    assert [name for name, count in Counter(REQUIRED).items() if count > 1] == []


def test_every_line_that_looks_like_a_requirement_is_one() -> None:
    assert len(found(r"^[ \t]*[-*] +\*\*[A-Za-z]+-?\d+", "specs/*/spec.md")) == len(REQUIRED)


def test_every_citation_is_written_so_that_it_is_found() -> None:
    assert len(found(r"^[ \t]*@?pytest\.mark\.spec\(", "tests/**/*.py")) == len(CITED)


def test_the_index_names_every_specification() -> None:
    index = (ROOT / "specs" / "README.md").read_text("utf-8")
    linked = set(re.findall(r"\]\(([^)]+/spec\.md)\)", index))
    assert linked == {
        path.relative_to(ROOT / "specs").as_posix() for path in ROOT.glob("specs/*/spec.md")
    }
