"""The documents say what is there: links, settings, tags, modules, code; their marks are whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagster_taskiq import tags, taskiq_executor
from dagster_taskiq.config.schema import EXECUTOR_SCHEMA
from dagster_taskiq_tests.settings_tables import written
from dagster_taskiq_tests.unit.test_imports import PACKAGE

ROOT = PACKAGE.parent

DOCUMENTS = sorted(
    it for folder in (".", "docs", "benchmarks", "example") for it in ROOT.glob(f"{folder}/*.md")
)

README = (ROOT / "README.md").read_text(encoding="utf8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf8")

#: Tags that we read for what they mean in dagster-celery or Dagster, or write for ourselves.
NOT_FOR_PEOPLE = {tags.TASK_ID_TAG, tags.DAGSTER_PRIORITY_TAG}


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf8"), flags=re.DOTALL)
        for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
            if "://" not in target:
                yield document, target


def text_of(document: Path) -> str:
    """Without blocks of code."""
    text = document.read_text(encoding="utf8")
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_and_marks_are_whole(document: Path) -> None:
    """What two merged texts leave of a row or a paragraph is rarely so."""
    for paragraph in re.split(r"\n{2,}", text_of(document)):
        assert paragraph.count("`") % 2 == 0, paragraph
        plain = re.sub(r"`[^`]*`", "", paragraph)
        assert plain.count("**") % 2 == 0, paragraph
        rows = re.findall(r"^ *\|.*", plain, re.MULTILINE)
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, paragraph


def test_a_promise_begins_its_paragraph_and_stands_once() -> None:
    """Nor does a row of the table of modules say a thing twice."""
    text = text_of(ROOT / "ARCHITECTURE.md")
    promises = re.findall(r"\*\*[A-Z].*?\*\*", text, re.DOTALL)
    assert len(promises) == len(set(promises))
    assert promises == re.findall(r"(?<=\n\n)\*\*[A-Z].*?\*\*", text, re.DOTALL)
    for row in re.findall(r"^\|.*", text, re.MULTILINE):
        parts = [it.strip() for it in row.split(";") if " " in it.strip()]
        assert len(parts) == len(set(parts)), row


@pytest.mark.parametrize(("document", "target"), list(links()), ids=lambda it: Path(str(it)).name)
def test_a_link_leads_somewhere(document: Path, target: str) -> None:
    """To a file of the repository, and to a heading in it where it names one."""
    path, _, anchor = target.partition("#")
    file = (document.parent / path).resolve() if path else document
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", it).lower().replace(" ", "-") for it in headings}


def test_the_readmes_tables_of_settings_are_those_of_the_code() -> None:
    """``python -m dagster_taskiq_tests.settings_tables`` writes them."""
    assert written(README) == README


def test_every_tag_is_in_the_readme() -> None:
    """Ours in full, dagster-celery's at least by its last part."""
    names = {value for key, value in vars(tags).items() if key.endswith("_TAG")} - NOT_FOR_PEOPLE
    missing = {
        name
        for name in names
        if f"`{name}`" not in README and f"`/{name.partition('/')[2]}`" not in README
    }
    assert missing == set()


def test_every_module_is_in_the_architecture() -> None:
    """By its name, so that a reader finds the room."""
    modules = {
        path.stem if path.stem != "__init__" else path.parent.name
        for path in PACKAGE.rglob("*.py")
        if "demo" not in path.parts and path.name not in ("__main__.py",)
    } - {"dagster_taskiq"}
    missing = {
        name for name in modules if not re.search(rf"`(\w+/)?{name}(/|\.py)?`", ARCHITECTURE)
    }
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_in_the_documents_can_be_read(document: Path) -> None:
    """Python compiles, and settings are ones that exist."""
    text = document.read_text(encoding="utf8")
    for language, code in re.findall(r"^ *```(python|yaml)\n(.*?)^ *```", text, re.DOTALL | re.M):
        if language == "python":
            ast.parse(code)
        else:
            execution = (yaml.safe_load(code) or {}).get("execution", {})
            config = dict.fromkeys(execution.get("config", {}), "x")
            assert set(config) <= set(EXECUTOR_SCHEMA)


def test_the_first_job_of_the_readme_runs() -> None:
    """It is a whole file, as a newcomer copies it."""
    (code,) = (
        it for it in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "my_jobs" in it
    )
    names: dict[str, Any] = {"__name__": "my_jobs"}
    exec(compile(code, "my_jobs.py", "exec"), names)
    assert names["defs"].resolve_job_def("my_job").executor_def is taskiq_executor
    assert names["my_job"].execute_in_process().output_for_node("double") == 2
