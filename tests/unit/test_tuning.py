# SPDX-License-Identifier: Apache-2.0
"""``[tuning]``: what may stand there, what is said about it, and where readers run."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from tests.unit.policy_texts import BadPolicy, check_refusal, policy
from userspace.datagram import busy_poll
from userspace.datagram.mmsg import MmsgLanes
from userspace.datagram.pin import Pins
from userspace.datagram.sockets import ServiceSocket
from xdp.errors import InterfaceGoneError, UnsupportedError, UsageError
from xdp.interface import Tuning
from xdp.policy import Policy
from xdp.policy_model import Tuning as Wanted
from xdp.policy_tuning import remarks
from xdp.probe_tuning import process_named
from xdp.queue_cpus import by_name, near, parse_list, parse_mask

POLLING = Wanted(
    busy_poll=50,
    prefer_busy_poll=True,
    napi_defer_hard_irqs=2,
    gro_flush_timeout=200_000,
    busy_poll_budget=64,
)


def tuning(keys: str) -> str:
    return policy() + f"[tuning]\n{keys}\n"


BAD: dict[str, BadPolicy] = {
    "unknown": (tuning("busypoll = 5"), "tuning.busypoll", ["unknown key", 'did you mean "busy_poll"?']),
    "blank": (tuning('busy_poll = "20 us"'), "tuning.busy_poll", ['found "20 us"', "up to 10000 us"]),
    "seconds": (tuning('busy_poll = "1s"'), "tuning.busy_poll", ['found "1s"', 'such as "20us"']),
    "too_long": (tuning('busy_poll = "11ms"'), "tuning.busy_poll", ['found "11ms"']),
    "no_whole": (tuning('busy_poll = "1500ns"'), "tuning.busy_poll", ['found "1500ns"']),
    "true": (tuning("busy_poll = true"), "tuning.busy_poll", ["found true"]),
    "negative": (tuning("gro_flush_timeout = -1"), "tuning.gro_flush_timeout", ["found -1", "100000000 ns"]),
    "huge": (tuning("gro_flush_timeout = 100000001"), "tuning.gro_flush_timeout", ["found 100000001"]),
    "no_timer": (
        tuning("napi_defer_hard_irqs = 2"),
        "tuning.napi_defer_hard_irqs",
        ["needs gro_flush_timeout"],
    ),
    "often": (
        tuning("napi_defer_hard_irqs = 1001\ngro_flush_timeout = 1"),
        "tuning.napi_defer_hard_irqs",
        ["found 1001", "0 to 1000"],
    ),
    "alone": (tuning("prefer_busy_poll = true"), "tuning.prefer_busy_poll", ["needs busy_poll beside it"]),
    "no_polling": (
        tuning("busy_poll = 0\nbusy_poll_budget = 8"),
        "tuning.busy_poll_budget",
        ["needs busy_poll beside it"],
    ),
    "budget": (
        tuning("busy_poll = 1\nbusy_poll_budget = 65536"),
        "tuning.busy_poll_budget",
        ["found 65536", "1 to 65535"],
    ),
    "pin_number": (tuning("pin = 3"), "tuning.pin", ["found 3", '"auto" or an array of CPUs']),
    "pin_word": (tuning('pin = "near"'), "tuning.pin", ['found "near"']),
    "pin_nothing": (tuning("pin = []"), "tuning.pin", ["an empty array"]),
    "pin_negative": (tuning("pin = [0, -1]"), "tuning.pin[1]", ["found -1", "0 to 8191"]),
    "pin_many": (tuning(f"pin = {[0] * 65}"), "tuning.pin", ["65 entries", "at most 64"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name: str) -> None:
    check_refusal(name, BAD[name])


def test_nothing_is_changed_by_default() -> None:
    assert Policy.parse(policy()).tuning == Wanted()
    assert Tuning().over(Wanted()) == Tuning()


def test_times_have_units() -> None:
    found = Policy.parse(tuning('busy_poll = "2ms"\ngro_flush_timeout = "200us"\npin = [3, 1]')).tuning
    assert found == Wanted(busy_poll=2000, gro_flush_timeout=200_000, pin=(3, 1))
    assert Policy.parse(tuning('busy_poll = 20\npin = "auto"')).tuning == Wanted(busy_poll=20, pin="auto")


def test_the_command_line_goes_before_the_policy() -> None:
    both = Tuning(napi_defer_hard_irqs=0, gro=True).over(POLLING)
    assert Tuning(gro_flush_timeout=5).before(POLLING).gro_flush_timeout == 5
    assert both == Tuning(napi_defer_hard_irqs=0, gro_flush_timeout=200_000, gro=True)


@pytest.mark.parametrize(
    ("wanted", "mode", "release", "words"),
    [
        (POLLING, "", "", []),
        (POLLING, "native-zero-copy", "6.18.1", []),
        (POLLING, "native-copy", "6.12.9-amd64", []),
        (POLLING, "native-copy", "6.13.0", ["may wait 0.2 ms"]),
        (POLLING, "generic-copy", "6.1.0", ["may wait 0.2 ms"]),
        (Wanted(busy_poll=50, prefer_busy_poll=True), "native-copy", "6.18.1", ["interrupts go on"]),
        (Wanted(napi_defer_hard_irqs=1, gro_flush_timeout=5_000_000), "", "", ["may wait 5 ms"]),
        (Wanted(gro_flush_timeout=5_000), "", "", ["no interrupt is left out"]),
    ],
)
def test_what_is_said_of_what_is_allowed(wanted: Wanted, mode: str, release: str, words: list[str]) -> None:
    found = remarks(wanted, mode, release)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


INTERRUPTS = """           CPU0       CPU1
  0:         45          0   IO-APIC   2-edge      timer
 37:          0          0   PCI-MSIX-0000:00:03.0   0-edge      virtio2-config
 38:          0         17   PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0
 39:          0         17   PCI-MSIX-0000:00:03.0   2-edge      virtio2-output.0
 40:          9          0   PCI-MSIX-0000:3b:00.0   1-edge      eth1-TxRx-0
 41:          9          0   PCI-MSIX-0000:3b:00.0   2-edge      eth1-TxRx-1
 42:          9          0   PCI-MSIX-0000:3b:00.0   3-edge      eth1-tx-2
 43:          9          0   PCI-MSIX-0000:5e:00.0   3-edge      mlx5_comp1@pci:0000:5e:00.0
 44:          9          0   PCI-MSIX-0000:5e:00.0   3-edge      mlx5_async0@pci:0000:5e:00.0
