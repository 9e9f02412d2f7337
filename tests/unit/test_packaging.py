# SPDX-License-Identifier: Apache-2.0
"""What is installed, and what every file must say about its licence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"

# Folders of the checkout with files that somebody wrote, and what may stand at the top.
TOP_LEVEL = {"bpf", "docs", "tests", "tools", "userspace", "xdp"}
TOP_LEVEL |= {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
GENERATED = {"_libbpf.c", "_native.c"}


def written_files() -> Iterator[Path]:
    for folder in ("bpf", "docs", "tests", "tools", "userspace", "xdp", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.name not in GENERATED and "__pycache__" not in path.parts:
                yield path


def source_files() -> list[Path]:
    return [
        path
        for path in [*written_files(), ROOT / "pyproject.toml"]
        if path.suffix in {".py", ".pyi", ".c", ".h", ".sh", ".toml"} or path.name in {"sluice", "run"}
    ]


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_file_names_its_licence(path: Path) -> None:
    head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:2])
    found = re.search(r"SPDX-License-Identifier: (.+?)(?: \*/)?$", head, re.MULTILINE)
    assert found, f"{path} has no SPDX line"
    in_bpf = path.is_relative_to(ROOT / "bpf")
    assert found[1] == ("(GPL-2.0-only OR BSD-2-Clause)" if in_bpf else "Apache-2.0")


def test_licence_texts_are_there() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    dual = (ROOT / "bpf/LICENSE").read_text(encoding="utf-8")
    assert "GPL-2.0-only" in dual
    assert "BSD 2-Clause License" in dual


@pytest.mark.parametrize(
    "path",
    [path for path in source_files() if path.suffix in {".py", ".pyi", ".c", ".h"}],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_grows_beyond_reading(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_nothing_else_stands_at_the_top() -> None:
    git = shutil.which("git")
    if not (ROOT / ".git").exists() or git is None:
        pytest.skip("not a clone: nothing says which files belong to the project")
    listed = subprocess.run(
        [git, "-c", "safe.directory=*", "-C", str(ROOT), "ls-files"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_every_package_is_listed() -> None:
    """setuptools is given a list; a package that is missing there works in a clone and nowhere else."""
    found = {"sluice_cli"}
    for top in ("bpf", "userspace", "xdp"):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(ROOT).parts))
    tool = project()["tool"]
    assert isinstance(tool, dict)
    assert set(tool["setuptools"]["packages"]) == found


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("bpf", "userspace", "xdp", "tools/sluice_cli"):
        for module in (ROOT / top).rglob("*.py"):
            assert (module.parent / "__init__.py").is_file(), f"{module.parent} has no __init__.py"


def copied_checkout(target: Path) -> Path:
    """The files of the project without what was built: a build must not write into the checkout."""
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.o", "build", "*.egg-info", *GENERATED)
    return Path(shutil.copytree(ROOT, target, ignore=skip))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that Sluice was installed into by pip alone, as a user would."""
    base = tmp_path_factory.mktemp("pip install")  # pip and cffi must not stumble over the space
    checkout = copied_checkout(base / "checkout")
    environment = base / "env"
    subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--system-site-packages", str(environment)], check=True)
    done = subprocess.run(
        [environment / "bin/python", "-m", "pip", "install", "--quiet", "--no-input", str(checkout)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return environment


def run_in(environment: Path, *arguments: str) -> str:
    # Neither the checkout nor PYTHONPATH may lend a module that was not installed.
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))
    }
    done = subprocess.run(
        [str(environment / "bin" / arguments[0]), *arguments[1:]],
        cwd="/",
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed_files(environment: Path) -> list[str]:
    code = "from importlib.metadata import files; print('\\n'.join(str(f) for f in files('sluice')))"
    return run_in(environment, "python", "-c", code).splitlines()


def test_source_distribution_builds_the_same(installed: Path, tmp_path: Path) -> None:
    """Without build isolation, by the setuptools of the system: pip did the same with the newest above."""
    checkout = copied_checkout(tmp_path / "checkout")
    python = str(installed / "bin/python")
    subprocess.run(
        [python, "-W", "ignore", "tools/packaging/backend.py", "--quiet", "sdist", "--dist-dir", tmp_path],
        cwd=checkout,
        check=True,
    )
    (source,) = tmp_path.glob("*.tar.gz")
    shutil.rmtree(checkout)
    subprocess.run(
        [python, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation", source],
        cwd=tmp_path,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        # What goes to share/ has another place in a wheel than on disk.
        names = {name for name in archive.namelist() if ".dist-info/" not in name and ".data/" not in name}
    assert names == {
        name
        for name in installed_files(installed)
        if ".dist-info/" not in name and not name.startswith("..") and "__pycache__" not in name
    }


def test_pip_install_gives_a_working_command(installed: Path) -> None:
    version = project()["project"]
    assert isinstance(version, dict)
    assert run_in(installed, "sluice", "--version").strip() == f"sluice {version['version']}"
    assert "Commands" in run_in(installed, "sluice", "--help")


def test_pip_install_builds_both_c_modules(installed: Path) -> None:
    code = "import xdp._libbpf as a, userspace.native._native as b; print(a.lib.SLUICE_MAX_LANES, b.__file__)"
    lanes, file = run_in(installed, "python", "-c", code).split(maxsplit=1)
    assert lanes == "8"
    assert file.startswith(str(installed))


def test_pip_install_brings_the_kernel_programs(installed: Path) -> None:
    code = "import bpf; print(bpf.source('steer.bpf.c') + bpf.source('include/abi.h'))"
    text = run_in(installed, "python", "-c", code)
    assert (ROOT / "bpf/steer.bpf.c").read_text(encoding="utf-8") in text
    # bcc is handed one text made of them all: each must be there.
    names = run_in(
        installed, "python", "-c", "import bpf, os; print(*os.listdir(os.path.dirname(bpf.__file__)))"
    )
    assert {path.name for path in (ROOT / "bpf").glob("*.bpf.c")} <= set(names.split())


def test_pip_install_brings_nothing_else(installed: Path) -> None:
    files = installed_files(installed)
    tops = {name.split("/")[0] for name in files if not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "bpf",
        "sluice_cli",
        "userspace",
        "xdp",
    }
    outside = [name for name in files if name.startswith("..")]
    examples = {path.name for path in (ROOT / "docs/examples").glob("*.toml")}
    assert {"/".join(name.split("/")[-2:]) for name in outside} == {
        "bin/sluice",
        *(f"examples/{name}" for name in examples),
    }
    for package in ("xdp", "userspace", "sluice_cli"):
        assert f"{package}/py.typed" in files
    assert any(name.endswith("/LICENSE") and ".dist-info" in name for name in files)
    assert "bpf/LICENSE" in files
