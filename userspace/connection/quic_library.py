# SPDX-License-Identifier: Apache-2.0
"""What is used of aioquic, and what to do where it is not installed: the only place that imports it."""

from __future__ import annotations

from xdp.errors import UnsupportedError

try:
    import aioquic
    from aioquic._buffer import Buffer
    from aioquic.quic import events
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.congestion.base import (
        K_GRANULARITY,
        QuicCongestionControl,
        register_congestion_control,
    )
    from aioquic.quic.connection import QuicConnection as Library
    from aioquic.quic.packet import QuicErrorCode, QuicProtocolVersion
    from aioquic.quic.packet_builder import QuicDeliveryState, QuicSentPacket
    from aioquic.quic.recovery import QuicPacketPacer, QuicPacketRecovery, QuicPacketSpace
    from aioquic.tls import AlertDescription, Epoch, SessionTicket
except ImportError:
    raise UnsupportedError("aioquic is not installed", hint="pip install 'sluice[quic]'") from None

LIBRARY_VERSION = aioquic.__version__

__all__ = [
    "K_GRANULARITY",
    "LIBRARY_VERSION",
    "AlertDescription",
    "Buffer",
    "Epoch",
    "Library",
    "QuicConfiguration",
    "QuicCongestionControl",
    "QuicDeliveryState",
    "QuicErrorCode",
    "QuicPacketPacer",
    "QuicPacketRecovery",
    "QuicPacketSpace",
    "QuicProtocolVersion",
    "QuicSentPacket",
    "SessionTicket",
    "events",
    "register_congestion_control",
]
