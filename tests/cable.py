# SPDX-License-Identifier: Apache-2.0
"""What the labs of this run are made of, and the best mode that must hold on it.

A veth pair as a rule, which has no zero-copy; with SLUICE_LAB_NICS (`sluice lab vm` sets it) two network
cards, on which nothing less than zero-copy counts.
"""

from __future__ import annotations

from typing import Final

from sluice_cli import lab_nics
from userspace.datagram.descriptors import Mode

NICS: Final = lab_nics.named()
#: What a program attached natively must come to.
NATIVE: Final[Mode] = "native-zero-copy" if NICS else "native-copy"
