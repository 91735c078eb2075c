"""One direction of imports, downwards, and what each part may know."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import dagster_taskiq

pytestmark = pytest.mark.once

PACKAGE = Path(dagster_taskiq.__file__).parent

#: The rooms from the bottom to the top; a module may import from rooms in the lines above its own,
#: and from its own room. Rooms that share a line know nothing of each other.
STOREYS = [
    "version defaults errors",
    "aio _taskiq",
    "servers",
    "_dagster messages",
    "tags config brokers backend execution",
    "connections",
    "carrier",
    "loop launch worker overview",
    "steering telemetry",
    "executor launcher stack monitoring",
    "demo dev doctor dashboard",
    "cli",
]


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES: Mapping[str, ast.Module] = {
    _module_name(path): ast.parse(path.read_text(encoding="utf8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}

#: The package's face and its ``-m`` stand above everything.
FACES = {"", "__main__"}


def _names(node: ast.AST) -> Iterator[str]:
    """The full names that an import statement reaches."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "no relative imports"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def _imports(tree: ast.AST) -> list[str]:
    return [name for node in ast.walk(tree) for name in _names(node)]


@cache
def _own_imports(module: str) -> set[str]:
    """The modules of ours that one imports; of ``from a.b import c`` the longest that is one."""
    found = set()
    for name in _imports(TREES[module]):
        first, _, rest = name.partition(".")
        if first == "dagster_taskiq":
            while rest not in TREES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {module}


def _room(module: str) -> str:
    return module.partition(".")[0]


def _storey(module: str) -> int:
    places = {room: number for number, line in enumerate(STOREYS) for room in line.split()}
    room = _room(module)
    assert room in places, f"room {room!r} has no place in STOREYS: give it one"
    return places[room]


def test_imports_go_downwards() -> None:
    """A module imports from its own room or from one on a lower storey."""
    for module in set(TREES) - FACES:
        for imported in _own_imports(module):
            assert imported not in FACES or imported == "", f"{module} imports {imported}"
            if imported and _room(imported) != _room(module):
                assert _storey(imported) < _storey(module), f"{module} imports {imported}"


def test_nothing_below_imports_the_face() -> None:
    """The package's ``__init__`` imports the executor: whoever imports it has a cycle."""
    below = set(TREES) - FACES - {"cli", "demo"}
    assert [module for module in below if "" in _own_imports(module)] == []


def test_there_are_no_cycles() -> None:
    """Module by module, also within one room."""
    graph = {module: _own_imports(module) for module in TREES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


#: The imports that wait until they are needed, each for the reason that stands beside it.
LATE = {
    "__main__": {"dagster_taskiq.cli.main"},  # is imported: Ctrl-C at any moment
    # the extra that it needs may be missing
    "cli.dashboard": {"dagster_taskiq.dashboard.serving.serve"},
    "servers.embedded.keeper": {"ctypes"},  # only on Linux
    # only where there is something to trace for
    "telemetry.traces": {"dagster_taskiq.telemetry.traces_otel.open_tracing"},
    "telemetry.traces_otel": {"dagster_taskiq.telemetry.traces_setup.set_up_provider"},
}


def test_imports_stand_at_the_top() -> None:
    """No import inside a function hides a cycle; the few late ones are the known ones."""
    late = [
        (module, name)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for name in _imports(node)
        if name not in LATE.get(module, set())
    ]
    assert late == []


def test_dagsters_private_names_stand_in_one_room() -> None:
    """A release of Dagster that moves one breaks ``_dagster`` and no other."""
    private = [
        (module, name)
        for module, tree in TREES.items()
        for name in _imports(tree)
        if _room(module) != "_dagster"
        and name.partition(".")[0].startswith("dagster")
        and not name.startswith("dagster_taskiq")
        and any(part.startswith("_") for part in name.split("."))
    ]
    assert private == []


def test_taskiqs_names_come_from_one_module() -> None:
    """Whoever imports Taskiq first decides whether aiohttp is imported, too."""
    importing = {
        module
        for module, tree in TREES.items()
        for name in _imports(tree)
        if name.partition(".")[0] == "taskiq"
    }
    assert importing == {"_taskiq"}


#: The execution loop, which knows no servers: all of its room but those who carry its steps.
LOOP = sorted(
    it
    for it in TREES
    if it.startswith("loop.")
    and it not in ("loop.client", "loop.dispatcher", "loop.eager", "loop.step_envelopes")
)


def _outside(prefix: str) -> set[str]:
    """The outside packages that the modules of one part import."""
    return {
        # ``_taskiq`` is Taskiq itself
        "taskiq" if name.startswith("dagster_taskiq._taskiq") else name.partition(".")[0]
        for module in TREES
        if module == prefix or module.startswith(prefix + ".")
        for name in _imports(TREES[module])
    } - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("part", "unknown"),
    [
        ("version", {"dagster", "taskiq", "redis", "aio_pika", "dagster_taskiq"}),
        ("defaults", {"dagster", "taskiq", "redis", "aio_pika", "dagster_taskiq"}),
        ("errors", {"dagster", "taskiq", "redis", "aio_pika", "dagster_taskiq"}),
        ("tags", {"dagster", "taskiq", "redis", "aio_pika"}),
        ("servers.kinds", {"dagster", "taskiq", "redis", "aio_pika"}),
        ("messages.results", {"dagster", "taskiq", "redis", "aio_pika"}),
        ("messages.envelope", {"dagster", "redis", "aio_pika"}),
        ("_dagster", {"taskiq", "redis", "aio_pika"}),
        ("config", {"taskiq", "redis", "aio_pika"}),
        *(
            (part, {"dagster", "taskiq"})
            for part in sorted(TREES)
            if part.startswith("config.") and part != "config.schema"
        ),
        ("connections", {"dagster", "taskiq", "redis", "aio_pika"}),
        ("_dagster.instance_home", {"dagster", "taskiq"}),
        ("brokers", {"dagster"}),
        ("carrier", {"dagster", "redis", "aio_pika"}),
        ("brokers.memory", {"dagster", "redis", "aio_pika"}),
        ("backend", {"dagster", "taskiq"}),
        ("backend.life", {"dagster", "taskiq", "redis"}),
        ("backend.memory", {"dagster", "taskiq", "redis"}),
        ("servers.embedded", {"dagster", "taskiq"}),
        ("loop.client", {"dagster"}),
        *((part, {"taskiq", "redis", "aio_pika", "taskiq_redis"}) for part in LOOP),
        ("executor", {"taskiq", "redis", "aio_pika"}),
        ("execution", {"taskiq", "redis", "aio_pika"}),
        ("worker", {"click", "rich"}),
        ("telemetry.traces", {"opentelemetry"}),
        ("worker.guard", {"dagster", "dagster_taskiq", "taskiq", "redis"}),
        ("worker.child", {"taskiq", "redis", "aio_pika"}),
    ],
)
def test_what_a_part_knows_nothing_of(part: str, unknown: set[str]) -> None:
    """The table of the parts in ARCHITECTURE.md."""
    assert part in TREES
    assert not _outside(part) & unknown


