# SPDX-License-Identifier: Apache-2.0
"""Peers over several CPUs, and the filter that keeps strangers out of the table of configured peers."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from tests.kernel import frames
from tests.kernel.steer_runs import SteerRuns
from xdp._libbpf import ffi, lib
from xdp.abi import pack_address

#: Of the process: the fixture keeps the tests' own thread on one of them.
CPUS = sorted(os.sched_getaffinity(0))

PORT = 8001
FRIEND, STRANGER, ENEMY = "203.0.113.9", "198.18.7.7", "10.66.0.1"

POLICY = f"""
version = 1
[[lane]]
name = "friends"
[[lane]]
name = "rest"
[[class]]
name = "friend"
peers = ["{FRIEND}"]
[[class]]
name = "enemy"
prefixes = ["10.66.0.0/16"]
deny = true
[[service]]
name = "s"
ports = [{PORT}]
  [[service.rule]]
  class = "friend"
  action = "lane"
  lane = "friends"
  [[service.rule]]
  action = "lane"
  lane = "rest"
"""


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """The calling thread, and so its test runs, on that CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("source", [FRIEND, STRANGER, ENEMY])
def test_each_cpu_counts_and_the_sum_is_what_came(runs: SteerRuns, source: str) -> None:
    """The CPU of the first packet counts in one place, all others in another."""
    runs.use(POLICY)
    frame = frames.udp_frame(source, PORT, bytes(30))
    address = pack_address(ip_address(source))
    sent = {cpu: 3 + 2 * place for place, cpu in enumerate(CPUS)}
    for cpu, packets in sent.items():
        with on_cpu(cpu):
            runs.program.test_run(frame, repeat=packets)
    home, *others = sent
    peer = runs.peer(address)
    others_sent = sum(sent[cpu] for cpu in others)
    at_home, away = peer.peer, peer.away
    assert at_home.home == home + 1
    assert (at_home.packets, away.packets) == (sent[home], others_sent)
    assert (at_home.bytes, away.bytes) == (sent[home] * len(frame), others_sent * len(frame))
    dropped = source == ENEMY
    assert (at_home.drops, away.drops) == (sent[home] * dropped, others_sent * dropped)


@pytest.mark.parametrize("source", [FRIEND, STRANGER])
def test_nothing_is_lost_when_cpus_count_at_once(runs: SteerRuns, source: str) -> None:
    """All CPUs begin together with a peer that none has seen; each packet is counted once."""
    runs.use(POLICY)
    before = runs.program.counters()
    frame = frames.udp_frame(source, PORT)
    each = 200_000
    together = threading.Barrier(len(CPUS))

    def send(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        together.wait()
        runs.program.test_run(frame, repeat=each)

    threads = [threading.Thread(target=send, args=(cpu,)) for cpu in CPUS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peer = runs.peer(pack_address(ip_address(source)))
    after = runs.program.counters()
    # A CPU that waits too long for its turn to add the peer counts the packet for none.
    refused = after.strangers_refused - before.strangers_refused
    assert peer.peer.packets + peer.away.packets + refused == each * len(CPUS)
    assert peer.peer.bytes + peer.away.bytes == (each * len(CPUS) - refused) * len(frame)
    assert peer.peer.home in {cpu + 1 for cpu in CPUS}
    assert refused < each / 100
    assert (after.seen - before.seen).packets == each * len(CPUS)


def random_address(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(IPv4Address(rng.randrange(0x0B000000, 0x7F000000)))
    return str(IPv6Address(0x2001 << 112 | rng.getrandbits(112)))


def with_peers(addresses: list[str]) -> str:
    listed = ", ".join(f'"{address}"' for address in addresses)
    return POLICY.replace(f'peers = ["{FRIEND}"]', f"peers = [{listed}]")


def test_every_configured_peer_is_found(runs: SteerRuns) -> None:
    """The filter holds the bit of each, and a change of policy brings new ones and forgets old ones."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    addresses = list({random_address(rng) for _ in range(4000)})
    older, newer = addresses[:2500], addresses[1500:]
    runs.use(with_peers(older))
    assert {runs(frames.udp_frame(source, PORT)).lane for source in older} == {0}
    assert {runs(frames.udp_frame(source, PORT)).lane for source in newer if source not in older} == {1}
    runs.use(with_peers(newer))
    assert {runs(frames.udp_frame(source, PORT)).lane for source in newer} == {0}
    assert {runs(frames.udp_frame(source, PORT)).lane for source in addresses[:1500]} == {1}


def filter_of(keys: Sequence[bytes]) -> dict[int, int]:
    """Which words the addresses' bits make of an empty filter."""
    words = ffi.new("struct sluice_filter[]", lib.SLUICE_FILTER_WORDS)
    lib.sluice_filter_add(words, ffi.from_buffer("struct sluice_address[]", b"".join(keys)), len(keys))
    numbers = struct.unpack(f"={len(words)}Q", ffi.buffer(words))
    return {index: number for index, number in enumerate(numbers) if number}


def v4_keys(first: int, count: int) -> list[bytes]:
    return [pack_address(IPv4Address(first + number)) for number in range(count)]


def test_the_filter_spreads_neighbours() -> None:
    """10,000 addresses set nearly as many bits: of 2^20, chance makes about 50 of them fall on another's."""
    for keys in (
        v4_keys(0x0A000000, 10_000),
        [pack_address(IPv6Address(0x20010DB8 << 96 | number)) for number in range(10_000)],
        [pack_address(IPv6Address(0x20010DB8 << 96 | number << 64)) for number in range(10_000)],
    ):
        assert 9_900 <= sum(number.bit_count() for number in filter_of(keys).values()) <= 10_000


def test_a_stranger_with_a_friends_bit_is_a_stranger(runs: SteerRuns) -> None:
    runs.use(POLICY)
    ((word, bits),) = filter_of([pack_address(ip_address(FRIEND))]).items()
    step = 1 << 16
    first = next(
        start
        for start in range(0x0B000000, 0x1B000000, step)
        if filter_of(v4_keys(start, step)).get(word, 0) & bits
    )
    while step > 1:  # in which half is it?
        step //= 2
        if not filter_of(v4_keys(first, step)).get(word, 0) & bits:
            first += step
    got = runs(frames.udp_frame(str(IPv4Address(first)), PORT))
    assert got.lane == 1
    assert got.meta is not None
    assert got.meta.peer == 0
    assert runs(frames.udp_frame(FRIEND, PORT)).lane == 0
