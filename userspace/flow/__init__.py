# SPDX-License-Identifier: Apache-2.0
"""Flow control: when to send, how much may be on its way, and what to drop.

No socket, clock, thread or random number in here: every call takes ``now`` (seconds of any monotonic clock,
a float) and says what to do and when to come back.  So it runs over anything, and in virtual time
(:mod:`userspace.simulation`); nothing of the rest of Sluice is needed.

=====================================================  ===================================================
:mod:`~userspace.flow.congestion`                      what a congestion controller is told, and answers
:mod:`~userspace.flow.newreno`, ``cubic``, ``bbr``,    the controllers
``copa``
:mod:`~userspace.flow.hystart`, ``registry``            leaving slow start in time; controllers by name
:mod:`~userspace.flow.filters`, ``limits``              windowed maxima and minima; bounds of what is believed
:mod:`~userspace.flow.rtt`, ``sent``, ``recovery``     round-trip time, packets on their way, loss (RFC 9002)
:mod:`~userspace.flow.ranges`, ``window``              the receiver's side; a sliding window for streams
:mod:`~userspace.flow.bucket`, ``pacer``               rates and release times
:mod:`~userspace.flow.bounded`, ``codel``, ``fair``    queues with limits: CoDel (RFC 8289), FQ-CoDel
:mod:`~userspace.flow.room`                            back-pressure: refuse, or wait for room
:mod:`~userspace.flow.door`                            whom the kernel program is to hold at a rate
:mod:`~userspace.flow.controller`                      FlowController, which ties them together
=====================================================  ===================================================
"""
