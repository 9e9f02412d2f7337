# SPDX-License-Identifier: Apache-2.0
"""What programs tell of their flow control: who is believed, what is left behind, what is shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sluice_cli.flow_text import FLOW_COLUMNS, flow_cells, flow_documents
from sluice_cli.peers import _table, with_flows
from userspace.datagram.destination import Endpoint
from userspace.datagram.flow_publisher import FlowPublisher, peer_flow
from userspace.flow.controller import FlowController
from xdp.errors import UsageError
from xdp.flow_state import (
    FLOWS,
    FLOWS_MAXIMUM,
    SIZE_MAXIMUM,
    FlowState,
    flows_by_address,
    read_flows,
)
from xdp.owner_state import start_time
from xdp.told import FILES_PER_USER, file_name

PEER = ("192.0.2.7", 9000)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    FLOWS.make(tmp_path)
    return tmp_path


def controllers(number: int = 1) -> list[tuple[Endpoint, FlowController]]:
    return [((f"10.0.{index >> 8}.{index & 255}", 9000), FlowController(0.0)) for index in range(number)]


def publisher(run: Path, number: int = 1, **options: Any) -> FlowPublisher:
    flows = controllers(number)
    return FlowPublisher(lambda: flows, "tests", run=run, **options)


def state(**changes: Any) -> FlowState:
    """Of this process."""
    made = FlowState(
        pid=os.getpid(),
        started=start_time(os.getpid()) or 0,
        program="tests",
        total=1,
        flows=[peer_flow(PEER, FlowController(0.0))],
    )
    return msgspec.structs.replace(made, **changes)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in FLOWS.path(run).iterdir())


def test_the_folder_is_as_tmp(run: Path) -> None:
    assert FLOWS.path(run).stat().st_mode & 0o7777 == 0o1777
    FLOWS.make(run)
    assert read_flows(run) == []
    assert read_flows(run / "nowhere") == []


def test_what_is_told_is_read(run: Path) -> None:
    flow = FlowController(0.0, max_rate=1e6)
    flow.on_packet_sent(1.0, 1200)
    flow.on_ack_received(1.05, [(0, 0)])
    flow.on_packet_sent(1.1, 1200)
    with FlowPublisher(lambda: [(PEER, flow)], "repair", run=run) as told:
        assert told.publish(2.0)
        (found,) = read_flows(run)
        assert (found.program, found.pid, found.total) == ("repair", os.getpid(), 1)
        (one,) = found.flows
        snapshot = flow.snapshot()
        assert (one.address, one.port) == PEER
        for name in ("congestion", "window", "in_flight", "rate", "smoothed_rtt", "sent_packets", "level"):
            assert getattr(one, name) == getattr(snapshot, name), name
        assert one.smoothed_rtt == pytest.approx(0.05)
    assert names(run) == []
    told.close()


def test_at_most_once_in_the_interval(run: Path) -> None:
    told = publisher(run)
    assert told.publish(10.0)
    (path,) = FLOWS.path(run).iterdir()
    path.unlink()
    assert told.publish(10.9)
    assert names(run) == []
    assert told.publish(11.0)
    assert names(run) == [path.name]


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "flows").write_bytes(b"")  # no folder
    told = publisher(tmp_path)
    assert not told.publish(0.0)
    assert told.publish(0.5), "not tried"
    assert not told.publish(1.0)
    (tmp_path / "flows").unlink()
    FLOWS.make(tmp_path)
    assert told.publish(2.0)
    assert len(read_flows(tmp_path)) == 1


def test_many_peers_are_a_file_of_bounded_size(run: Path) -> None:
    assert publisher(run, FLOWS_MAXIMUM + 100).publish(0.0)
    (path,) = FLOWS.path(run).iterdir()
    assert path.stat().st_size < SIZE_MAXIMUM / 2
    (found,) = read_flows(run)
    assert (found.total, len(found.flows)) == (FLOWS_MAXIMUM + 100, FLOWS_MAXIMUM)
    assert [flow.address for flow in found.flows[:2]] == ["10.0.0.0", "10.0.0.1"]


def test_who_was_killed_is_not_shown_and_tidied_up(run: Path) -> None:
    """kill -9 leaves the file, and one that was half written."""
    code = """
