# SPDX-License-Identifier: Apache-2.0
"""QEMU and a kernel for ``sluice lab vm``: Debian's packages, unpacked into a cache and not installed.

Everything is of one Debian release and its backports, whatever this machine runs: QEMU with all its
libraries, down to the C library, so that it needs nothing of the system.  apt does the work, with a
configuration, lists and a status of its own: it checks the archive's signature and every package's hash, and
leaves the system's packages alone.  Mirror and proxy are those of the system's own apt.

The cache is filled once and complete or not there at all: it is built beside its place and renamed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xdp.errors import BusyError, SluiceError, UnsupportedError
from xdp.headers import default_cache

#: QEMU has igb since 8.0, Linux its zero-copy since 6.14: this release and its backports have both.
SUITE: Final = "trixie"
BACKPORTS: Final = f"{SUITE}-backports"
#: For machines whose own apt has no Debian mirror.
DEFAULT_MIRROR: Final = "http://deb.debian.org/debian"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: Names the newest kernel by what it depends on.
KERNEL: Final = "linux-image-amd64"
PROGRAMS: Final = ("qemu-system-x86", "busybox-static")
#: Changed when what is unpacked, or how, changes.
LAYOUT: Final = 1

_LOCK_NAME: Final = ".lock"
_COMPLETE: Final = f"system-{LAYOUT}"
_MAKING: Final = ".making-"

Say = Callable[[str], None]


@dataclass(frozen=True)
class System:
    """What was unpacked: ``root`` is a file system tree, ``kernel`` a release as ``uname -r`` shows it."""

    root: Path
    kernel: str

    @property
    def image(self) -> Path:
        """The kernel to boot."""
        return self.modules / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The kernel's modules."""
        return self.root / "usr/lib/modules" / self.kernel

    @property
    def busybox(self) -> Path:
        """A shell that needs no library."""
        return self.root / "usr/bin/busybox"

    def program(self, name: str) -> list[str]:
        """The beginning of a command line that runs a program with the libraries that came with it."""
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        loader = self.root / "usr/lib64/ld-linux-x86-64.so.2"
        return [str(loader), "--library-path", str(libraries), str(self.root / "usr/bin" / name)]


def cache() -> Path:
    """Where it is all kept."""
    return default_cache() / "vm"


def find(folder: Path) -> System | None:
    """What an earlier run has unpacked."""
    root = folder / _COMPLETE
    kernels = sorted(path.parent.name for path in (root / "usr/lib/modules").glob("*/vmlinuz"))
    return System(root, kernels[-1]) if kernels else None


def provide(folder: Path, say: Say) -> System:
    """What `find` finds, fetched first where it is not there.

    Raises:
        UnsupportedError: no apt, no key of Debian's archive, another processor.
        BusyError: another process is fetching.
        SluiceError: apt fails; its words are the detail.
    """
    if found := find(folder):
        return found
    if os.uname().machine != "x86_64":
        raise UnsupportedError(f"QEMU and a kernel are fetched for x86_64, not {os.uname().machine}")
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UnsupportedError(f"there is no {program}", hint="run it on Debian or Ubuntu")
    if not KEYRING.exists():
        raise UnsupportedError(
            f"no key to check Debian's packages with: {KEYRING}",
            hint="apt-get install debian-archive-keyring",
        )
    with _locked(folder):
        if found := find(folder):
            return found
        for left in folder.glob(f"{_MAKING}*"):  # by one that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_MAKING) as scratch:
            _fetch(Path(scratch), say).rename(folder / _COMPLETE)
    made = find(folder)
    if made is None:
        raise SluiceError(f"the packages hold no kernel image: {folder / _COMPLETE}")
    return made


def mirror_of(index_targets: Iterable[str]) -> str:
    """The mirror of the system's own apt: its first address that ends in /debian, else Debian's own."""
    for line in index_targets:
        address = line.strip().rstrip("/")
        if re.fullmatch(r"https?://\S+/debian", address):
            return address
    return DEFAULT_MIRROR


def sources(mirror: str, keyring: Path = KEYRING) -> str:
    """In the format of sources.list(5)."""
    return (
        f"Types: deb\nURIs: {mirror}\nSuites: {SUITE} {BACKPORTS}\nComponents: main\n"
        f"Architectures: amd64\nSigned-By: {keyring}\n"
    )


