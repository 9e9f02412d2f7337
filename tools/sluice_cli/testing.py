# SPDX-License-Identifier: Apache-2.0
"""``sluice test``: the project's tests, level by level, with a plain summary at the end.

Each level is a pytest process of its own, so that a crash in C code or a hung process costs that level
only, and is reported as what it is.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Self

import click

from sluice_cli.output import Output, Table, common_options
from sluice_cli.skips import unexcused
from xdp.errors import PermissionsError, SluiceError, UnsupportedError, UsageError

LEVELS = {
    "unit": "no privileges, no packets",
    "kernel": "the BPF programs in the running kernel, by test runs",
    "traffic": "real packets between network namespaces",
    "simulation": "networks in virtual time",
}

# Of these a skipped test means that something went unproved: it counts as failed; see sluice_cli.skips.
NEED_BPF = ("kernel", "traffic")

# Levels that --together runs at once, on two CPUs: kernel and traffic wait for packets and timers more than
# they compute.
AT_ONCE = 3

# Without coverage: it computes all the time, tracing makes it three times as long, and the unit tests cover
# what it runs.
UNMEASURED = ("simulation",)

# pytest's exit codes, https://docs.pytest.org/en/stable/reference/exit-codes.html
TESTS_FAILED = 1
INTERRUPTED = 2
NOTHING_COLLECTED = 5

# Seconds that tests get after Ctrl-C to take down their namespaces.
TEARDOWN = 60.0

# The shortest program: (opcode, immediate) of `r0 = XDP_PASS` and `exit`, linux/bpf.h.
_PASS = ((0xB7, 2), (0x95, 0))


@dataclass(slots=True)
class Result:
    """What one level came to. ``problem`` says why it counts as failed, "" when it does not."""

    level: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""
    skips: list[str] = field(default_factory=list)  # their reasons


@click.command()
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice([*LEVELS]),
    metavar="LEVEL",
    help="Only this level: unit, kernel, traffic or simulation. May be given more than once.",
)
@click.option(
    "--together",
    is_flag=True,
    help="Run levels at the same time: takes two CPUs, and half the time.",
)
@click.option("-k", "expression", metavar="EXPRESSION", help="Only tests whose name matches, as pytest's -k.")
@click.option(
    "--coverage",
    is_flag=True,
    help="Measure lines and branches; a whole run fails below the minimum in pyproject.toml.",
)
@click.option("-x", "--stop", is_flag=True, help="Stop at the first failure.")
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
@common_options
def test(
    output: Output,
    levels: Sequence[str],
    expression: str | None,
    coverage: bool,
    together: bool,
    stop: bool,
    pytest_arguments: Sequence[str],
) -> int:
    """Run the test suite: all levels, or some.

    The levels kernel and traffic load BPF programs and need root; when that is impossible the run fails
    instead of leaving them out. Arguments after -- go to pytest.

    \b
    Examples:
      sudo sluice test                       everything
      sluice test --level unit               what needs no privileges
      sudo sluice test --level kernel -k vlan
      sudo sluice test --coverage
      sudo sluice test -- --durations=10
    """
    root = find_checkout()
    present = [level for level in LEVELS if has_tests(root, level)]
    chosen = [level for level in LEVELS if level in levels] or present
    for level in chosen:
        if level not in present:
            raise UsageError(
                f"there are no tests in tests/{level}", hint=f"levels with tests: {', '.join(present)}"
            )
    for module in ("pytest", *(["coverage"] if coverage else [])):
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(
                f"{module} is not installed", hint="pip install -e '.[test]' in the checkout"
            )
    if any(level in NEED_BPF for level in chosen):
        require_bpf()

    arguments = [*(["-x"] if stop else []), *(["-k", expression] if expression else []), *pytest_arguments]
    with coverage_data(coverage) as data:
        results = run_levels(root, chosen, arguments, data, output, together=together, stop=stop)
        if expression and not any(r.passed + r.failed + r.skipped for r in results):
            raise UsageError(f"no test matches -k {expression!r}")
        whole = not expression and not pytest_arguments and chosen == present
        covered, problem = report_coverage(root, data, whole, output) if data else (None, "")
    show(results, covered, problem, output)
    return TESTS_FAILED if problem or any(result.problem for result in results) else 0


def run_levels(
    root: Path,
    chosen: Sequence[str],
    arguments: Sequence[str],
    data: Path | None,
    output: Output,
    *,
    together: bool,
    stop: bool,
) -> list[Result]:
    """All levels in turn; ``together``: several at once, the output of each after that of the one before."""
    results: list[Result] = []
    waiting = list(chosen)
    started: dict[str, Level] = {}
    with contextlib.ExitStack() as cleanup:
        for name in chosen:
            while name not in started or started[name].running:
                running = [level for level in started.values() if level.running]
                while waiting and len(running) < (AT_ONCE if together else 1):
                    beside = together and waiting[0] != chosen[0]
                    level = Level(root, waiting[0], arguments, data, output, beside=beside)
                    started[waiting.pop(0)] = cleanup.enter_context(level)
                    running.append(level)
                wait_for_any([level.child for level in running])
            results.append(started[name].finish())
            if stop and results[-1].problem:
                break
    return results


def find_checkout() -> Path:
    """The root of the checkout that this module runs from; tests are not installed."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "tests").is_dir() or not (root / "pyproject.toml").is_file():
        raise UnsupportedError(
            "the tests are not part of an installed Sluice",
            hint="clone the repository and run tools/sluice test there",
        )
    return root


