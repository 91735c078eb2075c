"""Which files loading code has read: real files, and Python's own ways to read them."""
# all ways to read, make and remove a file are the subject
# ruff: noqa: PTH102, PTH104, PTH106, PTH123, PTH208, SIM115

from __future__ import annotations

import compileall
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from dagster import load_assets_from_package_module

from dagster_taskiq.execution.loaded_files import LoadedFiles

CODE = """
from pathlib import Path
import yaml
from {package} import helper
from {package}.inner import deep

HERE = Path(__file__).parent
SETTINGS = yaml.safe_load((HERE / "settings.yaml").read_text())
TABLES = sorted(it.name for it in (HERE / "tables").glob("*.sql"))
"""


class Project:
    """A package of user code, under a name that no other test has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"project_{uuid.uuid4().hex}"
        self.package = root / self.name
        self.loaded = LoadedFiles()

    def write(self, name: str, text: str) -> Path:
        """Write a file of the package as an editor does: a new file in the old one's place."""
        path = self.package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{uuid.uuid4().hex}")
        new.write_text(text)
        return new.rename(path)

    def load(self) -> None:
        with self.loaded.noting():
            importlib.import_module(self.name)

    def forget(self) -> None:
        for name in [it for it in sys.modules if it.partition(".")[0] == self.name]:
            del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    project = Project(tmp_path / "src")
    project.write("__init__.py", CODE.format(package=project.name))
    project.write("helper.py", "A = 1")
    project.write("inner/__init__.py", "")
    project.write("inner/deep.py", "B = 2")
    project.write("settings.yaml", "a: 1")
    project.write("tables/first.sql", "select 1")
    yield project
    project.forget()


def _remove(name: str) -> Callable[[Project], object]:
    return lambda project: (project.package / name).unlink()


def _write(name: str, text: str = "# changed") -> Callable[[Project], object]:
    return lambda project: project.write(name, text)


def test_what_is_as_it_was(project: Project) -> None:
    project.load()
    assert project.loaded.changed() == ""
    assert project.loaded.changed() == ""


def test_nothing_was_loaded() -> None:
    assert LoadedFiles().changed() == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_write("__init__.py"), "__init__.py"),
        (_write("helper.py"), "helper.py"),
        (_write("helper.py", "A = 2"), "helper.py"),  # the same size
        (_write("inner/deep.py"), "inner/deep.py"),
        (_write("settings.yaml", "a: 2"), "settings.yaml"),
        (_remove("settings.yaml"), "settings.yaml"),
        (_remove("inner/deep.py"), "inner/deep.py"),
        (_write("tables/second.sql"), "tables/second.sql"),
        (_remove("tables/first.sql"), "tables/first.sql"),
        (lambda it: shutil.rmtree(it.package / "tables"), "tables"),
        (lambda it: shutil.rmtree(it.package / "inner"), "inner/__init__.py"),
        (_write("another.py"), "another.py"),
        (_write("more/__init__.py"), "more"),
    ],
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_changes(
    project: Project, change: Callable[[Project], object], named: str, is_compiled: bool
) -> None:
    if is_compiled:
        compileall.compile_dir(project.package, quiet=2)
    project.load()
    change(project)
    assert project.loaded.changed() == str(project.package / named)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: (it.package / "runs.log").write_text("a line"),
        lambda it: (it.package / "storage").mkdir(),
        lambda it: (it.root / "dagster.yaml").write_text(""),
        lambda it: (it.package / "tables" / "first.sql").write_text("not read, just listed"),
        lambda it: (it.package / "tables" / "__pycache__").mkdir(),
        lambda it: (it.package / "tables" / "first.pyc").write_text(""),
        lambda it: compileall.compile_dir(it.package, force=True, quiet=2),
    ],
)
def test_what_does_not_count(project: Project, change: Callable[[Project], object]) -> None:
    project.load()
    change(project)
    assert project.loaded.changed() == ""


def test_a_file_that_changes_while_the_code_is_loaded(project: Project) -> None:
    """By another process: what the code itself has written does not count."""
    project.write(
        "helper.py",
        "import subprocess\n"
        "from pathlib import Path\n"
        "path = Path(__file__).with_name('settings.yaml')\n"
        "path.read_text()\n"
        "subprocess.run(['cp', __file__, path], check=True)\n",
    )
    project.load()
    assert project.loaded.changed() == str(project.package / "settings.yaml")


