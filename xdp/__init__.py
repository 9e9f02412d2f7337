# SPDX-License-Identifier: Apache-2.0
"""Control plane: everything that talks to the kernel about programs, maps and interfaces.

Start at :mod:`xdp.policy` (what should happen), :mod:`xdp.program` (the loaded
program) and :mod:`xdp.link` (where it is attached).
"""
