# SPDX-License-Identifier: Apache-2.0
"""`sluice lab vm`, without a machine: the packages, the image, the command lines and the verdict."""

from __future__ import annotations

import json
import lzma
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sluice_cli import vm_command, vm_guest, vm_image, vm_machine, vm_packages
from sluice_cli.vm_machine import Outcome
from sluice_cli.vm_packages import System
from sluice_cli.vm_report import MODE, PATHS, Case, Report, Way, decode, encode, problems, read_junit
from xdp.errors import BusyError, UnsupportedError

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "7.3.4+deb13-amd64"

META = f"""Package: linux-image-amd64
Version: 7.3.4-1~bpo13+1
Depends: linux-base-amd64 (= 7.3.4-1~bpo13+1), linux-image-{KERNEL} (= 7.3.4-1~bpo13+1)
"""
SPLIT = f"""Package: linux-image-{KERNEL}
Depends: dracut | initramfs-tools (>= 0.120), linux-binary-{KERNEL} (= 7.3.4-1), linux-modules-{KERNEL}
"""


class TestPackages:
    @pytest.mark.parametrize(
        ("targets", "mirror"),
        [
            (["http://mirror.example/debian/", "http://mirror.example/debian-security/"], "http://mirror.example/debian"),
            (["http://archive.example/ubuntu/"], vm_packages.DEFAULT_MIRROR),
            (["mirror+file:/etc/apt/mirrors/debian.list", "https://m.example/x/debian"], "https://m.example/x/debian"),
            ([], vm_packages.DEFAULT_MIRROR),
        ],
    )  # fmt: skip
    def test_the_systems_own_mirror(self, targets: list[str], mirror: str) -> None:
        assert vm_packages.mirror_of(targets) == mirror
        lines = vm_packages.sources(mirror).splitlines()
        assert f"URIs: {mirror}" in lines
        assert any(line.startswith("Signed-By: /") for line in lines)

    def test_the_kernel_is_what_the_newest_depends_on(self) -> None:
        image = vm_packages.dependency(META, r"linux-image-\d.*")
        assert image == f"linux-image-{KERNEL}"
        assert vm_packages.kernel_packages(image, SPLIT) == [
            f"linux-binary-{KERNEL}",
            f"linux-modules-{KERNEL}",
        ]
        whole = "linux-image-6.16.3-amd64"
        assert vm_packages.kernel_packages(whole, "Depends: kmod, linux-base\n") == [whole]
        assert vm_packages.dependency("Package: x\n", ".*") is None

    def test_files_that_apt_would_fetch(self) -> None:
        said = (
            "'http://m.example/pool/a.deb' qemu-system-x86_1%3a10.0_amd64.deb 10278596 SHA256:00\n"
            "Reading package lists...\n"
            "'http://m.example/pool/b.deb' busybox-static_1.37_amd64.deb 5 SHA256:01\n"
        )
        assert vm_packages.package_files(said) == [
            "qemu-system-x86_1%3a10.0_amd64.deb",
            "busybox-static_1.37_amd64.deb",
        ]

    @pytest.mark.skipif(shutil.which("apt-config") is None, reason="has no apt")
    def test_apt_reads_and_writes_only_in_the_cache(self, tmp_path: Path) -> None:
        """As apt itself understands the configuration."""
        path = tmp_path / "apt.conf"
        path.write_text(vm_packages.configuration(tmp_path), encoding="utf-8")
        done = subprocess.run(
            ["apt-config", "-c", str(path), "dump"], capture_output=True, text=True, check=True
        )
        said = dict(line.rstrip(";").split(" ", 1) for line in done.stdout.splitlines())
        for name in ("Dir::State", "Dir::Cache", "Dir::Log"):
            assert said[name] == f'"{tmp_path}"'
        assert said["Dir::State::status"] == f'"{tmp_path}/status"'
        assert said["APT::Install-Recommends"] == '"false"'
        hooks = ("DPkg::Post-Invoke", "DPkg::Pre-Install-Pkgs", "APT::Update::Post-Invoke")
        assert not any(value != '""' for name, value in said.items() if name.startswith(hooks))

    def test_an_unfinished_cache_is_none(self, tmp_path: Path) -> None:
        (tmp_path / ".making-1/root/usr/lib/modules" / KERNEL).mkdir(parents=True)
        (tmp_path / ".making-1/root/usr/lib/modules" / KERNEL / "vmlinuz").touch()
        assert vm_packages.find(tmp_path) is None
        (tmp_path / ".making-1/root").rename(tmp_path / f"system-{vm_packages.LAYOUT}")
        found = vm_packages.find(tmp_path)
        assert found is not None
        assert found.kernel == KERNEL
        assert found.image.exists()
        assert vm_packages.provide(tmp_path, print) == found  # and nothing is fetched

    def test_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vm_packages, "KEYRING", tmp_path / "none.gpg")
        with pytest.raises(UnsupportedError, match=r"none\.gpg") as caught:
            vm_packages.provide(tmp_path, print)
        assert "debian-archive-keyring" in caught.value.hint
        monkeypatch.setattr(vm_packages, "KEYRING", tmp_path)
        with vm_packages._locked(tmp_path), pytest.raises(BusyError, match="another process"):
            vm_packages.provide(tmp_path, print)


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """(mode, content) by name, as the kernel reads the format "newc" (init/initramfs.c)."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[start : start + 8], 16) for start in range(at + 6, at + 110, 8)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        at = (at + 110 + length + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(archive)
            return found
        found[name[:-1].decode()] = (mode, archive[at : at + size])
        at = (at + size + 3) & ~3


def module(*needs: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"


class TestImage:
    @pytest.fixture
    def system(self, tmp_path: Path) -> System:
        made = System(tmp_path, KERNEL)
        (made.modules / "kernel").mkdir(parents=True)
        (tmp_path / "usr/bin").mkdir()
        made.busybox.write_bytes(b"busybox")
        (made.modules / "modules.builtin").write_text("kernel/fs/virtio_pci.ko\n", encoding="ascii")
        modules = {
            "9p": ("9pnet", "netfs"), "9pnet": ("netfs",), "netfs": (), "9pnet_virtio": ("9pnet",),
            "virtio_net": ("net_failover",), "net_failover": ("failover",), "failover": (),
            "igb": ("i2c-algo-bit",), "i2c-algo-bit": (), "unused": (), "overlay": (),
        }  # fmt: skip
        for number, (name, needs) in enumerate(modules.items()):
            content = module(*needs)
            path = made.modules / "kernel" / f"{name}.ko{'.xz' if number % 2 else ''}"
            path.write_bytes(lzma.compress(content) if number % 2 else content)
        return made

    def test_each_module_comes_behind_what_it_needs(self, system: System) -> None:
        order = vm_image.load_order(system.modules, [*vm_image.MODULES, "virtio_pci"])
        names = [name for name, _ in order]
        assert sorted(names) == sorted(
            ["netfs", "9pnet", "9p", "9pnet_virtio", "overlay", "failover", "net_failover", "virtio_net",
             "i2c_algo_bit", "igb"]
        )  # fmt: skip
        for name, content in order:
            for needed in vm_image.depends(content):
                assert names.index(needed.replace("-", "_")) < names.index(name)
        with pytest.raises(UnsupportedError, match="no module nonesuch"):
            vm_image.load_order(system.modules, ["nonesuch"])

    def test_what_the_machine_starts_with(self, system: System) -> None:
        job = vm_image.Job(("python", "-m", "x y"), {"A": "b c"}, 60)
        found = unpack(vm_image.initramfs(system, job))
        assert found["init"] == (0o100755, job.init.encode())
        assert found["bin/busybox"] == (0o100755, b"busybox")
        assert found["root"] == (0o40755, b"")
        modules = sorted(name for name in found if name.startswith("modules/"))
        assert len(modules) == 10
        assert all(b"depends=" in found[name][1] for name in modules)

    def test_the_first_process(self) -> None:
        """A shell reads it, and the job's words stay words."""
        job = vm_image.Job(("python", "-m", "x y"), {"A": "it's"}, 60)
        subprocess.run(["sh", "-n"], input=job.init, text=True, check=True)
        (line,) = [line for line in job.init.splitlines() if "chroot" in line]
        assert shlex.split(line)[2:] == ["/root", "/usr/bin/env", "-i", "A=it's", "python", "-m", "x y"][0:]
        assert "sleep 60;" in job.init

    def test_archives_of_odd_lengths(self) -> None:
        entries = [("a" * length, 0o100644, b"5" * length) for length in range(1, 9)]
        assert unpack(vm_image.archive(entries)) == {name: (mode, text) for name, mode, text in entries}