@pytest.mark.parametrize("face", ["brokers", "brokers.memory", "backend", "backend.memory"])
def test_a_face_loads_no_client_library(face: str) -> None:
    """Who has one kind of server needs the library of no other. Modules below count too."""
    reached, left = set(), {face}
    while left:
        module = left.pop()
        reached.add(module)
        left |= _own_imports(module) - reached
    loaded = {name.partition(".")[0] for it in reached for name in _imports(TREES[it])}
    assert not loaded & {"redis", "aio_pika", "aiormq", "taskiq_redis", "taskiq_aio_pika"}


@pytest.mark.parametrize(
    ("part", "unknown"),
    [
        *(
            (
                part,
                ("brokers", "carrier", "loop.client", "backend.redis", "servers.redis_client"),
            )
            for part in LOOP
        ),
        ("loop.client", (*LOOP, "_dagster", "worker")),
        ("config", ("brokers", "backend", "servers.embedded", "connections")),
        ("backend", ("brokers", "messages.envelope", "config", "worker")),
        ("brokers", ("backend", "config", "worker", "messages.results")),
        ("execution", ("brokers", "backend", "loop.client", "worker", "config")),
        ("worker", ("cli", "executor", "loop.client", "config", "loop.core_execution_loop")),
        ("executor", ("brokers", "backend", "worker", "messages.envelope")),
    ],
)
def test_which_of_our_parts_a_part_knows_nothing_of(part: str, unknown: tuple[str, ...]) -> None:
    """How messages travel, what is in them, and who configured what are kept apart."""
    for module in TREES:
        if module == part or module.startswith(part + "."):
            for imported in _own_imports(module):
                assert not any(
                    imported == other or imported.startswith(other + ".") for other in unknown
                ), f"{module} imports {imported}"


def test_only_the_faces_import_the_cli() -> None:
    """Nothing is hidden from it, nothing imports it."""
    for module in set(TREES) - FACES:
        if module.partition(".")[0] != "cli":
            imported = {name.partition(".")[0] for name in _own_imports(module)}
            assert "cli" not in imported, module


def test_all_is_exact() -> None:
    """The package's public names are the documented ones, and each is there."""
    assert sorted(dagster_taskiq.__all__) == [
        "SoftTimeLimitError",
        "TaskiqRunLauncher",
        "__version__",
        "taskiq_executor",
    ]
    assert all(hasattr(dagster_taskiq, name) for name in dagster_taskiq.__all__)


def test_nothing_is_pickled() -> None:
    """A message must not be able to run code by being read."""
    dangerous = {"pickle", "_pickle", "cloudpickle", "dill", "jsonpickle", "marshal", "shelve"}
    for module, tree in TREES.items():
        assert not {name.partition(".")[0] for name in _imports(tree)} & dangerous, module


#: What makes objects or code of a text.
_UNSAFE = {
    "eval",
    "exec",
    "compile",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
}


def test_no_text_becomes_code() -> None:
    """YAML is read with ``safe_load``, and nothing is evaluated."""
    for module, tree in TREES.items():
        used = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Attribute, ast.Name))
        }
        assert not (used | set(_imports(tree))) & _UNSAFE, module
