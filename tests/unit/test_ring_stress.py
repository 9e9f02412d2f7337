# SPDX-License-Identifier: Apache-2.0
"""The rings' C under stress: as it is, under AddressSanitizer and UBSan, and under ThreadSanitizer.

ThreadSanitizer also gets the code with one barrier taken away, and has to notice each time: so a barrier
is there for a reason, and a clean run means something.
"""

from __future__ import annotations

import functools
import random
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NATIVE = ROOT / "userspace" / "native"
FLAGS = ["-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"]

PLAIN = ["-O2"]
ADDRESSES = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-O1", "-fsanitize=thread"]

#: What ring_stress runs of everything: a few seconds, of which ThreadSanitizer makes tens.
ROUNDS = {"plain": 600, "addresses": 250, "threads": 150}

#: By letter of channel.h: an end of a line of channel.c, and whether to change its first or last place.
BARRIERS = {
    "A": ("memory_order_seq_cst, memory_order_relaxed))", 0),
    "B": ("memory_order_acquire); /* B */", 0),
    "C": ("memory_order_seq_cst); /* C */", 0),
    "D, one producer": ("memory_order_acquire); /* D */", 0),
    "D, many producers": ("memory_order_acquire); /* D */", -1),
    "F": ("memory_order_seq_cst); /* F, W */", 0),
    "G": ("memory_order_acquire) != sl_channel_stamp(index)) /* G */", 0),
}


def build(program: Path, mode: list[str], native: Path = NATIVE, *options: str) -> Path:
    sources = [HERE / "ring_stress.c", HERE / "ring_bench.c", *sorted(native.glob("channel*.c"))]
    subprocess.run(["gcc", *FLAGS, *mode, *options, f"-I{native}", "-o", program, *sources], check=True)
    return program


def run(program: Path, rounds: int, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return subprocess.run(
        [*prefix, program, str(seed), str(rounds)], capture_output=True, text=True, check=False
    )


@functools.cache
def thread_sanitizer(folder: Path) -> tuple[str, ...] | None:
    """What to put before a program that is built with it; None: this compiler or kernel can't.

    Where addresses are more random than its shadow memory allows for, it runs without that.
    """
    source, program = folder / "empty.c", folder / "empty"
    source.write_text("int main(void) { return 0; }\n", encoding="ascii")
    built = subprocess.run(["gcc", *THREADS, "-o", program, source], capture_output=True, check=False)
    for prefix in ((), ("setarch", "-R")):
        if built.returncode == 0 and subprocess.run([*prefix, program], check=False).returncode == 0:
            return prefix
    return None


@pytest.fixture(scope="module")
def under_threads(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    prefix = thread_sanitizer(tmp_path_factory.mktemp("sanitizer"))
    if prefix is None:
        pytest.skip("no ThreadSanitizer here: gcc needs libtsan")
    return prefix


@pytest.mark.parametrize(("name", "mode"), [("plain", PLAIN), ("addresses", ADDRESSES)])
def test_stress(tmp_path: Path, name: str, mode: list[str]) -> None:
    done = run(build(tmp_path / name, mode), ROUNDS[name])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost, nothing twice, all in order, all woken" in done.stdout


def test_stress_under_thread_sanitizer(tmp_path: Path, under_threads: tuple[str, ...]) -> None:
    done = run(build(tmp_path / "threads", THREADS), ROUNDS["threads"], under_threads)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost" in done.stdout
    assert not done.stderr


def changed(folder: Path, name: str, before: str, after: str, place: int = 0) -> Path:
    """A copy of the C code in which one file has ``after`` in ``before``'s first (0) or last (-1) place."""
    for source in NATIVE.glob("channel*.[ch]"):
        text = source.read_text(encoding="utf-8")
        if source.name == name:
            at = text.index(before) if place == 0 else text.rindex(before)
            text = text[:at] + after + text[at + len(before) :]
        (folder / source.name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("barrier", BARRIERS)
def test_thread_sanitizer_misses_a_barrier(
    tmp_path: Path, under_threads: tuple[str, ...], barrier: str
) -> None:
    """With release or acquire gone, elements are written and read at the same time."""
    before, place = BARRIERS[barrier]
    order = before.split(",")[0].split(")")[0]
    native = changed(tmp_path, "channel.c", before, before.replace(order, "memory_order_relaxed", 1), place)
    program = build(tmp_path / "threads", THREADS, native)
    for _ in range(5):  # on one core it may take more than one go until threads meet
        done = run(program, 30, ("env", "TSAN_OPTIONS=halt_on_error=1", *under_threads))
        if done.returncode:
            break
    assert "ThreadSanitizer: data race" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("		write_event(fd);", "		(void)fd;"),  # step d
        ("	if (!something_to_get(channel))", "	if (!something_to_get(channel) || true)"),  # step 3
        ("	write_event(channel->room_fd);\n	return false;", "	return false;"),  # rule R2
    ],
    ids=["not woken", "not looked again", "took the wake-up of another"],
)
def test_a_lost_wakeup_is_noticed(tmp_path: Path, before: str, after: str) -> None:
    """Threads that nobody wakes are given up on, here after two seconds."""
    native = changed(tmp_path, "channel_wait.c", before, after)
    done = run(build(tmp_path / "plain", PLAIN, native, "-DWATCHDOG=2"), ROUNDS["plain"])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ring_stress.c:" in done.stderr
