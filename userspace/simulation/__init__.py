# SPDX-License-Identifier: Apache-2.0
"""Networks in virtual time: links, queues and faults, seeded; for tests and ``sluice simulate``."""