def test_a_module_that_changes_while_it_is_loaded(project: Project) -> None:
    project.write("helper.py", "import os; os.utime(__file__, ns=(1, 1))")
    project.load()
    assert project.loaded.changed() == str(project.package / "helper.py")


def test_what_is_noted_adds_up(project: Project) -> None:
    project.load()
    other = project.write("other.txt", "a")
    unheard = project.write("unheard.txt", "a")
    project.load()  # has nothing left to do
    loaded = LoadedFiles()
    with loaded.noting():
        other.read_text()
    with loaded.noting():
        (project.package / "settings.yaml").read_text()
    unheard.read_text()
    project.write("unheard.txt", "b")
    assert loaded.changed() == ""
    project.write("settings.yaml", "b: 1")
    assert loaded.changed() == str(project.package / "settings.yaml")
    project.write("other.txt", "c")
    assert loaded.changed() == str(other)


def test_two_at_once(tmp_path: Path) -> None:
    first, second = LoadedFiles(), LoadedFiles()
    for name in ("a", "b"):
        (tmp_path / name).write_text("")
    with first.noting():
        with second.noting():
            (tmp_path / "b").read_text()
        (tmp_path / "a").read_text()
    (tmp_path / "a").unlink()
    assert first.changed()
    assert second.changed() == ""


def test_code_that_fails_has_been_read_too(project: Project) -> None:
    project.write("helper.py", "1 / 0")
    with pytest.raises(ZeroDivisionError):
        project.load()
    assert project.loaded.changed() == ""
    project.write("helper.py", "A = 1")
    assert project.loaded.changed() == str(project.package / "helper.py")


def test_a_module_that_was_looked_for_in_vain(project: Project) -> None:
    """In a directory that Python has listed before, for another module."""
    found = f"found_{uuid.uuid4().hex}"
    (project.root / f"{found}.py").touch()
    importlib.import_module(found)
    optional = f"optional_{uuid.uuid4().hex}"
    project.write("helper.py", f"try: import {optional}\nexcept ImportError: pass")
    project.load()
    (project.root / "runs.log").touch()
    assert project.loaded.changed() == ""
    (project.root / f"{optional}.py").touch()
    assert project.loaded.changed() == str(project.root / f"{optional}.py")
    del sys.modules[found]


def test_a_file_that_was_absent(tmp_path: Path) -> None:
    loaded = LoadedFiles()
    with loaded.noting():
        for read in (Path.read_text, os.listdir):
            with pytest.raises(FileNotFoundError):
                read(tmp_path / read.__name__)
    assert loaded.changed() == ""
    (tmp_path / "listdir").mkdir()
    assert loaded.changed() == str(tmp_path / "listdir")
    (tmp_path / "read_text").write_text("")
    assert loaded.changed() == str(tmp_path / "read_text")


def _open_descriptor(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


@pytest.mark.parametrize(
    "read",
    [
        Path.read_text,
        Path.read_bytes,
        lambda it: open(it).close(),
        lambda it: open(os.fsencode(it)).close(),
        lambda it: open(os.path.relpath(it)).close(),
        lambda it: open(os.open(it, os.O_RDONLY)).close(),
        _open_descriptor,
        lambda it: shutil.copy(it, it.with_name("copy")),
        yaml.__loader__.get_data,
    ],
)
def test_ways_to_read_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    path.write_text("a")
    monkeypatch.chdir(tmp_path)
    loaded = LoadedFiles()
    with loaded.noting():
        read(path)
    monkeypatch.chdir("/")
    assert loaded.changed() == ""
    path.write_text("bb")
    assert loaded.changed() == str(path)


def _list_by_descriptor(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    os.listdir(number)
    os.close(number)


@pytest.mark.parametrize(
    "read",
    [
        os.listdir,
        lambda it: os.listdir(),
        lambda it: os.listdir(os.fsencode(it)),
        lambda it: list(os.scandir(it)),
        lambda it: list(os.walk(it)),
        lambda it: list(it.iterdir()),
        lambda it: list(it.glob("*.yaml")),
        lambda it: list(it.rglob("*")),
        lambda it: list(os.fwalk(it)),
        _list_by_descriptor,
    ],
)
def test_ways_to_list_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]
) -> None:
    (tmp_path / "a.yaml").touch()
    monkeypatch.chdir(tmp_path)
    loaded = LoadedFiles()
    with loaded.noting():
        read(tmp_path)
    monkeypatch.chdir("/")
    assert loaded.changed() == ""
    (tmp_path / "b.yaml").touch()
    assert Path(loaded.changed()).resolve() == tmp_path / "b.yaml"