class TestMachine:
    SYSTEM = System(Path("/cache/system"), KERNEL)

    @pytest.mark.parametrize("driver", vm_machine.DRIVERS)
    def test_command_line(self, driver: vm_machine.Driver) -> None:
        words = vm_machine.command_line(self.SYSTEM, driver, "I", "C", "R")
        assert words[0].startswith("/cache/system/")  # nothing of this machine's own
        text = " ".join(words)
        assert "readonly=on" in text
        assert "accel=tcg" in text
        assert "-netdev user" not in text  # no way out
        backends = [words[at + 1] for at, word in enumerate(words) if word == "-netdev"]
        devices = [words[at + 1] for at, word in enumerate(words) if word == "-device"]
        cards = [device for device in devices if "netdev=" in device]
        assert len(backends) == len(cards) == 2
        for mac, card in zip((vm_machine.SERVER_MAC, vm_machine.CLIENT_MAC), cards, strict=True):
            assert f"mac={mac}" in card
        if driver == "virtio":
            assert all("disable-legacy=on,iommu_platform=on" in card for card in cards)
            assert all("queues=2" in backend for backend in backends)
        else:
            assert len({card.split("bus=")[1] for card in cards}) == 2

    def test_network(self) -> None:
        assert vm_machine.network_commands("igb") == []
        made = [" ".join(words) for words in vm_machine.network_commands("virtio")]
        assert sum("multi_queue" in line for line in made) == 2
        backends = " ".join(vm_machine.card_options("virtio"))
        assert all(
            f"ifname={tap}," in backends and any(tap in line for line in made) for tap in ("tap0", "tap1")
        )

    def test_tests_that_are_run_are_there(self) -> None:
        for name in vm_guest.TESTS:
            assert (ROOT / name).is_file()
        assert vm_guest.left_out("igb").items() > vm_guest.left_out("virtio_net").items()
        for test in vm_guest.left_out("igb"):
            file, name = test.split("::")
            assert file in vm_guest.TESTS
            assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")
        text = (ROOT / vm_guest.TESTS[0]).read_text(encoding="utf-8")
        assert all(f"def test_{way}(" in text for way in PATHS)


JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite tests="4">
<testcase classname="tests.traffic.test_paths" name="test_receive"><properties>
<property name="mode" value="native-zero-copy"/><property name="queues" value="2"/>
<property name="sent" value="20"/><property name="received" value="20"/><property name="intact" value="20"/>
</properties></testcase>
<testcase classname="tests.kernel.test_a" name="test_b[4]"><failure message="assert 1 == 2"/></testcase>
<testcase classname="tests.kernel.test_a" name="test_c"><error message="broken"/></testcase>
<testcase classname="tests.kernel.test_a" name="test_d"><skipped message="none here"/></testcase>
</testsuite></testsuites>"""


def good() -> Report:
    counts = {"sent": 9, "received": 8, "intact": 8, "seen": 8}
    ways = tuple(Way(name, MODE, 2, counts if name == "flood" else {**counts, "sent": 8}) for name in PATHS)
    return Report("virtio_net", KERNEL, 1.5, 0, (Case("a::b", "passed"),), ways)


class TestReport:
    def test_from_pytest(self) -> None:
        tests, ways = read_junit(JUNIT)
        assert [test.outcome for test in tests] == ["passed", "failed", "failed", "skipped"]
        assert tests[1] == Case("tests.kernel.test_a::test_b[4]", "failed", "assert 1 == 2")
        assert ways == [Way("receive", MODE, 2, {"sent": 20, "received": 20, "intact": 20})]
        for text in ("", JUNIT[:-20], "<a"):
            with pytest.raises(ValueError, match="no report of pytest's"):
                read_junit(text)

    def test_there_and_back(self) -> None:
        assert decode(encode(good())) == good()
        assert json.loads(encode(good()))["version"] == 1

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "nothing"),
            (encode(good())[:-1], "torn"),
            ("{}x\n", "no JSON"),
            ('{"version": 2}\n', "version 1"),
            ("[]\n", "version 1"),
            ('{"version": 1}\n', "shape"),
            ('{"version": 1, "tests": [{"a": 1}], "paths": []}\n', "shape"),
        ],
    )
    def test_what_is_none(self, text: str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            decode(text)

    def test_all_well(self) -> None:
        assert problems(good(), KERNEL) == []

    def test_everything_else_is_told(self) -> None:
        report = good()

        def wrong(way: Way) -> list[str]:
            return problems(replace(report, paths=(way, *report.paths[1:])), KERNEL)

        first = report.paths[0]
        assert wrong(replace(first, mode="native-copy")) == ["receive: the mode is native-copy, not " + MODE]
        assert wrong(replace(first, queues=1)) == ["receive: 1 queues, not 2"]
        assert wrong(replace(first, counts={"sent": 9, "received": 8, "intact": 8})) == [
            "receive: 9 sent, 8 received, 8 intact"
        ]
        assert wrong(replace(first, counts={"sent": 8, "received": 8, "intact": 7}))
        assert wrong(replace(first, counts={"sent": 0, "received": 0, "intact": 0}))
        assert wrong(replace(first, counts={}))
        flood = replace(report.paths[-1], counts={"sent": 9, "received": 8, "intact": 8, "seen": 9})
        assert problems(replace(report, paths=(*report.paths[:-1], flood)), KERNEL)
        assert problems(replace(report, paths=report.paths[1:]), KERNEL) == ["receive: not tried"]
        assert problems(replace(report, exit_code=2), KERNEL) == ["pytest ended with code 2"]
        assert problems(report, "6.1.0") == [f"it ran {KERNEL}, not 6.1.0"]
        for outcome in ("failed", "skipped"):
            tests = (*report.tests, Case("a::c", outcome, "why"))
            assert problems(replace(report, tests=tests), KERNEL) == [f"a::c {outcome}: why"]


class TestVerdict:
    def test_of_a_machine(self) -> None:
        well = Outcome(0, "console", encode(good()), 1.0, late=False)
        assert vm_command.judge(well, 60, KERNEL) == (good(), [])
        assert vm_command.judge(replace(well, late=True), 60, KERNEL) == (good(), ["not done after 60 s"])
        over = replace(well, console=f"{vm_image.TIME_IS_OVER}\n", report="")
        assert vm_command.judge(over, 60, KERNEL)[1][0] == "not done after 60 s"
        console = "\x1b[2J\x1bc" + "".join(f"line {number}\r\n" for number in range(100)) + "panic\r\n"
        report, (said,) = vm_command.judge(replace(well, report="", console=console), 60, KERNEL)
        assert report is None
        assert said.startswith("the machine reported nothing; its console ends:\n  line 61\n")
        assert said.endswith("\n  panic")
        assert "\x1b" not in said

    def test_the_job_is_this_python_on_this_checkout(self) -> None:
        job = vm_command.job_of(ROOT, 60)
        assert job.command[1:] == ("-m", "sluice_cli.vm_guest")
        assert job.environment["PYTHONPATH"].split(":")[0] == str(ROOT)