def has_tests(root: Path, level: str) -> bool:
    """Whether a level has any test file."""
    return next((root / "tests" / level).rglob("test_*.py"), None) is not None


def require_bpf() -> None:
    """Load the smallest XDP program there is; raise when the kernel or our privileges don't allow it."""
    from xdp._libbpf import ffi, lib

    code = b"".join(struct.pack("=BBhi", opcode, 0, 0, immediate) for opcode, immediate in _PASS)
    descriptor = lib.sluice_prog_load(
        lib.BPF_PROG_TYPE_XDP,
        b"sluice_test",
        b"GPL",
        ffi.from_buffer("char[]", code),
        len(_PASS),
        lib.BPF_XDP,
        0,
        ffi.NULL,
        0,
        0,
    )
    if descriptor >= 0:
        os.close(descriptor)
        return
    what = "the levels kernel and traffic need BPF, which can't be loaded here"
    if -descriptor in (errno.EPERM, errno.EACCES):
        raise PermissionsError.from_errno(what, -descriptor, hint="run as root, or choose --level unit")
    raise UnsupportedError.from_errno(
        what, -descriptor, hint="use a kernel with CONFIG_BPF_SYSCALL, or --level unit"
    )


@contextlib.contextmanager
def coverage_data(wanted: bool) -> Iterator[Path | None]:
    """A directory for coverage's data files; tests that drop privileges must be able to write there."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="sluice-coverage-") as directory:
        path = Path(directory)
        path.chmod(0o1777)
        yield path


def measuring(root: Path, data: Path) -> dict[str, str]:
    """Our environment with coverage's settings for this run, and none of a run that measures us."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return kept | {"COVERAGE_FILE": str(data / ".coverage"), "COVERAGE_RCFILE": str(root / "pyproject.toml")}


class Level:
    """One level's pytest process; a context manager that leaves no process behind.

    It writes to our stdout, or to stderr when stdout is for JSON; with ``beside`` into a file that
    ``finish`` shows, so that several levels can run at the same time.  ``child`` is the process.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        arguments: Sequence[str],
        data: Path | None,
        output: Output,
        *,
        beside: bool,
    ) -> None:
        self.name = name
        self._root = root
        self._filtered = bool(arguments)
        self._output = output
        self._directory = tempfile.TemporaryDirectory(prefix="sluice-test-")
        self._report = Path(self._directory.name) / "report.xml"
        self._log = (Path(self._directory.name) / "log").open("w+", encoding="utf-8") if beside else None
        if name in UNMEASURED:
            data = None
        environment = measuring(root, data) if data else dict(os.environ)
        command = [sys.executable, "-m", *(["coverage", "run", "-m"] if data else [])]
        command += ["pytest", f"tests/{name}", f"--junit-xml={self._report}", *arguments]
        if not beside:
            self._announce()
        self._start = time.monotonic()
        self._seconds = 0.0
        self.child = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log or (sys.stderr if output.json else None),
            stderr=subprocess.STDOUT if beside else None,
        )

    def _announce(self) -> None:
        if not self._output.json:
            self._output.line(f"== {self.name}: {LEVELS[self.name]}", "bold")
            sys.stdout.flush()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        if self._seconds == 0.0 and self.child.poll() is not None:
            self._seconds = time.monotonic() - self._start
        return self._seconds == 0.0

    def finish(self) -> Result:
        """What came of it; it has ended."""
        if self._log is not None:
            self._announce()
            self._log.seek(0)
            shutil.copyfileobj(self._log, sys.stderr if self._output.json else sys.stdout)
        result = read_report(self.name, self._report)
        result.seconds = self._seconds
        result.problem = judge(result, self.child.wait(), self._root, filtered=self._filtered)
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGINT)
            end_soon([self.child])
        if self._log is not None:
            self._log.close()
        self._directory.cleanup()


def wait_for_any(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until one has ended; all get time to clean up when we are interrupted or terminated."""

    def terminate(*_: object) -> NoReturn:
        for child in children:
            child.send_signal(signal.SIGINT)
        raise SystemExit(128 + signal.SIGTERM)  # as shells report it

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with contextlib.ExitStack() as cleanup:
            poller = select.poll()
            for child in children:
                descriptor = os.pidfd_open(child.pid)
                cleanup.callback(os.close, descriptor)
                poller.register(descriptor, select.POLLIN)
            poller.poll()
    except (KeyboardInterrupt, SystemExit):
        # They have been sent SIGINT as well, by the terminal or above.
        end_soon(children)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def end_soon(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for those that were told to end; kill whoever takes too long."""
    deadline = time.monotonic() + TEARDOWN
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def read_report(level: str, report: Path) -> Result:
    """Count what pytest's JUnit report says; an absent or torn one counts nothing."""
    result = Result(level)
    try:
        suites = ET.parse(report).getroot().iter("testsuite")  # noqa: S314 - written by our own pytest
    except (OSError, ET.ParseError):
        return result
    for suite in suites:
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0))
        result.failed += failed
        result.skipped += skipped
        result.passed += int(suite.get("tests", 0)) - failed - skipped
        result.skips += [one.get("message", "") for one in suite.iter("skipped")]
    return result


