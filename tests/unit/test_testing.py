# SPDX-License-Identifier: Apache-2.0
"""``sluice test``: what counts as passed, over small checkouts with real pytest runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sluice_cli.output import Output
from sluice_cli.skips import FEATURE, KERNEL_TOPICS, VECTORS, lacking, unexcused, vectors_folder
from sluice_cli.testing import (
    Result,
    coverage_data,
    find_checkout,
    has_tests,
    judge,
    read_report,
    report_coverage,
    require_bpf,
    run_levels,
    show,
)
from xdp.errors import SluiceError
from xdp.probe import Finding, probe_host

ROOT = Path(__file__).resolve().parents[2]

PROJECT = """
[tool.pytest.ini_options]
addopts = ["--import-mode=importlib"]
[tool.coverage.run]
branch = true
parallel = true
source = ["."]
omit = ["tests/*"]
[tool.coverage.report]
fail_under = 90
"""

HALF_COVERED = """
def sign(number):
    if number < 0:
        return -1
    return 1
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    for level in ("unit", "kernel"):
        (tmp_path / "tests" / level).mkdir(parents=True)
    return tmp_path


def add_test(checkout: Path, level: str, text: str) -> None:
    (checkout / "tests" / level / "test_it.py").write_text(text, encoding="utf-8")


def run(checkout: Path, level: str, *arguments: str) -> Result:
    # JSON: what the inner pytest prints goes to stderr, apart from our own.
    return run_levels(checkout, [level], arguments, None, Output(json=True), together=False, stop=False)[0]


def test_passing_tests_pass(checkout: Path) -> None:
    add_test(checkout, "unit", "def test_a(): pass\ndef test_b(): pass\n")
    result = run(checkout, "unit")
    assert (result.passed, result.failed, result.skipped, result.problem) == (2, 0, 0, "")
    assert result.seconds > 0


def test_failures_and_errors_fail(checkout: Path) -> None:
    add_test(
        checkout,
        "unit",
        "import pytest\n@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_a(): assert 0\ndef test_b(broken): pass\ndef test_c(): pass\n",
    )
    result = run(checkout, "unit")
    assert (result.passed, result.failed, result.problem) == (1, 2, "2 failed")


def meeting(checkout: Path, level: str, others: Sequence[str]) -> str:
    """A test that passes only while, or after, others run."""
    signs = [str(checkout / other) for other in others]
    return (
        "import time\nfrom pathlib import Path\n"
        "def test_meets_the_others():\n"
        f"    Path({str(checkout / level)!r}).touch()\n"
        "    deadline = time.monotonic() + 60\n"
        f"    while not all(Path(other).exists() for other in {signs!r}):\n"
        "        assert time.monotonic() < deadline\n"
        "        time.sleep(0.01)\n"
    )


