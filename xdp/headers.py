# SPDX-License-Identifier: Apache-2.0
"""Find kernel headers that bcc can compile against.

bcc wants one directory that holds a configured kernel tree, and looks only in
``/lib/modules/RELEASE/{build,source}``.  Machines differ: a custom or cloud kernel often
has no headers package, Debian splits its headers into an architecture and a common
half, and some kernels carry their headers inside themselves (CONFIG_IKHEADERS).
`kernel_source` knows all of these and returns one directory to be given to bcc as
``BCC_KERNEL_SOURCE``; it changes neither the environment nor the system.

Headers of another kernel version will do: XDP programs use the stable user-space
interface (``include/uapi``), and bcc takes the rest only for its own helpers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import lzma
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from xdp.errors import PermissionsError, UnsupportedError

__all__ = ["default_cache", "kernel_source", "stamp", "version_of"]

INSTALL_HINT = (
    "install kernel headers: apt-get install linux-headers-$(uname -r), or any: linux-headers-amd64 "
    "(linux-headers-arm64) on Debian, linux-headers-generic on Ubuntu; or set BCC_KERNEL_SOURCE "
    "to a configured tree"
)

# Names of architecture folders in the kernel tree, where they differ from `uname -m`.
_ARCHITECTURES = {
    "x86_64": "x86",
    "aarch64": "arm64",
    "ppc64le": "powerpc",
    "riscv64": "riscv",
    "s390x": "s390",
    "loongarch64": "loongarch",
}

# What bcc's command line opens in every compilation: the first it includes by force, the second
# is what that file includes, the third stands for all of <asm/...>.
_NEEDED = ("include/linux/kconfig.h", "include/generated/autoconf.h", "arch/{arch}/include/asm")

# Cached trees are rebuilt when this changes; raise it when the merging itself changes.
_LAYOUT = 1


def kernel_source(
    *,
    root: Path = Path("/"),
    release: str | None = None,
    cache: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Return a directory that bcc accepts as ``BCC_KERNEL_SOURCE``.

    Looked at in this order: ``BCC_KERNEL_SOURCE`` itself, the running kernel's own headers
    (``/lib/modules/RELEASE/build``, merged with ``source`` where they are split), the kernel's
    built-in archive (``/sys/kernel/kheaders.tar.xz``), and any other installed headers: the
    newest that are not newer than the running kernel, else the oldest.

    Args:
        root: where the file system starts; another tree than ``/`` is for tests.
        release: the kernel release, as in ``uname -r``; the running one by default.
        cache: a private directory for merged or unpacked trees; see `default_cache`.
        environment: looked up for ``BCC_KERNEL_SOURCE``; ``os.environ`` by default.

    Raises:
        UnsupportedError: no usable headers; ``detail`` lists what was looked at.
        PermissionsError: the cache can't be written, or is not ours alone.
    """
    environment = os.environ if environment is None else environment
    release = platform.release() if release is None else release
    arch = _ARCHITECTURES.get(platform.machine(), platform.machine())
    rejected: list[str] = []

    given = environment.get("BCC_KERNEL_SOURCE")
    if given:
        if missing := _missing([Path(given)], arch):
            raise UnsupportedError(
                f"BCC_KERNEL_SOURCE={given} is no configured kernel tree: {missing} is missing",
                hint="unset it to let sluice look for headers, or " + INSTALL_HINT,
            )
        return Path(given)

    archive = root / "sys/kernel/kheaders.tar.xz"
    own = itertools.chain(_own(root, release), [[archive]] if archive.exists() else [])
    for sources in itertools.chain(own, _installed(root, release)):
        if sources == [archive]:
            return _cached(cache or default_cache(), sources, arch)
        if missing := _missing(sources, arch):
            rejected.append(f"{' + '.join(map(str, sources))}: {missing} is missing")
        elif len(sources) == 1:
            return sources[0]
        else:
            return _cached(cache or default_cache(), sources, arch)
    rejected.append(f"{archive}: not there")

    raise UnsupportedError(
        f"no kernel headers found for bcc (kernel {release})",
        hint=INSTALL_HINT,
        detail="\n".join(rejected),
    )


def default_cache() -> Path:
    """The directory for merged trees: /var/cache/sluice for root, else below the user's cache.

    Root never takes the directory from the environment: under sudo, HOME and XDG_CACHE_HOME may
    be another user's, who could then choose what root compiles.
    """
    if os.geteuid() == 0:
        return Path("/var/cache/sluice")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "sluice"


def version_of(text: str) -> tuple[int, ...]:
    """The leading version of a release or package name: "6.1.0-56-amd64" -> (6, 1, 0, 56).

    The number after the first dash is a distribution's build and counts only among equals; a
    text without a version gives ().
    """
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-(\d+))?", text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _own(root: Path, release: str) -> Iterator[list[Path]]:
    """The running kernel's own headers: alone where they are whole, else build with source."""
    modules = root / "lib/modules" / release
    build, source = modules / "build", modules / "source"
    if build.is_dir():
        yield [_real(build)]
        if source.is_dir() and _real(source) != _real(build):
            yield [_real(build), _real(source)]
    for halves in _pairs(root / "usr/src"):
        if halves[0].name == f"linux-headers-{release}":
            yield halves


