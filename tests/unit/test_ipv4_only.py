# SPDX-License-Identifier: Apache-2.0
"""Kernel-socket lanes where the kernel has no IPv6: socket(AF_INET6) fails with EAFNOSUPPORT.

So it is after booting with ipv6.disable=1.  No sysctl and no namespace does that (with
net.ipv6.conf.all.disable_ipv6=1 such sockets can still be made and bound, see
tests/kernel/test_kernel_sockets.py), but a seccomp filter (seccomp(2)) makes the kernel
give exactly this answer to one process.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Number of the system call socket (asm/unistd_64.h, asm-generic/unistd.h).
SOCKET = {"x86_64": 41, "aarch64": 198}

PROGRAM = """
import ctypes, errno, socket, struct, sys
from ipaddress import IPv4Address

# Classic BPF over struct seccomp_data: number at 0, first argument at 16 (low half; little endian).
filter = [
    (0x20, 0, 0, 0),  # ld number
    (0x15, 0, 3, {number}),  # jeq socket, else allow
    (0x20, 0, 0, 16),  # ld family
    (0x15, 0, 1, socket.AF_INET6),  # jeq, else allow
    (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),  # SECCOMP_RET_ERRNO
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in filter))
program = ctypes.create_string_buffer(struct.pack("@HP", len(filter), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
prctl = libc.prctl
prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
assert prctl(38, 1, None, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, ctypes.addressof(program), 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, filter
try:
    socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sys.exit("the filter does not work")
except OSError as error:
    assert error.errno == errno.EAFNOSUPPORT

from userspace.datagram.companion import Companion
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.portable import PortableLanes
from xdp.errors import UnsupportedError
from xdp.policy import Policy

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.bind(("0.0.0.0", 0))
    port = probe.getsockname()[1]
policy = Policy.parse('''
version = 1
[[lane]]
name = "all"
[[class]]
name = "me"
prefixes = ["127.0.0.0/8"]
[[service]]
name = "s"
ports = [%d]
[[service.rule]]
class = "me"
action = "lane"
lane = "all"
''' % port)

def exchange(lanes):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect(("127.0.0.1", port))
        client.send(b"question")
        batch = lanes.receive(timeout=10)
        assert batch.source(0) == (IPv4Address("127.0.0.1"), client.getsockname()[1])
        assert (batch.lanes[0], batch.classes[0]) == (0, 1)
        assert lanes.send_back(batch) == 1
        assert client.recv(100) == b"question"
    assert lanes.send(("::1", 9), [b"a", b"b"]) == 0
    assert [failure.errno for failure in lanes.failures] == [errno.EAFNOSUPPORT] * 2
    assert lanes.statistics().balanced

name = sys.argv[1]
if name == "companion":
    companion = Companion.open(policy)
    exchange(companion.lanes)
    companion.close()
else:
    with dict(mmsg=MmsgLanes, portable=PortableLanes)[name](policy) as lanes:
        exchange(lanes)
print("exchanged")
"""


@pytest.mark.parametrize("backend", ["mmsg", "portable", "companion"])
def test_kernel_without_ipv6(backend: str) -> None:
    program = PROGRAM.replace("{number}", str(SOCKET[platform.machine()]))
    done = subprocess.run(
        [sys.executable, "-c", program, backend],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "exchanged\n"), done.stderr