def _write_and_read(path: Path) -> None:
    path.write_text("a")
    path.read_text()


@pytest.mark.parametrize(
    "use",
    [
        lambda it: it.write_text("a"),
        lambda it: it.open("a").close(),
        lambda it: it.open("r+").close(),
        lambda it: os.close(os.open(it, os.O_RDWR)),
        lambda it: os.close(os.open(it, os.O_RDONLY | os.O_CREAT)),
        _write_and_read,
        lambda it: os.close(os.open(it.parent, os.O_RDONLY)),
        lambda it: it.exists(),
    ],
)
def test_what_is_written_or_not_read(tmp_path: Path, use: Callable[[Path], object]) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    loaded = LoadedFiles()
    with loaded.noting():
        use(path)
    path.write_text("afterwards")
    (tmp_path / "new").touch()
    assert loaded.changed() == ""


def _use_a_temporary_directory(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as made:
        subprocess.run(["touch", f"{made}/by another process"], check=True)
        for path in Path(made).iterdir():
            path.read_text()


def _make_and_remove(directory: Path) -> None:
    (directory / "made" / "deep").mkdir(parents=True)
    list((directory / "made").rglob("*"))
    shutil.rmtree(directory / "made")


def _replace(directory: Path) -> None:
    settings = directory / "settings.yaml"
    settings.read_text()
    (directory / "new").write_text("a: 2")
    (directory / "new").replace(settings)
    settings.read_text()


def _list_and_write(directory: Path) -> None:
    list(directory.iterdir())
    (directory / "written").write_text("a")


def _list_and_remove(directory: Path) -> None:
    list(directory.iterdir())
    (directory / "settings.yaml").unlink()


def _list_and_move(directory: Path) -> None:
    list(directory.iterdir())
    os.rename(directory / "settings.yaml", os.fsencode(directory / "moved"))
    os.rename(directory / "inner", directory / "moved inner")


def _remove_a_tree(directory: Path) -> None:
    list(directory.rglob("*"))
    (directory / "inner" / "file").read_text()
    shutil.rmtree(directory / "inner")


def _make_in_a_relative_way(directory: Path) -> None:
    for name in ("./made/", f"{directory}//./made too"):
        os.mkdir(name)
        os.listdir(name)
    list(directory.iterdir())
    shutil.rmtree("made")
    os.rmdir("./made too")


@pytest.mark.parametrize(
    "use",
    [
        _use_a_temporary_directory,
        _make_and_remove,
        _replace,
        _list_and_write,
        _list_and_remove,
        _list_and_move,
        _remove_a_tree,
        _make_in_a_relative_way,
    ],
)
def test_what_the_code_itself_makes_and_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    (tmp_path / "settings.yaml").write_text("a: 1")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("a")
    monkeypatch.chdir(tmp_path)
    loaded = LoadedFiles()
    with loaded.noting():
        use(tmp_path)
    assert loaded.changed() == ""


def test_what_another_process_makes_beside_it(tmp_path: Path) -> None:
    loaded = LoadedFiles()
    with loaded.noting():
        _list_and_write(tmp_path)
    (tmp_path / "other").touch()
    assert loaded.changed() == str(tmp_path / "other")


def _fail(change: Callable[..., object], *paths: Path) -> None:
    with pytest.raises(OSError, match="Errno"):
        change(*paths)


def _make_elsewhere(directory: Path) -> None:
    number = os.open(directory / "inner", os.O_RDONLY)
    os.mkdir("absent", dir_fd=number)
    os.rename("absent", "settings.yaml", src_dir_fd=number, dst_dir_fd=number)
    os.rmdir("settings.yaml", dir_fd=number)
    os.close(number)


@pytest.mark.parametrize(
    "use",
    [
        _make_elsewhere,
        lambda it: _fail(os.mkdir, it / "settings.yaml"),
        lambda it: _fail(os.rename, it / "absent", it / "settings.yaml"),
        lambda it: _fail(os.remove, it / "absent"),
        lambda it: _fail(os.rmdir, it / "absent"),
    ],
)
def test_what_was_there_before_is_not_made_by_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object]
) -> None:
    """Also where it has tried, or has made something of that name elsewhere."""
    (tmp_path / "settings.yaml").write_text("a: 1")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    loaded = LoadedFiles()
    with loaded.noting():
        use(tmp_path)
        (tmp_path / "settings.yaml").read_text()
        for change in (Path.read_text, os.listdir):
            with pytest.raises(FileNotFoundError):
                change(tmp_path / "absent")
    assert loaded.changed() == ""
    (tmp_path / "absent").touch()
    assert loaded.changed() == str(tmp_path / "absent")
    (tmp_path / "settings.yaml").write_text("a: 22")
    assert loaded.changed() == str(tmp_path / "settings.yaml")