import sys
from pathlib import Path
from userspace.datagram.flow_publisher import FlowPublisher
from userspace.flow.controller import FlowController
run = Path(sys.argv[1])
FlowPublisher(lambda: [(("192.0.2.7", 9000), FlowController(0.0))], "victim", run=run).publish(0.0)
print("written", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert [one.program for one in read_flows(run)] == ["victim"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (FLOWS.path(run) / f"{process.pid}-half.new").write_bytes(b'{"version":')
    assert len(names(run)) == 2
    assert read_flows(run) == []
    assert names(run) == []


def test_no_more_names_are_looked_at_than_there_may_be(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdp.told.NAMES_MAXIMUM", 0)
    FLOWS.write(state(), file_name(), run)
    assert read_flows(run) == []


def test_a_later_process_of_the_same_pid(run: Path) -> None:
    FLOWS.write(state(started=state().started - 1), file_name(), run)
    assert read_flows(run) == []
    assert names(run) == []


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"pid": 0},
        {"pid": 1 << 80},
        {"pid": 1},  # not whose name the file has
        {"pid": "1"},
        {"started": None},
        {"program": "\x1b[2J"},
        {"program": "x" * 33},
        {"program": ""},
        {"total": -1},
        {"flows": None},
        {"flows": [{}]},
        {"flows": "x"},
        {"flows": [[[[[]]]]]},
    ],
)
def test_states_that_are_none(run: Path, change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(state()) | change
    (FLOWS.path(run) / file_name()).write_bytes(msgspec.json.encode(told))
    assert read_flows(run) == []


@pytest.mark.parametrize(
    "change",
    [
        {"address": "192.0.2.7\x1b[31m"},
        {"address": "fe80::1%\x1b[31m"},
        {"address": "fe80::1%ü"},
        {"address": "localhost"},
        {"address": "192.0.2.7" * 10},
        {"address": 7},
        {"port": 0},
        {"port": 65_536},
        {"congestion": "cu\nbic"},
        {"congestion": "cubic\n"},
        {"level": "fatal"},
        {"window": -1},
        {"window": 1 << 63},
        {"window": 1.5},
        {"rate": -0.5},
        {"rate": 1e300},
        {"rate": "1"},
        {"smoothed_rtt": 1e10},
        {"loss_rate": 1.01},
        {"lost_packets": None},
    ],
)
def test_flows_that_are_none(run: Path, change: dict[str, Any]) -> None:
    told = msgspec.to_builtins(state())
    told["flows"][0] |= change
    (FLOWS.path(run) / file_name()).write_bytes(msgspec.json.encode(told))
    assert read_flows(run) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version":1,"pid":1e999}',
        b'{"version":1,"rate":NaN}',
        b" " * (SIZE_MAXIMUM + 1),
    ],
)
def test_files_that_are_none(run: Path, content: bytes) -> None:
    (FLOWS.path(run) / file_name()).write_bytes(content)
    assert read_flows(run) == []
    assert len(names(run)) == 1, "whose process runs is left alone"


def test_what_is_no_file_or_not_named_so(run: Path, tmp_path: Path) -> None:
    folder, mine = FLOWS.path(run), msgspec.json.encode(state())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(mine)
    (folder / file_name()).symlink_to(elsewhere)
    os.mkfifo(folder / file_name())
    (folder / file_name()).mkdir()
    for name in ("x.json", f"{os.getpid()}-x.txt", "-1-x.json", "12345678-x.json", "٣-x.json"):
        (folder / name).write_bytes(mine)
    before = names(run)
    assert read_flows(run) == []
    assert names(run) == before
    assert elsewhere.exists()


def test_a_folder_that_is_a_link_or_somebody_elses(run: Path, tmp_path: Path) -> None:
    FLOWS.write(state(), file_name(), run)
    assert len(read_flows(run)) == 1
    other = tmp_path / "other"
    other.mkdir()
    FLOWS.path(other).symlink_to(FLOWS.path(run))
    assert read_flows(other) == []
    if os.geteuid() == 0:
        os.chown(FLOWS.path(run), 65534, 65534)
        assert read_flows(run) == []


def test_nobody_speaks_for_others(run: Path) -> None:
    """A file of another user about a process of ours."""
    if os.geteuid() != 0:
        pytest.skip("makes files of other users")
    name = file_name()
    FLOWS.write(state(), name, run)
    os.chown(FLOWS.path(run) / name, 65534, 65534)
    assert read_flows(run) == []


def test_nobody_hides_others(run: Path) -> None:
    for _ in range(FILES_PER_USER + 20):
        FLOWS.write(state(), file_name(), run)
    assert len(read_flows(run)) == FILES_PER_USER


def test_a_half_written_file_is_taken_away_when_writing_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_state: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(msgspec.json, "encode", full)
    assert not publisher(run).publish(0.0)
    assert names(run) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((None, "x"), "flows is a function"),
        ((list, "no blanks"), "program is 1 to 32"),
        ((list, 7), "program is 1 to 32"),
        ((list, "x", 0.0), "interval is seconds"),
        ((list, "x", "1"), "interval is seconds"),
    ],
)
def test_wrong_arguments(arguments: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        FlowPublisher(*arguments[:2], **({"interval": arguments[2]} if len(arguments) > 2 else {}))


class TestShown:
    def test_one_row_for_an_address(self) -> None:
        first, second = state().flows[0], state().flows[0]
        second = msgspec.structs.replace(
            second, port=9001, level="severe", rate=2e6, loss_rate=0.25, smoothed_rtt=0.5, min_rtt=0.4
        )
        first = msgspec.structs.replace(first, rate=1e6)
        flows = flows_by_address([state(flows=[first, second])])
        documents = flow_documents(flows[PEER[0]])
        assert [(one["port"], one["level"]) for one in documents] == [(9000, "none"), (9001, "severe")]
        assert flow_cells(documents) == ["24000", "0", "3MB/s", "500 ms", "25.0%", "severe"]
        assert flow_cells(documents[:1])[3] == "-", "nothing was measured yet"
        assert flow_cells([]) == [""] * len(FLOW_COLUMNS)

    @pytest.mark.parametrize("speeds", [False, True])
    def test_columns_when_there_is_something(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, speeds: bool
    ) -> None:
        row: dict[str, Any] = {
            "address": PEER[0], "origin": "stranger", "class_name": "x", "packets": 1, "bytes": 2, "drops": 3,
            "last_seen_ns": 0,
        }  # fmt: skip
        if speeds:
            row |= {"packets_per_second": 1.0, "drops_per_second": 1.0}
        rows = [row, row | {"address": "192.0.2.8"}]
        monkeypatch.setattr("sluice_cli.peers.read_flows", lambda: read_flows(run))
        before = _table(with_flows(rows))
        assert "window" not in before.columns
        FLOWS.write(state(), file_name(), run)
        after = _table(with_flows(rows))
        assert after.columns == [*before.columns, *FLOW_COLUMNS]
        assert [cells[len(before.columns)] for cells in after.rows] == ["12000", ""]
        head, *lines = after.lines()
        assert head.endswith("congestion")
        assert lines[0].endswith("none")
