# SPDX-License-Identifier: Apache-2.0
"""Connections to thousands of peers, kept for months: opened, watched, lent, lost and found again.

No socket, clock, thread or random number in here, but for what begins with ``aio``: every call takes ``now``
(seconds of any monotonic clock, a float) and says what to do and when to come back; who draws random numbers
is handed a ``random.Random``.  So it runs over anything, and in virtual time.

A connection is known by a number or by any other hashable key that the caller chooses.  Pool, health,
reconnection and transports know nothing of each other; the conductor ties them together.

=====================================================  ===================================================
:mod:`~userspace.connection.aio_pool`                  all of it in asyncio, with real datagrams
:mod:`~userspace.connection.cache`                     from an address to a live connection, at once
:mod:`~userspace.connection.conductor`                 pool, health, reconnection and transports together
:mod:`~userspace.connection.pool`                      connections to borrow and to share
:mod:`~userspace.connection.health`                    who is well, who is not, who is dead
:mod:`~userspace.connection.transport`                 what a connection is carried by: ``udp``, ``quic``
:mod:`~userspace.connection.states`                    what a connection is, what may follow what, and why
:mod:`~userspace.connection.reconnection`              which may try again, and when; who is given up
:mod:`~userspace.connection.backoff`                   delays between attempts
:mod:`~userspace.connection.timers`                    deadlines by key, thousands of them; times of calls
=====================================================  ===================================================
"""
