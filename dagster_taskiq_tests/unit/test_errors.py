"""One tree of errors: complete, drawn as it is, and all that the package raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from dagster_taskiq import errors
from dagster_taskiq_tests.unit.test_imports import TREES

TREE = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.DagsterTaskiqError)
}

#: What else is raised, by module or room, and why it is none of the tree.
OTHERS: Mapping[str, set[str]] = {
    "": {"AttributeError", "ImportError"},  # Python's own protocol of modules
    # ``amqp_errors`` makes a ServerError of these, as of all that the client library raises
    "brokers.amqp_connection": {
        "exceptions.ChannelNotFoundEntity",
        "exceptions.ConnectionNotAllowed",
    },
    "cli": {
        "argparse.ArgumentTypeError",
        "click.BadParameter",
        "click.ClickException",
        "click.UsageError",
    },
    "config.parsers": {"TypeError"},  # caught in the same function
    "dashboard.web": {"HTTPException"},  # Starlette answers with it
    "demo.jobs": {"ConnectionError"},  # a step of the demo fails
    "stack.signals": {"Interrupted"},  # a BaseException, as KeyboardInterrupt is
    "execution.storage_connections": {"DisconnectionError"},  # SQLAlchemy tries another connection
    "execution.storage_patience": {"AssertionError"},  # cannot be reached
    "loop.core_execution_loop": {"DagsterExecutionInterruptedError"},  # Dagster ends the run
    "messages": {"TypeError", "ValueError"},  # of parsing
    "servers.embedded.keeper": {"TimeoutError"},  # a process that knows nothing of the package
    "worker.child_messages": {"ValueError"},  # of parsing
    "worker.frames": {"ValueError"},  # of parsing
    "worker.receiver": {"TypeError"},  # a mistake of a programmer
}


def _raised(tree: ast.Module) -> Iterator[str]:
    """The names of the classes that are raised, as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(called)
            if re.match(r"[A-Z]", name.rpartition(".")[2]):
                yield name


def test_what_is_raised_is_of_the_tree() -> None:
    """Or is known to be raised for somebody who waits for it, with the reason in the table."""
    for module, tree in TREES.items():
        others = OTHERS.get(module, set()) | OTHERS.get(module.partition(".")[0], set())
        assert set(_raised(tree)) <= set(TREE) | others, module


def test_the_table_of_others_has_nothing_that_is_not_raised() -> None:
    """It does not outlive its reasons."""
    for part, names in OTHERS.items():
        modules = [it for it in TREES if it == part or it.startswith(f"{part}.")]
        assert names <= {name for module in modules for name in _raised(TREES[module])}, part


def test_the_tree_stands_in_one_module() -> None:
    """Nothing else derives from it."""
    for module in sorted(set(TREES) - {"errors"}):
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not bases & set(TREE), f"{module}.{node.name}"


def test_the_drawing_is_the_tree() -> None:
    """Each class at its place, four columns for each generation."""
    drawn, line = {}, []
    for indent, name in re.findall(
        r"^ {4}([│├└─ ]*)(\w+Error)", errors.__doc__ or "", re.MULTILINE
    ):
        line = [*line[: len(indent) // 4], name]
        drawn[name] = line[-2] if len(line) > 1 else "Exception"
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in TREE.items()}
