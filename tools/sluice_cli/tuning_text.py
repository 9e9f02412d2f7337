# SPDX-License-Identifier: Apache-2.0
"""Changed settings of an interface as text: what they were and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdp.owner_state import Tuned


def tuned_documents(tuned: Sequence[Tuned]) -> list[dict[str, str]]:
    """For JSON."""
    return [{"key": one.key, "before": one.before, "after": one.after} for one in tuned]


def tuned_rows(documents: Any) -> list[str]:
    """The same, one line each."""
    return [f"{one['key']} {one['before']} → {one['after']}" for one in documents or ()]
