# SPDX-License-Identifier: Apache-2.0
"""What an emulated machine reports, and what is wrong with it.

The report is one JSON document on the machine's second serial port, made of pytest's own report: the tests'
outcomes, and for each way that packets take the numbers that tests/traffic/test_paths.py recorded.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: Raised when a field is removed or changes its meaning.
VERSION: Final = 1
MODE: Final = "native-zero-copy"
PATHS_MODULE: Final = "tests.traffic.test_paths"
#: The tests of that module, each of which is one way.
PATHS: Final = ("receive", "several_sockets_of_a_queue", "send", "echo", "fan_out", "flood")
_OUTCOMES: Final = ("failure", "error", "skipped")
_MESSAGE: Final = 300  # characters of a failure that go into the report


@dataclass(frozen=True)
class Case:
    """One test and what became of it: passed, failed (error too) or skipped, and why."""

    name: str
    outcome: str
    message: str = ""


@dataclass(frozen=True)
class Way:
    """One way, and what its test counted: numbers by their name."""

    name: str
    mode: str
    queues: int
    counts: Mapping[str, int]

    def count(self, name: str) -> int:
        """A number; -1 when it was not recorded, as by a test that failed."""
        return self.counts.get(name, -1)


@dataclass(frozen=True)
class Report:
    """All that one machine said."""

    driver: str
    kernel: str
    seconds: float
    exit_code: int
    tests: tuple[Case, ...] = ()
    paths: tuple[Way, ...] = ()

    @property
    def passed(self) -> int:
        """How many tests did."""
        return sum(test.outcome == "passed" for test in self.tests)


def read_junit(text: str) -> tuple[list[Case], list[Way]]:
    """From pytest's report (``--junit-xml``).

    Raises:
        ValueError: it is none, or torn.
    """
    try:
        cases = list(ET.fromstring(text).iter("testcase"))  # noqa: S314 - written by our own pytest
    except ET.ParseError as error:
        raise ValueError(f"no report of pytest's: {error}") from None
    tests, paths = [], []
    for case in cases:
        module, name = case.get("classname", ""), case.get("name", "")
        outcome, message = "passed", ""
        for kind in _OUTCOMES:
            if (found := case.find(kind)) is not None:
                outcome = "skipped" if kind == "skipped" else "failed"
                message = found.get("message", "")[:_MESSAGE]
        tests.append(Case(f"{module}::{name}", outcome, message))
        way = name.removeprefix("test_")
        if module == PATHS_MODULE and way in PATHS:
            said = {str(one.get("name")): str(one.get("value")) for one in case.iter("property")}
            counts = {key: int(value) for key, value in said.items() if re.fullmatch(r"\d+", value)}
            paths.append(Way(way, said.get("mode", ""), counts.pop("queues", 0), counts))
    return tests, paths


def encode(report: Report) -> str:
    """One line of JSON."""
    document = {
        "version": VERSION,
        "driver": report.driver,
        "kernel": report.kernel,
        "seconds": report.seconds,
        "exit_code": report.exit_code,
        "tests": [vars(test) for test in report.tests],
        "paths": [{**vars(path), "counts": dict(path.counts)} for path in report.paths],
    }
    return json.dumps(document) + "\n"


def decode(text: str) -> Report:
    """The report that a machine wrote.

    Raises:
        ValueError: nothing, a torn line, or another version.
    """
    if not text.strip():
        raise ValueError("the machine reported nothing")
    if not text.endswith("\n"):
        raise ValueError("the machine's report is torn")
    try:
        document: Any = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the machine's report is no JSON: {error}") from None
    if not isinstance(document, dict) or document.pop("version", None) != VERSION:
        raise ValueError(f"the machine's report is not of version {VERSION}")
    try:
        document["tests"] = tuple(Case(**one) for one in document["tests"])
        document["paths"] = tuple(Way(**one) for one in document["paths"])
        return Report(**document)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the machine's report has another shape: {error}") from None


def problems(report: Report, kernel: str) -> list[str]:
    """Everything that is not as asked; [] when zero-copy is proved."""
    found = [
        f"{test.name} {test.outcome}: {test.message}" for test in report.tests if test.outcome != "passed"
    ]
    if report.exit_code and not found:
        found.append(f"pytest ended with code {report.exit_code}")
    if report.kernel != kernel:
        found.append(f"it ran {report.kernel}, not {kernel}")
    by_name = {path.name: path for path in report.paths}
    for name in PATHS:
        path = by_name.get(name)
        if path is None:
            found.append(f"{name}: not tried")
            continue
        if path.mode != MODE:
            found.append(f"{name}: the mode is {path.mode or 'not told'}, not {MODE}")
        if path.queues < 2:
            found.append(f"{name}: {path.queues} queues, not 2")
        if not 0 < path.count("received") == path.count("intact") == _arrived(path):
            found.append(
                f"{name}: {path.count('sent')} sent, {path.count('received')} received, "
                f"{path.count('intact')} intact"
            )
    return found


def _arrived(path: Way) -> int:
    """What has to be received: all that was sent, or all votes that the program has seen in a flood."""
    return path.count("seen") if path.name == "flood" else path.count("sent")
