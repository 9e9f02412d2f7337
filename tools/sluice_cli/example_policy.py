# SPDX-License-Identifier: Apache-2.0
"""Where the example policies are: in a checkout, or where the package was installed."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Final

from xdp.errors import UnsupportedError

_CHECKOUT: Final = Path(__file__).resolve().parents[2] / "docs" / "examples"
#: As pyproject.toml says under data-files.
_INSTALLED: Final = Path(sysconfig.get_path("data")) / "share" / "sluice" / "examples"


def example_policy(name: str) -> Path:
    """The file of an example.

    Raises:
        UnsupportedError: it is in neither place.
    """
    for folder in (_CHECKOUT, _INSTALLED):
        if (folder / name).is_file():
            return folder / name
    raise UnsupportedError(
        f"the example policy {name} is neither in {_CHECKOUT} nor in {_INSTALLED}",
        hint="run it from a checkout: tools/sluice",
    )