def test_levels_at_the_same_time(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three wait for each other; the last takes the place of one that ends, for two wait for it as well."""
    levels = ("unit", "kernel", "traffic", "simulation")
    meets = {
        "unit": levels,
        "kernel": ("unit", "kernel", "traffic"),
        "traffic": levels,
        "simulation": ("simulation",),
    }
    for level in levels:
        (checkout / "tests" / level).mkdir(exist_ok=True)
        add_test(checkout, level, meeting(checkout, level, meets[level]))
    results = run_levels(checkout, levels, [], None, Output(), together=True, stop=False)
    assert [(one.level, one.passed, one.problem) for one in results] == [(level, 1, "") for level in levels]
    assert all(one.seconds > 0 for one in results)
    out = capfd.readouterr().out
    places = [out.index(text) for level in levels for text in (f"== {level}", f"tests/{level}")]
    assert places == sorted(places)


def test_stopped_at_the_first_failure(checkout: Path) -> None:
    add_test(checkout, "unit", "def test_a(): assert 0\n")
    add_test(checkout, "kernel", "def test_b(): pass\n")
    results = run_levels(checkout, ["unit", "kernel"], [], None, Output(json=True), together=False, stop=True)
    assert [(one.level, one.problem) for one in results] == [("unit", "1 failed")]


SKIPPING = "import pytest\ndef test_a(): pytest.skip('no kernel')\ndef test_b(): pass\n"


def test_skip_is_a_failure_where_the_kernel_is_meant(checkout: Path) -> None:
    add_test(checkout, "kernel", SKIPPING)
    result = run(checkout, "kernel")
    assert (result.passed, result.skipped) == (1, 1)
    assert result.problem == "1 skipped, which proves nothing: no kernel"


def skipping(reason: str) -> str:
    return f"import pytest\ndef test_a(): pytest.skip({reason!r})\ndef test_b(): pass\n"


def test_absent_vectors_excuse_a_skip(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_VECTORS", raising=False)
    add_test(checkout, "kernel", skipping(f"{VECTORS}/somewhere"))
    result = run(checkout, "kernel")
    assert (result.skipped, result.problem) == (1, "")
    # Named ones have to be there.
    monkeypatch.setenv("SLUICE_VECTORS", str(checkout / "nowhere"))
    assert "1 skipped, which proves nothing" in run(checkout, "kernel").problem


def test_vectors_that_are_there_excuse_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_VECTORS", raising=False)
    reason = f"{VECTORS}{tmp_path}"
    assert unexcused([reason], tmp_path / "checkout") == []
    (tmp_path / "shared/vectors").mkdir(parents=True)
    assert vectors_folder(tmp_path / "checkout") == tmp_path / "shared/vectors"
    assert unexcused([reason], tmp_path / "checkout") == [reason]


def test_only_features_that_the_probe_misses_excuse_a_skip(tmp_path: Path) -> None:
    """The probe's word counts, not the test's."""
    have = next(one.topic for one in probe_host() if one.topic in KERNEL_TOPICS and one.state == "ok")
    reasons = [f"{FEATURE}{have}", f"{FEATURE}", f"{FEATURE}nonsense"]
    assert unexcused(reasons, tmp_path) == reasons
    findings = [
        Finding("AF_XDP sockets", "missing", ""),
        Finding("map types", "warn", "can't be asked without root"),
        Finding("huge pages", "warn", ""),
        Finding("kernel", "ok", ""),
    ]
    assert lacking(findings) == {"AF_XDP sockets"}


def test_feature_topics_are_the_probes() -> None:
    assert {one.topic for one in probe_host()} >= KERNEL_TOPICS


def test_feature_marker_skips_by_the_probe(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real conftest, with a probe that misses one thing."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tools'}")
    (checkout / "tests/conftest.py").write_text((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    add_test(
        checkout,
        "unit",
        "import pytest\n"
        "@pytest.fixture(scope='session')\n"
        "def lacking_features(): return frozenset({'sk_reuseport'})\n"
        "@pytest.mark.feature('sk_reuseport')\n"
        "def test_a(): assert 0\n"
        "@pytest.mark.feature('kernel')\n"
        "def test_b(): pass\n",
    )
    result = run(checkout, "unit", "-p", "no:cacheprovider")
    assert (result.passed, result.skips) == (1, ["this kernel lacks: sk_reuseport"])


def test_skip_is_shown_elsewhere(checkout: Path) -> None:
    add_test(checkout, "unit", SKIPPING)
    result = run(checkout, "unit")
    assert (result.skipped, result.problem) == (1, "")


def test_only_skips_fail_anywhere(checkout: Path) -> None:
    add_test(checkout, "unit", "import pytest\npytest.skip('all', allow_module_level=True)\n")
    assert run(checkout, "unit").problem


def test_no_tests_fail_unless_filtered(checkout: Path) -> None:
    add_test(checkout, "unit", "")
    assert run(checkout, "unit").problem == "no tests were found"
    add_test(checkout, "unit", "def test_a(): pass\n")
    assert run(checkout, "unit", "-k", "other").problem == ""


def test_import_error_fails(checkout: Path) -> None:
    add_test(checkout, "unit", "import nowhere_to_be_found\n")
    assert run(checkout, "unit").problem


def test_crash_names_its_signal(checkout: Path) -> None:
    add_test(checkout, "unit", "import os\ndef test_a(): os.kill(os.getpid(), 11)\n")
    assert run(checkout, "unit").problem == "ended by SIGSEGV"


def test_unknown_pytest_option_fails(checkout: Path) -> None:
    add_test(checkout, "unit", "def test_a(): pass\n")
    assert "pytest gave up with exit code 4" in run(checkout, "unit", "--no-such-option").problem


@pytest.mark.parametrize("text", ["", "<testsuites", "<a/>"])
def test_torn_report_counts_nothing(tmp_path: Path, text: str) -> None:
    report = tmp_path / "report.xml"
    report.write_text(text, encoding="utf-8")
    result = read_report("unit", report)
    assert (result.passed, result.failed) == (0, 0)
    assert judge(result, 0, tmp_path, filtered=False) == "nothing was tested"


@pytest.mark.parametrize(
    ("levels", "whole", "least", "problem"),
    [
        (["unit", "kernel"], True, 100.0, ""),
        (["unit"], True, 50.0, "below the minimum"),
        (["unit"], False, 50.0, ""),
    ],
    ids=["all-covered", "too-little", "part-of-a-run"],
)
def test_coverage_of_lines_and_branches(
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    levels: list[str],
    whole: bool,
    least: float,
    problem: str,
) -> None:
    (checkout / "half.py").write_text(HALF_COVERED, encoding="utf-8")
    (checkout / "conftest.py").write_text("import sys; sys.path.insert(0, '.')\n", encoding="utf-8")
    add_test(checkout, "unit", "from half import sign\ndef test_a(): assert sign(1) == 1\n")
    add_test(checkout, "kernel", "from half import sign\ndef test_b(): assert sign(-1) == -1\n")
    output = Output()
    with coverage_data(True) as data:
        assert data is not None
        results = run_levels(checkout, levels, [], data, output, together=False, stop=False)
        assert [result.problem for result in results] == [""] * len(levels)
        covered, said = report_coverage(checkout, data, whole, output)
    assert covered is not None
    assert least <= covered <= (100 if least == 100 else 89)
    assert said.endswith(f"{problem} in pyproject.toml") if problem else not said
    assert "half.py" in capsys.readouterr().out
    assert not data.exists()


def test_coverage_without_data_is_an_error(checkout: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SluiceError, match="coverage has no data"):
        report_coverage(checkout, empty, True, Output())


def test_summary_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    show([Result("unit", 3), Result("kernel", 1, 2, 0, 1.0, "2 failed")], 91.5, "", Output())
    out = capsys.readouterr().out
    assert "coverage, lines and branches: 91.50 %" in out
    assert out.rstrip().endswith("failed: kernel: 2 failed")


def test_summary_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    show([Result("unit", 3, 0, 1, 2.04)], None, "", Output(json=True))
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["version"] >= 1
    assert document["levels"] == [
        {"name": "unit", "passed": 3, "failed": 0, "skipped": 1, "seconds": 2.0, "problem": ""}
    ]


def test_checkout_is_found() -> None:
    assert find_checkout() == ROOT
    assert has_tests(ROOT, "unit")
    assert not has_tests(ROOT, "none")


#: Not all of the level's files: importing them takes several seconds.  Below the folder that pytest runs in.
FEW = ("--", "--ignore-glob=tests/unit/test_[!h]*.py")


def command(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-m", "sluice_cli", "test", *arguments],
        cwd="/",
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_prints_only_json_when_asked() -> None:
    done = command("--json", "--level", "unit", "-k", "test_version_of", *FEW)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is True
    assert document["levels"][0]["passed"] >= 5


def test_command_with_coverage_of_a_part_holds_no_minimum() -> None:
    done = command("--level", "unit", "-k", "test_version_of", "--coverage", *FEW)
    assert done.returncode == 0, done.stdout
    assert "coverage, lines and branches:" in done.stdout
    assert done.stdout.rstrip().endswith("ok")


def test_name_that_matches_nothing_is_an_error() -> None:
    done = command("--level", "unit", "-k", "no_such_test_anywhere", *FEW)
    assert done.returncode == 2
    assert "no test matches -k 'no_such_test_anywhere'" in done.stderr


def test_level_that_does_not_exist_is_an_error() -> None:
    assert command("--level", "nonsense").returncode == 2


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="gives up capabilities that only root has")
def test_without_bpf_levels_that_need_it_fail_at_once() -> None:
    require_bpf()
    done = command(
        "--level", "traffic", before=("setpriv", "--bounding-set", "-bpf,-sys_admin,-net_admin,-perfmon")
    )
    assert done.returncode == 4
    assert "need BPF, which can't be loaded here: Operation not permitted" in done.stderr
    assert "hint: run as root, or choose --level unit" in done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_lets_tests_clean_up(checkout: Path, sent: signal.Signals, code: int) -> None:
    add_test(
        checkout,
        "unit",
        "import pathlib, pytest, threading\n"
        "@pytest.fixture\n"
        "def thing():\n"
        "    yield\n"
        "    pathlib.Path('down').touch()\n"
        # not in the fixture: interrupted before its yield, it would have nothing to clean up
        "def test_a(thing):\n"
        "    pathlib.Path('up').touch()\n"
        # in pieces: a signal that comes just before a wait is heard only after it
        "    for _ in range(600):\n"
        "        threading.Event().wait(0.1)\n",
    )
    script = (
        "import sys, click; from pathlib import Path; from sluice_cli import testing; "
        f"testing.find_checkout = lambda: Path({str(checkout)!r}); "
        "testing.LEVELS = {'unit': 'one'}; from sluice_cli.main import main; sys.exit(main(['test']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd="/",
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not (checkout / "up").exists():
            assert time.monotonic() < deadline, "the inner test did not start"
            os.sched_yield()
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.send_signal(sent)
        assert process.wait(30) == code
    assert (checkout / "down").exists()