def judge(result: Result, code: int, root: Path, *, filtered: bool) -> str:
    """Why a level failed, from its counts and pytest's exit code; "" when it did not."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code == NOTHING_COLLECTED:
        return "" if filtered else "no tests were found"
    if code == INTERRUPTED:
        return "interrupted, or the tests can't be imported"
    if result.failed or code == TESTS_FAILED:
        return f"{result.failed} failed"
    if code:
        return f"pytest gave up with exit code {code}"
    if result.level in NEED_BPF and (skips := unexcused(result.skips, root)):
        return f"{len(skips)} skipped, which proves nothing: {skips[0]}"
    if not result.passed and not filtered:
        return "nothing was tested"
    return ""


def report_coverage(root: Path, data: Path, whole: bool, output: Output) -> tuple[float | None, str]:
    """Combine what all processes measured; the minimum holds only for a whole run.

    Returns the percentage (lines and branches) and what is wrong with it.
    """
    environment = measuring(root, data)
    coverage = [sys.executable, "-m", "coverage"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*coverage, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
        )

    combined = run("combine", "--quiet")
    if combined.returncode:
        raise SluiceError("coverage has no data", detail=combined.stdout + combined.stderr)
    report = run("report", *([] if whole else ["--fail-under=0"]))
    if not output.json:
        output.line(report.stdout.rstrip())
    total = run("report", "--format=total", "--precision=2", "--fail-under=0")
    if total.returncode:
        raise SluiceError("coverage can't report", detail=total.stdout + total.stderr)
    covered = float(total.stdout)
    return (
        covered,
        f"coverage is {covered:.2f} %, below the minimum in pyproject.toml" if report.returncode else "",
    )


def show(results: Sequence[Result], covered: float | None, problem: str, output: Output) -> None:
    """The summary: a row a level, and one last line that says it all."""
    problems = [f"{result.level}: {result.problem}" for result in results if result.problem]
    problems += [problem] if problem else []
    document = {
        "levels": [
            {
                "name": result.level,
                "passed": result.passed,
                "failed": result.failed,
                "skipped": result.skipped,
                "seconds": round(result.seconds, 1),
                "problem": result.problem,
            }
            for result in results
        ],
        "coverage_percent": covered,
        "ok": not problems,
    }

    def table() -> None:
        rows = [
            [r.level, str(r.passed), str(r.failed), str(r.skipped), f"{r.seconds:.1f}", r.problem or "ok"]
            for r in results
        ]
        columns = ["level", "passed", "failed", "skipped", "seconds", "result"]
        output.line()
        output.table(Table(columns, rows, right=frozenset({1, 2, 3, 4})))
        if covered is not None:
            output.line(f"coverage, lines and branches: {covered:.2f} %")
        output.line("failed: " + "; ".join(problems) if problems else "ok", "red" if problems else "green")

    output.report(document, table)
