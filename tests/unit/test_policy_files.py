# SPDX-License-Identifier: Apache-2.0
"""Policy and peers files that are not what they should be: one line each, and no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ordinary_user import readable_python
from tests.unit.policy_texts import peer_class, policy
from xdp.errors import PolicyError
from xdp.policy import MAX_FILE, Policy
from xdp.policy_peers import MAX_PEERS_FILE


def refusal(path: Path | str) -> str:
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def peers_refusal(tmp_path: Path, data: bytes) -> str:
    """What is said about a policy whose peers_file holds ``data``."""
    (tmp_path / "peers.txt").write_bytes(data)
    path = tmp_path / "p.toml"
    path.write_text(peer_class('peers = ["198.51.100.1"]\npeers_file = "peers.txt"'))
    message = refusal(path)
    start = f"{path}: class[0]"
    assert message.startswith(start)
    return message.removeprefix(start)


def test_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: there is no such file"


def test_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is a directory; allowed: a regular file"


def test_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is not a regular file" in refusal(tmp_path / "fifo")


def test_device() -> None:
    assert refusal("/dev/zero") == "/dev/zero: is not a regular file; allowed: a regular file"


def test_a_file_that_opens_but_cannot_be_read() -> None:
    assert refusal("/proc/self/mem") == "/proc/self/mem: cannot be read: Input/output error"


def test_nul_in_the_name() -> None:
    assert refusal("a\0b") == "a\\x00b: the file name holds a NUL"


def test_name_too_long() -> None:
    assert "cannot be opened: File name too long" in refusal("a" * 5000)


def test_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop")


def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(policy())
    path.chmod(0)
    tmp_path.chmod(0o755)
    # As an unprivileged user, in another process: root may read everything.
    script = (
        "import os, sys\n"
        "from xdp.policy import Policy\n"
        "from xdp.errors import PolicyError\n"
        f"descriptor = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "os.fchdir(descriptor)\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    Policy.load('p.toml')\n"
        "except PolicyError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        readable_python("-c", script) if os.geteuid() == 0 else [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.startswith("p.toml: may not be read by this user"), run.stderr


def test_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"version = 1 # \xff")
    assert refusal(path) == f"{path}: is not UTF-8 (byte 14); allowed: UTF-8 text"


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"\xef\xbb\xbf" + policy().encode())
    assert "byte order mark" in refusal(path)


def test_too_large(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(b"#" * (MAX_FILE + 1))
    assert refusal(path).endswith(f"is larger than {MAX_FILE} bytes; allowed: at most {MAX_FILE} bytes")
    path.write_bytes(policy().encode() + b"#" * (MAX_FILE - len(policy())))
    Policy.load(path)


def test_file_names_with_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb.toml"
    path.write_text("version = 2")
    assert "a\\x1b[31m\\nb.toml: version: found 2" in refusal(path)


def test_many_dots_in_strings_are_fine(tmp_path: Path) -> None:
    prefixes = ", ".join(f'"10.{i}.0.0/16"' for i in range(256))
    path = tmp_path / "p.toml"
    path.write_text(peer_class(f"prefixes = [{prefixes}] # {'.' * 100}"))
    assert len(Policy.load(path).classes[1].prefixes) == 256


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b"192.0.2.1\n192.0.2.300 x\n",
            ['.peers_file: peers.txt:2: found "192.0.2.300"', "one IPv4 or IPv6"],
        ),
        (b"192.0.2.0/24\n", [".peers_file: peers.txt:1: ", "belongs into prefixes"]),
        (b"127.0.0.1\n", [".peers_file: peers.txt:1: 127.0.0.1 is a loopback"]),
        (b"# a\n\n::ffff:192.0.2.1\n", [".peers_file: peers.txt:3: ", "write it as 192.0.2.1"]),
        (b"fe80::1%eth0\n", [".peers_file: peers.txt:1: "]),
        (b"192.0.2.1 " + b"n" * 65, [".peers_file: peers.txt:1: ", "1 to 64 printable"]),
        (b"192.0.2.1 a\x1b[2J", [".peers_file: peers.txt:1: ", "printable"]),
        (b"192.0.2.1\x00", [".peers_file: peers.txt:1: ", '"192.0.2.1\\x00"']),
        (b"192.0.2.1\n192.0.2.1\n", [": 192.0.2.1 is in this class already"]),
        (b"198.51.100.1\n", [": 198.51.100.1 is in this class already"]),
        (b"\xff", [".peers_file: peers.txt: is not UTF-8 (byte 0)"]),
        (b"x" * 2_000_000, [".peers_file: peers.txt:1: found", "xxx..."]),
        (b"#" * (MAX_PEERS_FILE + 1), [".peers_file: peers.txt: is larger than"]),
    ],
)
def test_bad_peers_files_name_file_and_line(tmp_path: Path, data: bytes, words: list[str]) -> None:
    message = peers_refusal(tmp_path, data)
    for word in words:
        assert word in message


def test_peers_file_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "p.toml"
    path.write_text(peer_class('peers_file = "d"'))
    assert refusal(path) == f"{path}: class[0].peers_file: d: is a directory; allowed: a regular file"