def test_files_of_the_kernel_do_not_count() -> None:
    loaded = LoadedFiles()
    with loaded.noting():
        Path("/proc/self/stat").read_text()
        list(Path("/proc/self/fd").iterdir())
        open("/dev/null").close()
    os.close(os.dup(0))
    assert loaded.changed() == ""


def test_nothing_of_a_strange_path_reaches_user_code(tmp_path: Path) -> None:
    class Strange:
        def __fspath__(self) -> str:
            raise RuntimeError("strange")

    loaded = LoadedFiles()
    with loaded.noting():
        with pytest.raises(RuntimeError, match="strange"):
            os.listdir(Strange())
        with pytest.raises(ValueError, match="null"):
            open("a\0b")
        with pytest.raises(FileNotFoundError):
            open("")
        with pytest.raises(TypeError):
            open(None)  # type: ignore[call-overload]
        number = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            os.open("no file", os.O_RDONLY, dir_fd=number)
        os.close(number)
    assert loaded.changed() == ""


def test_a_descriptor_that_is_none_counts_as_changed() -> None:
    """It has no path, so nothing can be said of what it stood for."""
    loaded = LoadedFiles()
    with loaded.noting(), pytest.raises(OSError, match="descriptor"):
        os.listdir(999_999)
    assert loaded.changed() == "(999999,)"


def test_what_cannot_be_noted_counts_as_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    loaded = LoadedFiles()
    with loaded.noting(), pytest.raises(FileNotFoundError):
        open("relative")
    assert "relative" in loaded.changed()


def test_other_threads_are_heard_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    loaded = LoadedFiles()
    with loaded.noting():
        thread = threading.Thread(target=path.read_text)
        thread.start()
        thread.join()
    path.unlink()
    assert loaded.changed() == str(path)


def test_a_volume_of_kubernetes(tmp_path: Path) -> None:
    """Its files are links to those of a directory that is exchanged by a link, too."""
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "settings.yaml").write_text(f"a: {version}")
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "settings.yaml").symlink_to("..data/settings.yaml")
    loaded = LoadedFiles()
    with loaded.noting():
        (tmp_path / "settings.yaml").read_text()
    assert loaded.changed() == ""
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").rename(tmp_path / "..data")
    assert loaded.changed() == str(tmp_path / "settings.yaml")


def test_a_package_behind_a_link(project: Project, tmp_path: Path) -> None:
    real = tmp_path / "releases" / "1"
    shutil.move(project.root, real)
    project.root.symlink_to(real)
    project.load()
    assert project.loaded.changed() == ""
    shutil.copytree(real, tmp_path / "releases" / "2")
    (tmp_path / "new").symlink_to(tmp_path / "releases" / "2")
    (tmp_path / "new").rename(project.root)
    assert project.loaded.changed() == str(project.package / "__init__.py")


def test_modules_without_source(project: Project) -> None:
    compileall.compile_dir(project.package, quiet=2, legacy=True)
    for source in project.package.rglob("*.py"):
        source.unlink()
    project.load()
    assert project.loaded.changed() == ""
    compileall.compile_dir(project.package, quiet=2, legacy=True)
    (project.package / "helper.pyc").unlink()
    assert project.loaded.changed() == str(project.package / "helper.pyc")


def test_bytecode_that_is_kept_elsewhere(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "cache"))
    project.load()
    project.forget()
    project.loaded = LoadedFiles()
    project.load()
    shutil.rmtree(tmp_path / "cache")
    assert project.loaded.changed() == ""
    project.write("helper.py", "A = 3")
    assert project.loaded.changed() == str(project.package / "helper.py")


def test_modules_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, archive = f"project_{uuid.uuid4().hex}", tmp_path / "code.zip"

    def pack(text: str) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"{name}.py", text)

    pack("A = 1")
    monkeypatch.syspath_prepend(archive)
    loaded = LoadedFiles()
    with loaded.noting():
        importlib.import_module(name)
    del sys.modules[name]
    assert loaded.changed() == ""
    pack("A = 'another one'")
    assert loaded.changed() == str(archive)


