# SPDX-License-Identifier: Apache-2.0
"""Policies as text, put together from parts, for tests that need many that differ in one key."""

from __future__ import annotations

import pytest

from xdp.errors import PolicyError
from xdp.policy import Policy

#: A policy, the key path that its error names ("" for the file) and words that the message must have.
BadPolicy = tuple[str, str, list[str]]

LANES = '[[lane]]\nname = "votes"\n[[lane]]\nname = "shreds"\n[[lane]]\nname = "bulk"\n'
CLASSES = '[[class]]\nname = "staked"\nprefixes = ["192.0.2.0/24"]\n'
SERVICE = '[[service]]\nname = "tpu"\nports = [8005]\n'


def policy(
    top: str = "",
    *,
    version: str = "version = 1",
    lanes: str = LANES,
    classes: str = CLASSES,
    services: str = SERVICE,
) -> str:
    return f"{version}\n{top}\n{lanes}\n{classes}\n{services}"


def lane(keys: str) -> str:
    return policy(lanes=f'[[lane]]\nname = "votes"\n{keys}\n[[lane]]\nname = "bulk"\n')


def peer_class(keys: str) -> str:
    return policy(classes=f'[[class]]\nname = "staked"\n{keys}\n')


def service(keys: str) -> str:
    return policy(services=f'[[service]]\nname = "tpu"\n{keys}\n')


def kind(keys: str) -> str:
    return service(f'ports = [8005]\n[[service.kind]]\nname = "data"\n{keys}')


def match(keys: str) -> str:
    return kind(f"match = [{{ {keys} }}]")


def rule(keys: str, *, classes: str = CLASSES) -> str:
    return policy(classes=classes, services=f"{SERVICE}[[service.rule]]\n{keys}\n")


def many(table: str, count: int, keys: str = "", **more: str) -> str:
    return "".join(f'[[{table}]]\nname = "n{i}"\n{keys.replace("#", str(i + 1))}\n' for i in range(count))


HUGE = "0x" + "f" * 3000
V4 = "192.0.2."


def check_refusal(name: str, bad: BadPolicy) -> None:
    """Asserts that ``bad``, in a file of that name, is refused in one clear line."""
    text, path, words = bad
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, f"{name}.toml")
    message = str(caught.value)
    assert message.startswith(f"{name}.toml: {path}: " if path else f"{name}.toml: ")
    for word in words:
        assert word in message
    assert message.isprintable()
    assert len(message) < 600
    assert caught.value.hint
