# SPDX-License-Identifier: Apache-2.0
"""Figures and thresholds of `sluice lab connections`, and what people see of them."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from sluice_cli import lab_connections as lab
from sluice_cli.lab_connections_report import show
from sluice_cli.output import Output


def found(**changes: Any) -> dict[str, Any]:
    return {"connections": 3, "back": 3, "p50": 0.01, "p99": 0.02, "max": 0.02, "reconnected": 0, **changes}


def test_percentiles() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert lab.percentile(values, 0.5) == 51
    assert lab.percentile(values, 0.99) == 100
    assert lab.percentile([7.0], 0.99) == 7
    assert lab.percentile([], 0.5) is None


def test_thresholds_are_met_or_not() -> None:
    assert lab.limit("x", 1.0, 1.0)["holds"]
    assert not lab.limit("x", 1.1, 1.0)["holds"]
    assert not lab.limit("x", None, 1.0)["holds"], "what never came is missed"
    told = {"udp": found(), "quic": found()}
    assert [one["holds"] for one in lab._limits(told, "p99", 1.0)] == [True] * 5
    assert [one["holds"] for one in lab._limits({"udp": found(p99=2.0)}, "p99", 1.0)] == [True, False]
    assert [one["holds"] for one in lab._limits({"udp": found(back=2)}, "p99", 1.0)] == [False, True]
    told["quic"] = found(reconnected=1)
    assert [one["figure"] for one in lab._limits(told, "p99", 1.0) if not one["holds"]] == [
        "quic: handshakes"
    ]
    told["udp"] = found(reconnected=3)
    assert all(one["holds"] for one in lab._limits({"udp": told["udp"]}, "p99", 1.0)), "UDP has none"


def test_groups_of_peers_by_what_they_are_for() -> None:
    assert lab._groups(lab.Plan(10, 2, 1.0, 4)) == ["udp", "quic", *lab.VICTIMS]
    assert lab._groups(lab.Plan(10, 0, 1.0, 4)) == ["udp", *lab.VICTIMS]
    assert set(lab.VICTIMS) <= set(lab.TRIALS)


def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"udp": found(back=2, max=None), "quic": found(reconnected=1)}
    document = {
        "udp": 3, "quic": 3, "mode": "native-copy", "opened_in": 0.25, "seconds": 2.0, "asked": 1234,
        "probes": 56, "stalls": 2,
        "trials": [
            {"trial": "cut", "kinds": kinds, "lost": 1, "thresholds": lab._limits(kinds, "p99", 1.0)},
            {"trial": "kill", "thresholds": [lab.limit("failover", None, 0.25)]},
        ],
    }  # fmt: skip
    show(Output(), document)
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert lines[2].split() == ["cut", "udp", "2", "of", "3", "10.0", "20.0", "never", "0", "1"]
    limits = [line.split() for line in lines]
    assert ["cut", "udp:", "not", "back", "1", "0", "missed"] in limits
    assert ["cut", "udp:", "p99", "0.020", "s", "1.000", "s", "holds"] in limits
    assert ["cut", "quic:", "handshakes", "1", "0", "missed"] in limits
    assert ["kill", "failover", "never", "0.250", "s", "missed"] in limits
    assert lines[-1] == (
        "3 UDP and 3 QUIC connections over native-copy, open within 0.25 s; faults of 2 s; 1,234 questions, "
        "56 of them to suspects"
    )
    assert "stalled 2 times" in written.err


@pytest.mark.parametrize(
    "words",
    [
        ("--trial", "none"),
        ("--udp", "0"),
        ("--quic", "-1"),
        ("--seconds", "0"),
        ("--seconds", "26"),
        ("--mode", "fast"),
    ],
)
def test_options_out_of_range(words: tuple[str, str]) -> None:
    """Told before anything is made."""
    assert CliRunner().invoke(lab.connections, words).exit_code == 2
