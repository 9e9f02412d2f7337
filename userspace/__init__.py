# SPDX-License-Identifier: Apache-2.0
"""Data plane and all above it; needs no privileges once its sockets are open."""
