# SPDX-License-Identifier: Apache-2.0
"""Every port, ethertype and protocol, and every way in which a header can lie."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import frames
from tests.kernel.frames import AH, DESTINATION, FRAGMENT, HOP_BY_HOP, IPV4, IPV6, QINQ, ROUTING, UDP, VLAN
from tests.kernel.steer_runs import SHORTEST, Outcome, SteerRuns

pytestmark = pytest.mark.bpf

PORT = 8001
OURS = {PORT, 53, 1, 65535, *range(9000, 9100)}
POLICY = """
version = 1
[[lane]]
name = "high"
[[lane]]
name = "low"
[[service]]
name = "one"
ports = [8001, 53]
  [[service.rule]]
  action = "lane"
  lane = "high"
[[service]]
name = "two"
ports = [1, 65535, "9000-9099"]
  [[service.rule]]
  action = "lane"
  lane = "low"
"""
V4, V6 = "198.18.0.1", "2001:db8::1"


@pytest.fixture
def steer(runs: SteerRuns) -> SteerRuns:
    runs.use(POLICY)
    return runs


def v4(**options: object) -> bytes:
    return frames.ethernet(IPV4, frames.ipv4(frames.udp(PORT, b"payload"), **options))  # type: ignore[arg-type]


def v6(headers: bytes = b"", first: int = UDP, **options: object) -> bytes:
    packet = frames.ipv6(headers + frames.udp(PORT, b"payload"), next_header=first, **options)  # type: ignore[arg-type]
    return frames.ethernet(IPV6, packet)


def v6_chain(*kinds: int) -> bytes:
    first, headers = frames.chain(kinds)
    return v6(headers, first)


def check_meta(got: Outcome, frame: bytes, payload: bytes) -> None:
    """The metadata of a steered packet points at the payload."""
    assert got.meta is not None
    start = got.meta.payload_offset
    assert frame[start : start + got.meta.payload_length] == payload


@pytest.mark.parametrize("source", [V4, V6])
def test_every_port(steer: SteerRuns, source: str) -> None:
    frame = bytearray(frames.udp_frame(source, 0, b"x"))
    at = len(frame) - 1 - 6
    for port in range(65536):
        struct.pack_into("!H", frame, at, port)
        got = steer(bytes(frame))
        if port not in OURS:
            assert (got.name, got.lane) == ("pass_not_ours", None), port
            continue
        service = 1 if port in {PORT, 53} else 2
        assert (got.name, got.lane) == ("steer", service - 1), port
        assert got.meta is not None
        assert (got.meta.service, got.meta.lane) == (service, service - 1)


@pytest.mark.parametrize("tags", [(), (VLAN,), (QINQ, VLAN)])
def test_every_ethertype(steer: SteerRuns, tags: tuple[int, ...]) -> None:
    """The bytes after it are an IPv4 datagram; only 0x0800 may say so."""
    packet = frames.ipv4(frames.udp(PORT, bytes(64)))
    frame = bytearray(frames.ethernet(0, packet, tags))
    at = 12 + 4 * len(tags)
    expected = {IPV4: "steer", IPV6: "pass_ip_header"}
    for tpid in (VLAN, QINQ):
        # The packet is then taken for a tag (whose ethertype is its total length) and what follows it.
        expected[tpid] = "pass_not_ip" if len(tags) < 2 else "pass_vlan_depth"
    for ethertype in range(65536):
        struct.pack_into("!H", frame, at, ethertype)
        assert steer(bytes(frame)).name == expected.get(ethertype, "pass_not_ip"), hex(ethertype)


def test_every_protocol_of_ipv4(steer: SteerRuns) -> None:
    for protocol in range(256):
        want = "steer" if protocol == UDP else "pass_not_udp"
        assert steer(v4(protocol=protocol)).name == want, protocol
        # Fragments of anything but UDP are none of ours, whatever the policy says of fragments.
        want = "pass_fragment" if protocol == UDP else "pass_not_udp"
        assert steer(v4(protocol=protocol, fragment=0x2000)).name == want, protocol


def test_every_next_header_of_ipv6(steer: SteerRuns) -> None:
    """The bytes after it are a UDP header, which is a well-formed extension header: 8001 is 0x1f41."""
    for protocol in range(256):
        want = "steer" if protocol == UDP else "pass_not_udp"
        if protocol == AH:
            want = "pass_extension"
        elif protocol in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
            continue  # below, with real headers
        assert steer(v6(first=protocol)).name == want, protocol
        for kind in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
            if protocol not in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
                first, headers = frames.chain([kind], protocol)
                assert steer(v6(headers, first)).name == want, (kind, protocol)


# Found by looking at each of them with a dissector. The QUIC one is from 127.0.0.1, to port 8001.
VECTORS = {
    "arp_reply": "pass_not_ip", "arp_request": "pass_not_ip", "dns_query_a": "pass_not_ours",
    "quic_initial": "pass_source", "ip4_ihl0": "pass_ip_header",
    **dict.fromkeys(("icmp_echo", "icmp_echo_reply", "tcp_ack", "tcp_fin", "tcp_psh", "tcp_rst", "tcp_syn",
                     "tcp_syn_ack"), "pass_not_udp"),
}  # fmt: skip


def test_every_vector(steer: SteerRuns, vectors: Path) -> None:
    """Real frames; inside GRE nothing is looked at."""
    folder = vectors / "frames"
    found = sorted(folder.glob("*.bin"))
    assert found
    steer.use(POLICY.replace("[8001, 53]", "[8001]"))
    for path in found:
        want = "pass_not_udp" if path.stem.endswith("_gre") else VECTORS[path.stem]
        assert steer(path.read_bytes()).name == want, path.name
    steer.use(POLICY)
    # From 127.0.0.1 as well; now its port is ours.
    assert steer((folder / "dns_query_a.bin").read_bytes()).name == "pass_source"


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(frames.udp_frame(V4, PORT, b"payload"), id="v4"),
        pytest.param(frames.udp_frame(V6, PORT, b"payload"), id="v6"),
        pytest.param(frames.udp_frame(V4, PORT, b"payload", (QINQ, VLAN)), id="v4-qinq"),
        pytest.param(frames.udp_frame(V6, PORT, b"payload", (VLAN,)), id="v6-vlan"),
        pytest.param(
            frames.ethernet(IPV4, frames.ipv4(frames.udp(PORT, b"payload"), options=bytes(40))),
            id="v4-options",
        ),
        pytest.param(v6_chain(HOP_BY_HOP, DESTINATION, FRAGMENT), id="v6-extensions"),
    ],
)
def test_truncation_at_every_length(steer: SteerRuns, frame: bytes) -> None:
    """Whatever is cut off, the IP header announces it: truncated, and never read beyond the end."""
    assert steer(frame).name == "steer"
    for length in range(SHORTEST, len(frame)):
        assert steer(frame[:length]).name == "pass_truncated", length


@pytest.mark.parametrize("source", [V4, V6])
def test_vlan_tags(steer: SteerRuns, source: str) -> None:
    for first in (VLAN, QINQ):
        for count in range(4):
            for last in (VLAN, QINQ):
                tags = [first] * (count - 1) + [last] if count else []
                frame = frames.udp_frame(source, PORT, b"tagged", tags)
                got = steer(frame)
                assert got.name == ("steer" if count < 3 else "pass_vlan_depth"), tags
                if count < 3:
                    check_meta(got, frame, b"tagged")


def test_ethernet_padding_is_no_payload(steer: SteerRuns) -> None:
    for source in (V4, V6):
        frame = frames.udp_frame(source, PORT, b"x")
        for padding in (1, 17, 200):
            got = steer(frame + bytes(padding))
            assert got.name == "steer"
            check_meta(got, frame, b"x")


def test_ipv4_options_and_header_length(steer: SteerRuns) -> None:
    for words in range(11):
        frame = v4(options=bytes(4 * words))
        got = steer(frame)
        assert got.name == "steer", words
        check_meta(got, frame, b"payload")
    size = 20 + 8 + 7
    for ihl in range(16):
        got = steer(v4(ihl=ihl))
        if ihl == 5:
            assert got.name == "steer"
        elif ihl < 5 or ihl * 4 > size:
            assert got.name == "pass_ip_header", ihl
        else:
            # The "UDP header" is then a part of the payload: too short, or with a wrong length.
            assert got.name == "pass_udp_length", ihl


def test_ip_version_lies(steer: SteerRuns) -> None:
    for version in range(16):
        assert steer(v4(version=version)).name == ("steer" if version == 4 else "pass_ip_header")
        assert steer(v6(version=version)).name == ("steer" if version == 6 else "pass_ip_header")


def test_ipv4_total_length_lies(steer: SteerRuns) -> None:
    size = 20 + 8 + 7
    for total in (*range(100), 1000, 65535):
        if total < 20:
            want = "pass_ip_header"
        elif total > size:
            want = "pass_truncated"
        else:
            want = "steer" if total == size else "pass_udp_length"
        assert steer(v4(total=total)).name == want, total
        # The same with enough padding in the frame, so that the announced length is there.
        want = want if total <= size or total > size + 200 else "steer"
        assert steer(v4(total=total) + bytes(200)).name == want, total


def test_ipv6_payload_length_lies(steer: SteerRuns) -> None:
    size = 8 + 7
    for length in (*range(100), 1000, 65535):
        want = "steer" if length == size else "pass_udp_length" if length < size else "pass_truncated"
        assert steer(v6(length=length)).name == want, length


@pytest.mark.parametrize("wrap", [frames.ipv4, frames.ipv6])
def test_udp_length_lies(steer: SteerRuns, wrap: Callable[[bytes], bytes]) -> None:
    protocol = IPV4 if wrap is frames.ipv4 else IPV6
    for length in (*range(40), 1000, 65535):
        frame = frames.ethernet(protocol, wrap(frames.udp(PORT, b"payload", length=length)))
        got = steer(frame)
        assert got.name == ("steer" if 8 <= length <= 15 else "pass_udp_length"), length
        if got.meta is not None:
            # What lies between the UDP length and the IP length is nobody's payload.
            check_meta(got, frame, b"payload"[: length - 8])
    for rest in range(8):
        frame = frames.ethernet(protocol, wrap(frames.udp(PORT)[:rest]))
        assert steer(frame).name == "pass_udp_length", rest


@pytest.mark.parametrize("fragments", ["pass", "drop"])
def test_fragments(runs: SteerRuns, fragments: str) -> None:
    runs.use(f'fragments = "{fragments}"\n' + POLICY)
    want = f"{fragments}_fragment"
    for word in (0x2000, 0x2001, 0x0001, 0x1FFF, 0x3FFF, 0x0008):
        assert runs(v4(fragment=word)).name == want, hex(word)
    # Don't Fragment and the reserved bit say nothing.
    for word in (0x4000, 0x8000, 0xC000):
        assert runs(v4(fragment=word)).name == "steer", hex(word)
    for offset, more in ((1, False), (0, True), (8191, True), (8191, False)):
        headers = frames.fragment_header(UDP, offset=offset, more=more)
        assert runs(v6(headers, FRAGMENT)).name == want
        assert runs(v6(frames.extension(FRAGMENT) + headers, HOP_BY_HOP)).name == want
        headers = frames.fragment_header(6, offset=offset, more=more)
        assert runs(v6(headers, FRAGMENT)).name == "pass_not_udp"
    # RFC 6946: an atomic fragment is a whole packet.
    frame = v6(frames.fragment_header(UDP), FRAGMENT)
    got = runs(frame)
    assert got.name == "steer"
    check_meta(got, frame, b"payload")
    # The two reserved bits beside M are ignored (RFC 8200, 4.5).
    assert runs(v6(struct.pack("!BBHI", UDP, 0, 0x0006, 7), FRAGMENT)).name == "steer"


def test_extension_header_chains(steer: SteerRuns) -> None:
    for kind in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
        for count in range(10):
            first, headers = frames.chain([kind] * count)
            frame = v6(headers, first)
            got = steer(frame)
            assert got.name == ("steer" if count <= 8 else "pass_extension"), (kind, count)
            if got.meta is not None:
                check_meta(got, frame, b"payload")
    mixed = [HOP_BY_HOP, DESTINATION, ROUTING, FRAGMENT, DESTINATION]
    first, headers = frames.chain(mixed)
    assert steer(v6(headers, first)).name == "steer"
    # Eight, and then something that is neither UDP nor another of them.
    for last, want in ((AH, "pass_extension"), (6, "pass_not_udp"), (59, "pass_not_udp")):
        first, headers = frames.chain([DESTINATION] * 8, last)
        assert steer(v6(headers, first)).name == want


def test_extension_header_lengths(steer: SteerRuns) -> None:
    for kind in (HOP_BY_HOP, DESTINATION, ROUTING):
        for units in (0, 1, 7, 100, 255):
            frame = v6(frames.extension(UDP, units=units), kind)
            got = steer(frame)
            assert got.name == "steer", (kind, units)
            check_meta(got, frame, b"payload")
        # Longer than what is there: 15 bytes of UDP follow the header's own 8.
        for units in (2, 3, 255):
            assert steer(v6(frames.extension(UDP, units=units, body=8), kind)).name == "pass_truncated"
    # A header whose first 8 bytes are not there any more.
    for rest in range(8):
        packet = frames.ipv6(bytes(rest), next_header=DESTINATION)
        assert steer(frames.ethernet(IPV6, packet)).name == "pass_truncated"
        # Padding of the frame does not stand in for them.
        assert steer(frames.ethernet(IPV6, packet) + bytes(60)).name == "pass_truncated"


def test_routing_header_with_segments_left(steer: SteerRuns) -> None:
    """This host is not the last one: the kernel's."""
    for left in range(256):
        want = "pass_extension" if left else "steer"
        assert steer(v6(frames.extension(UDP, segments_left=left), ROUTING)).name == want, left
        # In other headers that byte is an option's.
        assert steer(v6(frames.extension(UDP, segments_left=left), DESTINATION)).name == "steer"


