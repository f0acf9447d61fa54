"""The wheel and the source archive: built without network from a copy of the tree, complete, and at home anywhere."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import moecompile

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
pytest.importorskip("setuptools")


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints; warnings aside, it must succeed."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """A ``wheel`` or an ``sdist`` by the backend itself, so that nothing is downloaded."""
    target.mkdir(exist_ok=True)
    return target / python("-c", BUILD, f"build_{kind}", target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that belong to the project, as a fresh clone has them."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("tree") / "source"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    return build("wheel", Path(shutil.copytree(tree, tmp_path_factory.mktemp("wheel") / "tree")), tree.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive."""
    return build("sdist", Path(shutil.copytree(tree, tmp_path_factory.mktemp("sdist") / "tree")), tree.parent / "sdist")


def modules_of(tree: Path) -> set[str]:
    """The modules in the tree, under the paths at which they are installed."""
    found = {path.relative_to(tree).as_posix() for path in (tree / "moecompile").rglob("*.py")}
    for folder in ("passes", "codegen"):
        found |= {f"moecompile/{path.relative_to(tree).as_posix()}" for path in (tree / folder).rglob("*.py")}
    return found


def data_of(tree: Path) -> set[str]:
    """The files other than modules that the package reads or that mark it."""
    found = {
        path.relative_to(tree).as_posix()
        for folder in ("moecompile", "codegen")
        for path in (tree / folder).rglob("*")
        if path.suffix in (".jinja", ".css") or path.name == "py.typed"
    }
    return {name.replace("codegen/", "moecompile/codegen/", 1) if name.startswith("codegen/") else name for name in found}


def contents(wheel: Path) -> set[str]:
    """The names in a wheel, its own metadata left out."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_whole_package_and_nothing_else(tree: Path, wheel: Path) -> None:
    assert "moecompile/passes/split_ffn.py" in modules_of(tree) and len(data_of(tree)) >= 3
    assert contents(wheel) == modules_of(tree) | data_of(tree)
    assert wheel.name == f"moecompile-{moecompile.__version__}-py3-none-any.whl"


def test_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(name).decode())
    assert entries["console_scripts"]["moecompile"] == "moecompile.cli:main"


_CHECK = """
import sys
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
import moecompile, moecompile.codegen, moecompile.passes
from moecompile.report import render
home = Path(sys.argv[1]).resolve()
for module in (moecompile, moecompile.codegen, moecompile.passes, sys.modules["moecompile.passes.split_ffn"]):
    assert home in Path(module.__file__).resolve().parents, module
assert (files("moecompile") / "py.typed").is_file()
page = render({"recipe": "static"})
assert "</html>" in page and ":root {" in page  # the template and its style sheet
found = distribution("moecompile")
assert home in Path(found.locate_file("moecompile")).resolve().parents
command, = [point for point in found.entry_points if point.group == "console_scripts"]
assert command.name == "moecompile" and command.load() is sys.modules["moecompile.cli"].main
print(found.version)
"""


def test_installed_wheel_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install_wheel(wheel, target)
    environment = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    version = python("-c", _CHECK, target, cwd=elsewhere, **environment).strip()
    assert version == moecompile.__version__
    assert os.access(target / "bin" / "moecompile", os.X_OK)


def install_wheel(wheel: Path, target: Path) -> None:
    """Install a wheel into a folder, without what it depends on and without network."""
    pytest.importorskip("pip")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    python("-m", "pip", "install", *options, "--target", target, wheel, cwd=wheel.parent)


def test_wheel_from_the_source_archive_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"moecompile-{moecompile.__version__}"
    again = build("wheel", source, tmp_path / "wheel")
    assert contents(again) == contents(wheel)
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        assert all(a.read(name) == b.read(name) for name in contents(wheel))