def _installed(root: Path, release: str) -> list[list[Path]]:
    """All installed headers of other versions, the best choice first."""
    running = version_of(release)[:3]
    found = list(_pairs(root / "usr/src"))
    for build in (root / "lib/modules").glob("*/build"):
        if build.is_dir() and not any(_real(build) == halves[0] for halves in found):
            source = build.parent / "source"
            split = source.is_dir() and _real(source) != _real(build)
            found.append([_real(build), _real(source)] if split else [_real(build)])

    def version(halves: Sequence[Path]) -> tuple[int, ...]:
        return version_of(halves[0].name) or version_of(str(halves[0]))

    older = [halves for halves in found if version(halves)[:3] <= running]
    newer = [halves for halves in found if version(halves)[:3] > running]
    return sorted(older, key=version, reverse=True) + sorted(newer, key=version)


def _pairs(folder: Path) -> Iterator[list[Path]]:
    """Headers below /usr/src: [architecture half, common half] of Debian, or a whole tree (Ubuntu).

    "linux-headers-6.1.0-56-amd64" goes with "linux-headers-6.1.0-56-common", and
    "linux-headers-6.1.0-56-rt-amd64" with "linux-headers-6.1.0-56-common-rt".
    """
    commons = {path.name for path in folder.glob("linux-headers-*-common*")}
    for path in sorted(folder.glob("linux-headers-*")):
        if path.name in commons or not path.is_dir():
            continue
        base = re.match(r"linux-headers-\d+\.\d+\.\d+[^-]*(?:-\d+)?(?:~[^-]*|\+[^-]*)?", path.name)
        stem = base.group() if base else path.name
        flavour = "-rt" if "-rt-" in path.name else ""
        common = f"{stem}-common{flavour}"
        yield [_real(path), _real(folder / common)] if common in commons else [_real(path)]


def _real(path: Path) -> Path:
    return path.resolve()


def _missing(halves: Sequence[Path], arch: str) -> str:
    """The first needed file that no half has, "" when all are there."""
    for name in _NEEDED:
        wanted = name.format(arch=arch)
        if not any((half / wanted).exists() for half in halves):
            return wanted
    return ""


def _cached(cache: Path, sources: Sequence[Path], arch: str) -> Path:
    """The merged (several folders) or unpacked (one archive) tree in the cache, made when needed."""
    tree = cache / f"headers-{_key(sources)}"
    try:
        with _locked(cache):
            if not _missing([tree], arch):
                return tree
            if tree.exists():
                shutil.rmtree(tree)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as scratch:
                made = Path(scratch) / "tree"
                made.mkdir()
                if sources[0].is_dir():
                    _merge(made, sources)
                else:
                    _unpack(made, sources[0])
                if missing := _missing([made], arch):
                    raise UnsupportedError(
                        f"the headers in {sources[0]} are not usable: {missing} is missing", hint=INSTALL_HINT
                    )
                made.rename(tree)
    except OSError as error:
        raise PermissionsError(
            f"can't write kernel headers to {cache}: {error.strerror or error}",
            hint="run as root, make it writable, or set BCC_KERNEL_SOURCE to a configured kernel tree",
        ) from error
    return tree


def _key(sources: Sequence[Path]) -> str:
    """Changes when the sources do: a package update keeps the path but rewrites the configuration."""
    key = hashlib.sha256(f"{_LAYOUT}".encode())
    for source in sources:
        if source.is_dir():
            key.update(f"\0{stamp(source)}".encode())
        else:
            # A file in sysfs has no lasting time of change; the kernel's build does identify it.
            build = f"{platform.release()} {platform.version()} {source.stat().st_size}"
            key.update(f"\0{source}\0{build}".encode())
    return key.hexdigest()[:16]


def stamp(tree: Path) -> str:
    """Path and state of a configured tree; what was made of its files is good while this is the same."""
    configuration = tree / "include/generated/autoconf.h"
    return f"{tree}\0{configuration.stat().st_mtime_ns if configuration.exists() else ''}"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the cache alone, and only if nobody else could have put something into it."""
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = cache.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionsError(
            f"{cache} belongs to or can be written by other users; headers from there can't be trusted",
            hint=f"remove it: rm -r {cache}",
        )
    descriptor = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _merge(target: Path, sources: Sequence[Path]) -> None:
    """Lay folders over one another with links; the first one that has a name wins.

    Only folders that several sources have become real ones, all else is one link: about
    a hundred links for Debian's two halves.
    """
    owners: dict[str, list[Path]] = {}
    for source in sources:
        for entry in sorted(source.iterdir()):
            owners.setdefault(entry.name, []).append(entry)
    for name, entries in owners.items():
        folders = [entry for entry in entries if entry.is_dir()]
        if len(folders) > 1 and folders[0] == entries[0] and len({_real(one) for one in folders}) > 1:
            (target / name).mkdir()
            _merge(target / name, folders)
        else:
            (target / name).symlink_to(entries[0])


def _unpack(target: Path, archive: Path) -> None:
    """Unpack the kernel's own archive; nothing in it may land outside of `target`."""
    try:
        with tarfile.open(archive, mode="r:xz") as packed:
            members = packed.getmembers()
            for member in members:
                inside = (target / member.name).resolve().is_relative_to(target.resolve())
                if not inside or not (member.isfile() or member.isdir() or _harmless_link(member)):
                    raise UnsupportedError(
                        f"{archive} holds an entry that headers have no use for: {member.name}",
                        hint=INSTALL_HINT,
                    )
                member.uid = member.gid = os.geteuid()
                member.mode &= 0o755
            packed.extractall(target, members=members)  # noqa: S202 - every member was checked above
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UnsupportedError(f"{archive} can't be unpacked: {error}", hint=INSTALL_HINT) from error


def _harmless_link(member: tarfile.TarInfo) -> bool:
    return (
        member.issym() and not Path(member.linkname).is_absolute() and ".." not in Path(member.linkname).parts
    )
