# SPDX-License-Identifier: Apache-2.0
"""The command ``sluice``; :mod:`sluice_cli.main` is where it starts."""
