# SPDX-License-Identifier: Apache-2.0
"""``python -m sluice_cli`` is the command ``sluice``."""

from __future__ import annotations

import sys

from sluice_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