NMI:          0          0   Non-maskable interrupts
"""


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"eth0", "virtio2"}, {0: 38}),
        ({"eth1", "0000:3b:00.0"}, {0: 40, 1: 41}),
        ({"eth2", "0000:5e:00.0"}, {1: 43}),
        ({"eth"}, {}),
    ],
)
def test_interrupts_by_their_names(names: set[str], found: dict[int, int]) -> None:
    assert by_name(INTERRUPTS, names) == found


def test_sets_of_cpus_as_the_kernel_writes_them() -> None:
    assert parse_list("0-2,5\n") == {0, 1, 2, 5}
    assert parse_list("") == parse_mask("0,00000000") == frozenset()
    assert parse_mask("00000001,00000005\n") == {0, 2, 32}


def test_a_reader_is_near_but_not_in_the_way() -> None:
    """On any machine: CPU 0 has interrupts; who polls is there, others are not, if they have a choice."""
    everything = frozenset(range(os.cpu_count() or 1))
    assert near(frozenset({0}), frozenset(), everything, same=True) == [0]
    assert near(frozenset({0}), frozenset(), frozenset({0}), same=False) == [0]
    if len(everything) > 1:
        assert 0 not in near(frozenset({0}), frozenset(), everything, same=False)


def test_pinned_and_put_back_thread_by_thread() -> None:
    before = os.sched_getaffinity(0)
    cpu = max(before)
    pins = Pins("lo", socket.if_nametoindex("lo"), (min(before), cpu))
    seen = []

    def reader() -> None:
        seen.append(pins.pin([1], "policy", polls=False))

    thread = threading.Thread(target=reader)
    thread.start()
    thread.join()
    assert seen == [(cpu,)]
    assert os.sched_getaffinity(0) == before  # only the thread that asked
    assert pins.pin([0], cpu, polls=False) == (cpu,)
    assert pins.pin([0], [min(before)], polls=False) == (min(before),)
    pins.restore()  # also of the thread that has ended
    assert os.sched_getaffinity(0) == before


def test_a_thread_that_somebody_moved_since_stays() -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one CPU: nowhere to move to")
    pins = Pins("lo", socket.if_nametoindex("lo"), None)
    pins.pin([0], min(before), polls=False)
    try:
        os.sched_setaffinity(0, {max(before)})
        pins.restore()
        assert os.sched_getaffinity(0) == {max(before)}
    finally:
        os.sched_setaffinity(0, before)


def test_where_nobody_can_be_pinned() -> None:
    pins = Pins("lo", socket.if_nametoindex("lo"), None)
    for queues, where in (([0], 9999), ([0], -1), ([0], 1 << 80), ([2], [0, 0]), ([0], "there")):
        with pytest.raises(UsageError):
            pins.pin(queues, where, polls=False)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="lo queue 0 has no interrupt"):
        pins.pin([0], "policy", polls=False)
    with pytest.raises(InterfaceGoneError, match="network namespace"):
        Pins("lo", 12345, None).pin([0], "auto", polls=False)


def test_lanes_over_kernel_sockets() -> None:
    """Ports that are free, whatever the policy says: the sockets are handed over."""
    before = os.sched_getaffinity(0)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    rules = '[[service.rule]]\naction = "lane"\nlane = "bulk"\n'
    text = policy() + rules + f"[tuning]\npin = [{min(before)}]\n"
    with MmsgLanes(Policy.parse(text), [ServiceSocket(8005, sock)]) as lanes:
        assert lanes.status()["busy_poll"] == {"microseconds": 0, "sockets": 1, "polled": 0}
        assert lanes.pin() == (min(before),)
        with pytest.raises(UnsupportedError, match="no queue"):
            lanes.pin("auto")
    assert os.sched_getaffinity(0) == before


def test_sockets_that_poll_get_everything() -> None:
    """On loopback there is no queue to poll; looking again loses and doubles nothing."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    if why := busy_poll.set_on([sock.fileno()], Wanted(busy_poll=200)):
        sock.close()
        assert "CAP_NET_ADMIN" in why
        pytest.skip(why)
    rules = '[[service.rule]]\naction = "lane"\nlane = "bulk"\n'
    with (
        MmsgLanes(Policy.parse(policy() + rules), [ServiceSocket(8005, sock)]) as lanes,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        found = lanes.status()["busy_poll"]
        assert isinstance(found, dict)
        assert found["microseconds"] == 200
        got = []
        for number in range(100):
            sender.sendto(bytes([number]) * (number + 1), sock.getsockname())
            with lanes.receive(timeout=5) as batch:
                got += [bytes(payload) for payload in batch]
        assert got == [bytes([number]) * (number + 1) for number in range(100)]
        with lanes.receive(timeout=0.001) as batch:
            assert len(batch) == 0
        assert lanes.statistics().balanced


def test_no_descriptor_no_polling() -> None:
    assert "Bad file descriptor" in busy_poll.set_on([-1], Wanted(busy_poll=1))
    assert busy_poll.set_on([-1], Wanted()) == ""
    assert busy_poll.describe([-1]) == {"microseconds": 0, "sockets": 1, "polled": 0}


def test_processes_by_their_command(tmp_path: Path) -> None:
    for pid, command in ((30, "irqbalance"), (4, "kthreadd"), (9, "irqbalance")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{command}\n", encoding="utf-8")
    (tmp_path / "5").mkdir()  # ended just now
    assert process_named("irqbalance", tmp_path) == 9
    assert process_named("irq", tmp_path) == 0
