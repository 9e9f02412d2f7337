# SPDX-License-Identifier: Apache-2.0
"""Finding kernel headers, over file trees as Debian, Ubuntu and CONFIG_IKHEADERS lay them out."""

from __future__ import annotations

import io
import os
import platform
import tarfile
import threading
from pathlib import Path

import pytest

from xdp.errors import PermissionsError, UnsupportedError
from xdp.headers import default_cache, kernel_source, version_of

RELEASE = "6.18.44-custom"
ARCH = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

COMMON = (
    "include/linux/kconfig.h",
    "include/linux/types.h",
    f"arch/{ARCH}/include/asm/byteorder.h",
    "Makefile",
)
CONFIGURED = ("include/generated/autoconf.h", f"arch/{ARCH}/include/generated/asm/wrapped.h", "Makefile")


def write(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{folder.name}\n", encoding="utf-8")
    return folder


def debian(root: Path, version: str = "6.1.0-56", flavour: str = "amd64", common: str = "common") -> Path:
    write(root / f"usr/src/linux-headers-{version}-{common}", COMMON)
    return write(root / f"usr/src/linux-headers-{version}-{flavour}", CONFIGURED)


def whole(root: Path, version: str) -> Path:
    return write(root / f"usr/src/linux-headers-{version}", COMMON + CONFIGURED)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    return made


def find(root: Path, release: str = RELEASE, **environment: str) -> Path:
    return kernel_source(root=root, release=release, cache=root.parent / "cache", environment=environment)


def test_environment_wins_over_everything(root: Path) -> None:
    whole(root, RELEASE)
    mine = write(root / "mine", COMMON + CONFIGURED)
    assert find(root, BCC_KERNEL_SOURCE=str(mine)) == mine


def test_environment_that_is_no_kernel_tree_is_refused(root: Path) -> None:
    whole(root, RELEASE)
    with pytest.raises(UnsupportedError, match=r"BCC_KERNEL_SOURCE=.*kconfig\.h is missing") as caught:
        find(root, BCC_KERNEL_SOURCE=str(root / "nowhere"))
    assert "unset it" in caught.value.hint


def test_empty_environment_means_unset(root: Path) -> None:
    tree = whole(root, RELEASE)
    assert find(root, BCC_KERNEL_SOURCE="") == tree


def test_own_headers_that_are_whole_are_used_as_they_are(root: Path) -> None:
    tree = whole(root, "6.8.0-45-generic")
    modules = root / "lib/modules/6.8.0-45-generic"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(tree)
    assert find(root, "6.8.0-45-generic") == tree
    assert not (root.parent / "cache").exists()


def test_own_headers_come_before_newer_ones(root: Path) -> None:
    own = whole(root, "6.8.0-45-generic")
    whole(root, "6.8.0-99-generic")
    assert find(root, "6.8.0-45-generic") == own


def test_split_headers_are_merged(root: Path) -> None:
    flavour = debian(root)
    merged = find(root)
    assert merged.parent == root.parent / "cache"
    for name in COMMON + CONFIGURED:
        assert (merged / name).is_file()
    # Where both halves have a file, the configured half is the one that matters.
    assert (merged / "Makefile").read_text(encoding="utf-8") == f"{flavour.name}\n"
    # What only one has is one link, not a copy of thousands of files.
    assert (merged / "include/linux").is_symlink()
    assert (merged / "include/generated").is_symlink()
    assert not (merged / "include").is_symlink()


def test_split_headers_of_the_running_kernel_by_module_links(root: Path) -> None:
    flavour = debian(root)
    modules = root / "lib/modules/6.1.0-56-amd64"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(flavour)
    (modules / "source").symlink_to(flavour.with_name("linux-headers-6.1.0-56-common"))
    assert (find(root, "6.1.0-56-amd64") / "include/linux/kconfig.h").is_file()


def test_realtime_flavour_goes_with_its_own_common_half(root: Path) -> None:
    debian(root, flavour="rt-amd64", common="common-rt")
    merged = find(root)
    assert (merged / "include/linux/types.h").read_text(encoding="utf-8").strip().endswith("common-rt")


def test_dangling_links_are_passed_over(root: Path) -> None:
    modules = root / "lib/modules" / RELEASE
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(root / "usr/src/removed")
    tree = whole(root, "6.1.0-1-amd64")
    assert find(root) == tree


def test_second_call_gives_the_same_tree_untouched(root: Path) -> None:
    debian(root)
    first = find(root)
    before = first.stat()
    assert find(root) == first
    assert first.stat().st_mtime_ns == before.st_mtime_ns
    assert first.stat().st_ino == before.st_ino


def test_package_update_makes_a_new_tree(root: Path) -> None:
    flavour = debian(root)
    first = find(root)
    os.utime(flavour / "include/generated/autoconf.h", ns=(1, 1))
    assert find(root) != first


def test_broken_tree_in_the_cache_is_made_again(root: Path) -> None:
    debian(root)
    merged = find(root)
    (merged / "include/generated").unlink()
    assert find(root) == merged
    assert (merged / "include/generated/autoconf.h").is_file()


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (["6.1.0-9-amd64", "6.1.0-56-amd64", "5.15.0-1-amd64"], "6.1.0-56-amd64"),
        (["6.19.0-1-amd64", "6.1.0-9-amd64"], "6.1.0-9-amd64"),  # not newer than the running kernel
        (["7.2.0-1-amd64", "6.19.0-1-amd64"], "6.19.0-1-amd64"),  # all newer: the nearest
        (["6.18.44-3-amd64", "6.18.0-1-amd64"], "6.18.44-3-amd64"),
    ],
)
def test_choice_among_other_versions(root: Path, installed: list[str], chosen: str) -> None:
    for version in installed:
        whole(root, version)
    assert find(root).name == f"linux-headers-{chosen}"