IMPOSSIBLE = [
    "0.0.0.0", "0.255.255.255", "127.0.0.1", "127.255.255.255", "224.0.0.0", "239.1.2.3", "240.0.0.1",
    "255.255.255.255", "::", "::1", "ff00::", "ff02::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "::ffff:0.0.0.0", "::ffff:198.18.0.1", "::ffff:255.255.255.255",
]  # fmt: skip
POSSIBLE = [
    "1.0.0.0", "126.255.255.255", "128.0.0.0", "223.255.255.255", "10.0.0.1", "169.254.1.1", "::2",
    "::198.18.0.1", "::fffe:198.18.0.1", "::1:ffff:198.18.0.1", "1::", "feff::1", "fe80::1", "64:ff9b::1",
    "::1:0:0:1", "0:0:1::ffff:0:0", "0:0:1::", "0:1::1",
]  # fmt: skip


def test_sources(steer: SteerRuns) -> None:
    for source in IMPOSSIBLE:
        assert steer(frames.udp_frame(source, PORT)).name == "pass_source", source
        # Not even that is said of packets that are not ours.
        assert steer(frames.udp_frame(source, 2)).name == "pass_not_ours", source
    for source in POSSIBLE:
        assert steer(frames.udp_frame(source, PORT)).name == "steer", source


def test_impossible_sources_leave_no_trace(steer: SteerRuns) -> None:
    for source in IMPOSSIBLE:
        steer(frames.udp_frame(source, PORT))
    assert not list(steer.strangers.items())


def test_nothing_is_ours_before_a_policy(steer: SteerRuns) -> None:
    """Ports that only the last policy named go to the kernel at once."""
    steer.use('version = 1\n[[lane]]\nname = "a"\n[[service]]\nname = "s"\nports = [7]\n')
    for port in OURS:
        assert steer(frames.udp_frame(V4, port)).name == "pass_not_ours"
