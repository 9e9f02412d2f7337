# SPDX-License-Identifier: Apache-2.0
"""tools/sluice on this machine: real first uses in copies of the checkout, and everything that stops one.

Machines without apt, network or packages are made of this one with mount and network namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces and other users' processes"),
]


def environment(**more: str) -> dict[str, str]:
    """Ours, without what is meant for this very process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTHON"))}
    return kept | more


def copied(target: Path) -> Path:
    skip = shutil.ignore_patterns(
        ".*", "__pycache__", "*.so", "*.o", "build", "*.egg-info", "_libbpf.c", "_native.c", "docs", "tests"
    )
    return Path(shutil.copytree(ROOT, target, ignore=skip))


@pytest.fixture
def area() -> Iterator[Path]:
    """A directory that other users can enter, unlike pytest's."""
    made = Path(tempfile.mkdtemp(prefix="sluice launcher "))  # a space, as in many people's paths
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def launch(
    checkout: Path, *arguments: str, before: Sequence[str] = (), user: int | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, str(checkout / "tools/sluice"), *arguments],
        cwd="/",
        env=environment(**more),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        check=False,
    )


def in_mounts(*commands: str, user: int = 0, network: bool = True) -> list[str]:
    """A prefix that runs the rest after these shell commands in a mount namespace of its own."""
    drop = "" if user == 0 else f"setpriv --reuid {user} --regid {user} --clear-groups "
    script = " && ".join([*commands, f'exec {drop}"$@"'])
    return ["unshare", "--mount", *([] if network else ["--net"]), "sh", "-ec", script, "sh"]


NO_PACKAGES = "mount -t tmpfs none /var/lib/dpkg && : >/var/lib/dpkg/status"
NO_APT = "mount --bind /dev/null $(readlink -f /usr/bin/apt-get)"


def other_system(area: Path) -> str:
    release = area / "os-release"
    release.write_text('ID=fedora\nPRETTY_NAME="Fedora Linux 44"\n', encoding="utf-8")
    return f"mount --bind '{release}' $(readlink -f /etc/os-release)"


def only_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of a refusal: nothing else on stderr, nothing at all on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def ready() -> Iterator[tuple[Path, list[subprocess.CompletedProcess[str]]]]:
    """A copy that two first uses at once have set up, over what a killed one left; and what they said."""
    area = Path(tempfile.mkdtemp(prefix="sluice launcher "))
    area.chmod(0o755)
    checkout = copied(area / "check out")
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/.sluice-made").write_text("half\n", encoding="utf-8")
    command = [str(checkout / "tools/sluice"), "--version"]
    running = [
        subprocess.Popen(
            command,
            cwd="/",
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0o077,  # of a careful root: others must be able to use it all the same
        )
        for _ in range(2)
    ]
    said = []
    for process in running:
        stdout, stderr = process.communicate()
        said.append(subprocess.CompletedProcess(command, process.returncode, stdout, stderr))
    yield checkout, said
    shutil.rmtree(area)