def test_unusable_halves_are_passed_over(root: Path) -> None:
    write(root / "usr/src/linux-headers-6.2.0-1-amd64", CONFIGURED)  # its common half is not installed
    older = whole(root, "6.1.0-1-generic")
    assert find(root) == older


def test_headers_only_below_modules_are_found(root: Path) -> None:
    tree = write(root / "opt/kernel-6.6", COMMON + CONFIGURED)
    modules = root / "lib/modules/6.6.1"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(tree)
    assert find(root) == tree


def test_nothing_found_says_what_to_install_and_what_was_looked_at(root: Path) -> None:
    lonely = write(root / "usr/src/linux-headers-6.2.0-1-amd64", CONFIGURED)
    with pytest.raises(UnsupportedError, match=f"no kernel headers.*{RELEASE}") as caught:
        find(root)
    assert "apt-get install linux-headers" in caught.value.hint
    assert f"{lonely}: include/linux/kconfig.h is missing" in caught.value.detail
    assert "kheaders.tar.xz: not there" in caught.value.detail
    assert "\n" not in str(caught.value)


def archive(root: Path, members: list[tarfile.TarInfo]) -> Path:
    path = root / "sys/kernel/kheaders.tar.xz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:xz") as packed:
        for member in members:
            packed.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size, made.mode = kind, target, int(kind == tarfile.REGTYPE), 0o644
    return made


GOOD = [member(f"./{name}") for name in dict.fromkeys(COMMON + CONFIGURED)]


def test_kernels_own_archive_is_unpacked_once(root: Path) -> None:
    archive(root, [*GOOD, member("./include/alias.h", tarfile.SYMTYPE, "linux/types.h")])
    whole(root, "6.1.0-1-amd64")  # the archive fits the kernel better
    tree = find(root)
    assert tree.parent == root.parent / "cache"
    assert (tree / "include/alias.h").read_text(encoding="utf-8") == "x"
    inode = tree.stat().st_ino
    assert find(root).stat().st_ino == inode


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside.h"),
        member("/etc/outside.h"),
        member("include/link.h", tarfile.SYMTYPE, "/etc/passwd"),
        member("include/link.h", tarfile.SYMTYPE, "../../../up"),
        member("include/device", tarfile.CHRTYPE),
        member("include/fifo", tarfile.FIFOTYPE),
    ],
    ids=["parent", "absolute", "link-absolute", "link-parent", "device", "fifo"],
)
def test_archive_entries_that_leave_the_tree_are_refused(root: Path, bad: tarfile.TarInfo) -> None:
    archive(root, [*GOOD, bad])
    with pytest.raises(UnsupportedError, match="no use for"):
        find(root)
    assert [path.name for path in (root.parent / "cache").iterdir()] == [".lock"]
    assert not (root.parent / "outside.h").exists()


def test_torn_archive_is_one_line(root: Path) -> None:
    path = archive(root, GOOD)
    whole_archive = path.read_bytes()
    path.write_bytes(whole_archive[: len(whole_archive) // 2])
    with pytest.raises(UnsupportedError, match="can't be unpacked"):
        find(root)


def test_archive_that_is_none(root: Path) -> None:
    path = archive(root, GOOD)
    path.write_bytes(b"not xz at all")
    with pytest.raises(UnsupportedError, match="can't be unpacked"):
        find(root)


def test_archive_without_headers_is_refused(root: Path) -> None:
    archive(root, GOOD[:1])
    with pytest.raises(UnsupportedError, match="not usable"):
        find(root)


def test_cache_that_others_may_write_is_refused(root: Path) -> None:
    debian(root)
    cache = root.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(PermissionsError, match="can't be trusted") as caught:
        find(root)
    assert caught.value.hint == f"remove it: rm -r {cache}"


def test_cache_that_cannot_be_made_is_one_line(root: Path) -> None:
    debian(root)
    (root.parent / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(PermissionsError, match="can't write kernel headers"):
        find(root)


def test_many_at_once_make_one_tree(root: Path) -> None:
    debian(root)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find(root))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert sorted(path.name for path in (root.parent / "cache").iterdir()) == [".lock", found[0].name]


def test_root_never_takes_the_cache_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/somebody/cache")
    assert default_cache() == Path(
        "/var/cache/sluice" if os.geteuid() == 0 else "/home/somebody/cache/sluice"
    )


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("6.1.0-56-amd64", (6, 1, 0, 56)),
        ("linux-headers-6.8.0-45-generic", (6, 8, 0, 45)),
        ("6.18.44-fc-v782", (6, 18, 44, 0)),
        ("5.15", (5, 15, 0, 0)),
        ("none", ()),
    ],
)
def test_version_of(text: str, version: tuple[int, ...]) -> None:
    assert version_of(text) == version


def test_this_machine_has_headers_that_bcc_can_use() -> None:
    tree = kernel_source()
    assert (tree / "include/linux/kconfig.h").is_file()
    assert (tree / "include/generated/autoconf.h").is_file()
    assert (tree / f"arch/{ARCH}/include/asm").is_dir()
