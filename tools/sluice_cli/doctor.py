# SPDX-License-Identifier: Apache-2.0
"""``sluice doctor``: what this kernel and interface can do, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from sluice_cli.output import Output, Table, common_options, examples
from xdp.errors import UnsupportedError
from xdp.probe import Finding, probe_host
from xdp.probe_interface import probe_interface

_STYLES = {"ok": "", "warn": "yellow", "missing": "red"}


@click.command(
    epilog=examples(
        """sudo sluice doctor
        sudo sluice doctor eth1
        sluice doctor --json"""
    ),
)
@click.argument("interface", required=False)
@common_options
def doctor(output: Output, interface: str | None) -> int:
    """Say what this kernel and interface can do, and what to do about the rest.

    "warn" works less well or not in every mode; "missing" doesn't work. The exit code is 0 unless something
    is missing without which Sluice can't be loaded.
    """
    # The interface first: a wrong name should not wait for all the rest.
    about_interface = probe_interface(interface) if interface is not None else []
    about_host = probe_host()
    everything = [*about_host, *about_interface]
    hopeless = [finding.topic for finding in everything if finding.essential and finding.state == "missing"]
    document: dict[str, Any] = {
        "ok": not hopeless,
        "essential_missing": hopeless,
        "host": [_document(finding) for finding in about_host],
    }
    if interface is not None:
        document["interface"] = {"name": interface, "findings": [_document(one) for one in about_interface]}

    def text() -> None:
        output.tables(
            [_table(about_host, "this machine")]
            + ([_table(about_interface, f"interface {interface}")] if interface is not None else [])
        )
        output.line()
        if hopeless:
            output.line(f"Sluice can't be loaded here: {', '.join(hopeless)}", "red")
        else:
            output.line("Sluice can be loaded here", "green")

    output.report(document, text)
    return UnsupportedError.exit_code if hopeless else 0


def _document(finding: Finding) -> dict[str, Any]:
    found = {"topic": finding.topic, "state": finding.state, "detail": finding.detail}
    if finding.advice:
        found["advice"] = finding.advice
    return found | {"essential": finding.essential}


def _table(findings: Sequence[Finding], title: str) -> Table:
    rows: list[list[str]] = []
    styles = {}
    for finding in findings:
        styles[len(rows)] = _STYLES[finding.state]
        rows.append([finding.state, finding.topic, finding.detail])
        if finding.state != "ok" and finding.advice:
            rows.append(["", "", f"-> {finding.advice}"])
    return Table(["", "", ""], rows, title=title, styles=styles)
