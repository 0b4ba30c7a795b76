"""What is shipped: the package list, the two links, and the wheel in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINKS = {"nbrunner/magics": "../magics", "nbrunner/widgets": "../widgets"}


def packages_on_disk() -> set[str]:
    found = set()
    for folder, names, files in os.walk(ROOT / "nbrunner", followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        if "__init__.py" in files:
            found.add(".".join(Path(folder).relative_to(ROOT).parts))
    return found


def test_package_list_is_what_is_on_disk() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_folder_with_python_is_a_package() -> None:
    """A folder without __init__.py imports from a checkout and is missing from the wheel."""
    folders = {path.parent for top in ("nbrunner", "magics", "widgets") for path in (ROOT / top).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_links_are_links() -> None:
    for link, target in LINKS.items():
        assert (ROOT / link).is_symlink()
        assert str((ROOT / link).readlink()) == target
    listed = subprocess.run(
        ["git", "ls-files", "-s", *LINKS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: whether the links are committed as links cannot be seen")
    assert {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()} == dict.fromkeys(
        LINKS, "120000"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would hand out (setuptools writes build/ beside its sources)."""
    source = tmp_path_factory.mktemp("source") / "nbrunner"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if files.returncode:
        pytest.skip("not a git checkout: which files belong to the project is unknown")
    for name in filter(None, files.stdout.decode().split("\0")):
        here, there = ROOT / name, source / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_symlink():
            there.symlink_to(here.readlink())
        elif here.exists():
            there.write_bytes(here.read_bytes())
    out = source.parent / "dist"
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_what_it_must_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert "nbrunner" in tops
    assert not {"magics", "widgets", "tests", "examples", "benchmarks"} & tops
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"nbrunner/tiny/{name}" in names
    assert "nbrunner/py.typed" in names
    for package, folder in (("nbrunner/widgets", "widgets"), ("nbrunner/magics", "magics"), ("nbrunner",) * 2):
        for suffix in ("py", "js", "css"):
            for path in (ROOT / folder).glob(f"*.{suffix}"):
                assert f"{package}/{path.name}" in names


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Only nbrunner is installed there; its dependencies are lent, by name, from the environment of the tests.

    A .pth file cannot lend them: it would also run the .pth of an editable nbrunner, and hide what is missing.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "nbrunner" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (site / entry.name).symlink_to(entry)
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)],
        check=True,
        timeout=120,
    )
    code = (
        "import nbrunner, nbrunner.magics, nbrunner.widgets, nbrunner.tiny, pathlib\n"
        f"assert str(pathlib.Path(nbrunner.__file__)).startswith({str(site)!r}), nbrunner.__file__\n"
        f"assert str(pathlib.Path(nbrunner.magics.__file__)).startswith({str(site)!r})\n"
        "for name in nbrunner.__all__: getattr(nbrunner, name)\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name this checkout
    ran = subprocess.run([python, "-c", code], cwd=elsewhere, env=own, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    command = subprocess.run(
        [tmp_path / "venv" / "bin" / "nbrunner", "--help"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert command.returncode == 0, command.stderr
    assert "serve" in command.stdout


def pins_of(path: Path) -> dict[str, str]:
    pins = {}
    for line in path.read_text().splitlines():
        if line.strip() not in ("", ".") and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==", line
            pins[canonicalize_name(pin.name)] = exact.version
    return pins


def test_binder_installs_what_is_tested() -> None:
    assert pins_of(ROOT / "binder" / "requirements.txt").items() <= pins_of(ROOT / "constraints.txt").items()
    for script in ("postBuild", "start"):
        assert os.access(ROOT / "binder" / script, os.X_OK)
    assert (ROOT / "binder" / "start").read_text().rstrip().endswith('exec "$@"')


def test_constraints_lie_within_the_ranges() -> None:
    """A pin outside of the range that pyproject.toml promises would fail only at the next fresh install."""
    pins = pins_of(ROOT / "constraints.txt")
    wanted = PROJECT["project"]["dependencies"] + [
        line for extra in PROJECT["project"]["optional-dependencies"].values() for line in extra
    ]
    for line in wanted:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in ("nbrunner", "setuptools"):  # ourselves; a build tool that no code of ours runs on
            continue
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{line} does not allow {pins[name]}"