def test_a_module_that_no_one_has_opened(project: Project, tmp_path: Path) -> None:
    """Such as one that a library makes of a file that it has read in C."""
    path = tmp_path / "made.py"
    path.write_text("A = 1")
    project.write(
        "helper.py",
        "import sys, types\n"
        f"module = types.ModuleType('{project.name}.made')\n"
        f"module.__file__ = {str(path)!r}\n"
        "sys.modules[module.__name__] = module\n"
        f"sys.modules['{project.name}.none'] = None\n",
    )
    project.load()
    assert project.loaded.changed() == ""
    path.unlink()
    assert project.loaded.changed() == str(path)


def test_assets_of_a_package(project: Project) -> None:
    """Dagster looks for modules, so another file beside them changes nothing."""
    project.write("__init__.py", "")
    project.write("helper.py", "import dagster\n@dagster.asset\ndef first(): ...")
    with project.loaded.noting():
        module = importlib.import_module(project.name)
        assert len(load_assets_from_package_module(module)) == 1
    (project.package / "runs.log").touch()
    assert project.loaded.changed() == ""
    project.write("later.py", "")
    assert project.loaded.changed() == str(project.package / "later.py")


def _pip(site: Path, *arguments: str) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", site.parents[2] / "bin" / "python"),
            *("--disable-pip-version-check", "--quiet", *arguments),
        ],
        check=True,
        timeout=120,
    )


def _wheel(directory: Path, name: str, version: str) -> str:
    """Write a wheel of one module."""
    path = directory / f"{name}-{version}-py3-none-any.whl"
    facts = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = '{version}'",
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{facts}/RECORD", "".join(f"{it},,\n" for it in files))
    return str(path)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The site-packages directory of an empty environment."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    (found,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    return found


def test_packages_that_pip_installs(site: Path, tmp_path: Path) -> None:
    name = "some_package"
    _pip(site, "install", _wheel(tmp_path, "another_package", "1.0"))
    first, second = _wheel(tmp_path, name, "1.0"), _wheel(tmp_path, name, "1.1")
    for arguments in (
        ["install", first],
        ["install", "--force-reinstall", first],
        ["install", second],
        ["uninstall", "--yes", name],
    ):
        loaded = LoadedFiles()
        with loaded.noting():
            (site / "another_package.py").read_text()
        assert loaded.changed() == ""
        _pip(site, *arguments)
        assert loaded.changed() == str(site), arguments


def test_python_compiles_an_installed_module(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"module_{uuid.uuid4().hex}"
    (site / f"{name}.py").write_text("")
    (site / "a_package").mkdir()
    (site / "a_package" / "data.txt").write_text("")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    loaded = LoadedFiles()
    with loaded.noting():
        importlib.import_module(name)
        list(site.iterdir())
        (site / "a_package" / "data.txt").read_text()
    del sys.modules[name]
    assert (site / "__pycache__").exists()
    assert loaded.changed() == ""
    shutil.rmtree(site / "__pycache__")
    # one by one they do not count, as there are thousands
    (site / "a_package" / "data.txt").write_text("changed by hand")
    assert loaded.changed() == ""
    (site / "a_module.py").touch()
    assert loaded.changed() == str(site)


def test_an_editable_package(site: Path, project: Project) -> None:
    """Its path stands in a file of site-packages. Its modules count one by one."""
    path = site / "project.pth"
    path.write_text(str(project.root))
    with project.loaded.noting():
        list(site.iterdir())
        importlib.import_module(project.name)
    assert project.loaded.changed() == ""
    path.write_text(f"{project.root}-2")
    (site / "__pycache__").mkdir(exist_ok=True)
    assert project.loaded.changed() == str(site)
    path.unlink()
    project.write("helper.py", "A = 5")
    assert project.loaded.changed() == str(project.package / "helper.py")


def test_looking_is_not_noted(project: Project) -> None:
    """A look at what has changed, while something is noted, adds nothing."""
    project.load()
    other = LoadedFiles()
    with other.noting():
        assert project.loaded.changed() == ""
    shutil.rmtree(project.package)
    assert other.changed() == ""


def test_one_hook_a_process() -> None:
    """However many objects there are: each hook would cost its time at each event."""
    script = """
import sys
count = 0
def hear(event, arguments):
    global count
    count += event == "sys.addaudithook"
sys.addaudithook(hear)
from dagster_taskiq.execution.loaded_files import LoadedFiles
for _ in range(3):
    with LoadedFiles().noting():
        pass
print(count)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "1"
