# SPDX-License-Identifier: Apache-2.0
"""Datagrams in batches: the backends (AF_XDP, recvmmsg, plain sockets) behind one interface.

``open_lanes`` is the way in; see :mod:`userspace.datagram.lanes`.
"""