def configuration(folder: Path) -> str:
    """apt.conf(5): all that apt reads and writes is in ``folder``; proxies and the like stay the system's."""
    directories = {
        "Dir::State": folder,
        "Dir::State::status": folder / "status",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::sourcelist": Path("/dev/null"),
        "Dir::Etc::sourceparts": folder / "sources",
        "Dir::Etc::preferences": Path("/dev/null"),
        "Dir::Etc::preferencesparts": Path("/dev/null"),
        "Dir::Log": folder,
    }
    options = {
        "APT::Architecture": "amd64",
        "APT::Install-Recommends": "false",
        # The folder is root's alone; apt's own user could not write there.
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    # What the system does after its own updates is nothing to do here.
    hooks = ("APT::Update::Pre-Invoke", "APT::Update::Post-Invoke", "APT::Update::Post-Invoke-Success",
             "DPkg::Pre-Install-Pkgs", "DPkg::Post-Invoke", "APT::Architectures",
             "Acquire::IndexTargets::deb::DEP-11", "Acquire::IndexTargets::deb::Contents-deb")  # fmt: skip
    lines = [f"#clear {name};" for name in hooks]
    lines += [f'{name} "{value}";' for name, value in {**directories, **options}.items()]
    return "\n".join([*lines, 'APT::Architectures { "amd64"; };', ""])


def dependency(stanza: str, pattern: str) -> str | None:
    """The first package that a stanza of ``apt-cache show`` depends on and whose name matches."""
    for line in stanza.splitlines():
        if line.startswith("Depends: "):
            names = [entry.strip().split()[0] for entry in re.split(r"[,|]", line[len("Depends: ") :])]
            return next((name for name in names if re.fullmatch(pattern, name)), None)
    return None


def kernel_packages(image: str, stanza: str) -> list[str]:
    """Of a kernel: image and modules; newer kernels have them in two packages beside an empty one."""
    release = image.removeprefix("linux-image-")
    if dependency(stanza, re.escape(f"linux-binary-{release}")):
        return [f"linux-binary-{release}", f"linux-modules-{release}"]
    return [image]


def package_files(print_uris: str) -> list[str]:
    """The files that ``apt-get --print-uris install`` names, as they are called in the archives folder."""
    return re.findall(r"^'[^']+' (\S+\.deb) \d+ ", print_uris, re.MULTILINE)


def _fetch(folder: Path, say: Say) -> Path:
    for name in ("lists/partial", "archives/partial", "sources", "root"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()  # nothing is installed: so every library comes along
    (folder / "apt.conf").write_text(configuration(folder), encoding="utf-8")
    targets = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], None)
    mirror = mirror_of(targets.splitlines())
    (folder / "sources/debian.sources").write_text(sources(mirror), encoding="utf-8")
    apt = folder / "apt.conf"
    say(f"reading the package lists of {SUITE} and {BACKPORTS}")
    _run(["apt-get", "update", "-qq"], apt)
    image = dependency(_show(f"{KERNEL}/{BACKPORTS}", apt), r"linux-image-\d.*")
    if image is None:
        raise SluiceError(f"{KERNEL} of {BACKPORTS} names no kernel")
    kernel = kernel_packages(image, _show(f"{image}/{BACKPORTS}", apt))
    wanted = [*PROGRAMS, *(f"{name}/{BACKPORTS}" for name in kernel)]
    install = ["apt-get", "install", "-y", "-qq"]
    files = package_files(_run([*install, "--print-uris", *wanted], apt))
    say(f"fetching {len(files)} packages: QEMU and {image.removeprefix('linux-image-')}")
    _run([*install, "--download-only", *wanted], apt)
    say("unpacking them")
    for name in files:
        _run(["dpkg-deb", "-x", str(folder / "archives" / name), str(folder / "root")], None)
    return folder / "root"


def _show(package: str, apt: Path) -> str:
    return _run(["apt-cache", "show", package], apt).split("\n\n")[0]


def _run(command: list[str], apt: Path | None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    if apt is not None:
        # Not APT_CONFIG: that is read before the system's files, which would have the last word.
        command = [command[0], "-c", str(apt), *command[1:]]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise SluiceError(
            f"{command[0]} failed: {words.splitlines()[-1] if words else done.returncode}",
            hint="is a Debian mirror reachable? `apt-get update` tells",
            detail=words,
        )
    return done.stdout


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BusyError("another process is fetching QEMU and a kernel", hint="wait for it") from None
    finally:
        os.close(descriptor)