def version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def test_two_first_uses_at_once_make_one_set_up(
    ready: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    _, said = ready
    for done in said:
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"sluice {version()}\n"
        assert all(line.startswith("sluice: ") for line in done.stderr.splitlines())
    assert sum("making the virtual environment" in done.stderr for done in said) == 1
    assert sum("waiting for another" in done.stderr for done in said) == 1


def test_later_uses_say_nothing_and_cost_little(
    ready: tuple[Path, list[subprocess.CompletedProcess[str]]],
) -> None:
    checkout, _ = ready

    def fastest(command: Sequence[str]) -> float:
        times = []
        for _ in range(5):
            start = time.monotonic()
            done = subprocess.run(command, cwd="/", env=environment(), capture_output=True, check=True)
            times.append(time.monotonic() - start)
            assert done.stderr == b""
        return min(times)

    direct = fastest([str(checkout / ".venv/bin/python"), "-P", "-m", "sluice_cli", "--version"])
    launched = fastest([str(checkout / "tools/sluice"), "--version"])
    assert launched - direct < 0.5


def test_link_from_anywhere_and_folders_in_the_way(
    ready: tuple[Path, list[subprocess.CompletedProcess[str]]], tmp_path: Path
) -> None:
    checkout, _ = ready
    link = tmp_path / "sl"
    link.symlink_to(checkout / "tools/sluice")
    for name in ("xdp", "sluice_cli", "click"):
        trap = tmp_path / name
        trap.mkdir()
        (trap / "__init__.py").write_text("raise SystemExit('imported from the current directory')")
    done = subprocess.run(
        [str(link), "--version"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"sluice {version()}\n"), done.stderr


def test_help_needs_no_root_once_set_up(ready: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    checkout, _ = ready
    done = launch(checkout, "--help", user=NOBODY)
    assert done.returncode == 0, done.stderr
    assert "Commands" in done.stdout
    assert done.stderr == ""


def test_changed_c_source_is_built_again(ready: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    checkout, _ = ready
    header = checkout / "userspace/native/checksum.h"
    original = header.read_text(encoding="utf-8")
    (module,) = (checkout / "userspace/native").glob("_native*.so")
    before = module.stat()
    try:
        header.write_text(original + "\n/* changed */\n", encoding="utf-8")
        refused = only_line(launch(checkout, "--version", user=NOBODY), 4)
        assert "can't be written by nobody" in refused

        done = launch(checkout, "--version")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"sluice {version()}\n"
        assert "building the C modules" in done.stderr
        assert "installing" not in done.stderr
        after = module.stat()
        assert (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
        assert launch(checkout, "--version").stderr == ""

        header.write_text(original + "\n#error broken on purpose\n", encoding="utf-8")
        done = launch(checkout, "--version")
        assert done.returncode == 5
        assert done.stdout == ""
        last = done.stderr.splitlines()[-1]
        assert "the C modules don't build" in last
        assert "broken on purpose" in last
        log = Path(last.rsplit("(log: ", 1)[1].rstrip(")"))
        assert "checksum.h" in log.read_text(encoding="utf-8")
        log.unlink()
    finally:
        header.write_text(original, encoding="utf-8")
    assert launch(checkout, "--version").returncode == 0


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes that work on a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if str(folder) in line and "pytest" not in line:
            found.append(line)
    return found


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_first_use_leaves_nothing(area: Path, sent: signal.Signals, code: int) -> None:
    checkout = copied(area / "checkout")
    with subprocess.Popen(
        [str(checkout / "tools/sluice"), "--version"],
        cwd="/",
        env=environment(TMPDIR=str(area)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "installing Sluice" in line:
                break
        assert (checkout / ".venv").exists()
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert (stdout, stderr) == ("", "")
    assert not (checkout / ".venv").exists()
    assert not list(area.glob("sluice-setup.*"))
    deadline = time.monotonic() + 10
    while processes_in(checkout) and time.monotonic() < deadline:
        os.sched_yield()
    assert processes_in(checkout) == []


def test_no_network_is_one_line_and_leaves_no_environment(area: Path) -> None:
    checkout = copied(area / "checkout")
    done = launch(checkout, "--version", before=in_mounts(network=False), PIP_RETRIES="0", TMPDIR=str(area))
    assert done.returncode == 5
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("sluice: ") for line in lines)
    assert "pip could not install" in lines[-1]
    assert "check the network" in lines[-1]
    assert not (checkout / ".venv").exists()


def test_other_distribution_says_what_to_install(area: Path) -> None:
    checkout = copied(area / "checkout")
    done = launch(checkout, "--version", before=in_mounts(NO_PACKAGES, other_system(area)))
    line = only_line(done, 5)
    assert "Fedora Linux 44 is not Debian or Ubuntu; install by hand: python3 " in line
    assert "libxdp-dev" in line
    assert not (checkout / ".venv").exists()


def test_no_apt_says_what_to_install(area: Path) -> None:
    checkout = copied(area / "checkout")
    line = only_line(launch(checkout, "--version", before=in_mounts(NO_PACKAGES, NO_APT)), 5)
    assert "no apt-get here; install by hand: python3 " in line


def test_neither_apt_nor_dpkg_looks_at_what_is_there(area: Path) -> None:
    checkout = copied(area / "checkout")
    hidden = [
        NO_APT,
        "mount --bind /dev/null /usr/bin/dpkg-query",
        "mount --bind /dev/null $(readlink -f /usr/bin/gcc)",
        "mount -t tmpfs none /usr/lib/python3/dist-packages/bcc",
        other_system(area),
    ]
    line = only_line(launch(checkout, "--version", before=in_mounts(*hidden)), 5)
    assert line == (
        "sluice: Fedora Linux 44 has no apt; install by hand: bcc's Python module (python3-bcc), gcc, "
        "then run this again"
    )


def test_missing_packages_without_root(area: Path) -> None:
    checkout = copied(area / "checkout")
    os.chown(checkout, NOBODY, NOBODY)
    line = only_line(launch(checkout, "--version", before=in_mounts(NO_PACKAGES, user=NOBODY)), 4)
    assert "run this once as root (sudo tools/sluice --help)" in line
    assert "sudo apt-get install --no-install-recommends python3 python3-venv" in line


def test_directory_that_cannot_be_written(area: Path) -> None:
    checkout = copied(area / "checkout")
    line = only_line(launch(checkout, "--version", user=NOBODY), 4)
    assert f"{checkout} can't be written by nobody" in line


def test_no_python(area: Path) -> None:
    checkout = copied(area / "checkout")
    hidden = "mount --bind /dev/null $(readlink -f /usr/bin/python3)"
    line = only_line(launch(checkout, "--version", before=in_mounts(hidden)), 5)
    assert line == "sluice: no /usr/bin/python3; install python3 >= 3.11 (apt-get install python3)"


def test_environment_of_somebody_else_is_left_alone(area: Path) -> None:
    checkout = copied(area / "checkout")
    (checkout / ".venv").mkdir()
    (checkout / ".venv/precious").write_text("mine", encoding="utf-8")
    line = only_line(launch(checkout, "--version", TMPDIR=str(area)), 5)
    assert "move it away" in line
    assert (checkout / ".venv/precious").read_text(encoding="utf-8") == "mine"
    assert not list(area.glob("sluice-setup.*"))


def test_launcher_alone_is_no_checkout(area: Path) -> None:
    (area / "tools").mkdir()
    shutil.copy(ROOT / "tools/sluice", area / "tools")
    line = only_line(launch(area, "--version"), 5)
    assert "pyproject.toml is missing" in line


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck")
    assert shellcheck, "tools/sluice test installs it"
    done = subprocess.run(
        [shellcheck, str(ROOT / "tools/sluice"), str(ROOT / ".ci/run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
