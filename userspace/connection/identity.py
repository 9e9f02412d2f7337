# SPDX-License-Identifier: Apache-2.0
"""Who a peer is: an Ed25519 key, shown in a certificate that nobody signs.

    identity = Identity(seed)                   # 32 bytes that nobody else knows
    identity.public_key                         # 32 bytes: the name of this host
    identity.certificate, identity.private_key  # for aioquic
    certificate, key = identity.pem()           # for everybody else
    peer_key(certificate)                       # whose certificate it is

Client and server both show one (mutual TLS).  TLS itself proves that a peer has the private key of its
certificate; that is all that is asked of it, so no authority signs anything.  The certificate is the one that
TPU clients and servers of Solana show: 249 bytes, the same for all but for the key, with a signature that is
deliberately none.  Some servers compare those bytes.

It needs the package ``cryptography``, which comes with the extra ``quic``.
"""

from __future__ import annotations

from typing import Final

from xdp.errors import UnsupportedError, UsageError

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )
except ImportError:
    raise UnsupportedError("cryptography is not installed", hint="pip install 'sluice[quic]'") from None

#: Bytes of a seed and of a public key (RFC 8032, 5.1.5).
KEY_SIZE: Final = 32
#: Bytes of a certificate that are looked at: chains of usual authorities have some thousand.
CERTIFICATE_MAXIMUM: Final = 1 << 16

# DER (X.690, 8): tags of what a certificate is made of (RFC 5280, 4.1).
_BOOLEAN, _INTEGER, _BITS, _OCTETS, _OID, _TEXT = 0x01, 0x02, 0x03, 0x04, 0x06, 0x0C
_UTC_TIME, _TIME, _SEQUENCE, _SET, _VERSION, _EXTENSIONS = 0x17, 0x18, 0x30, 0x31, 0xA0, 0xA3


def _der(tag: int, *parts: bytes) -> bytes:
    """One element, of at most 255 bytes of content."""
    content = b"".join(parts)
    size = len(content)
    return bytes([tag, size] if size < 0x80 else [tag, 0x81, size]) + content


def _oid(*arcs: int) -> bytes:
    """An object identifier whose arcs all fit a byte each (X.690, 8.19)."""
    return _der(_OID, bytes([arcs[0] * 40 + arcs[1], *arcs[2:]]))


def _certificate(public_key: bytes) -> bytes:
    ed25519 = _der(_SEQUENCE, _oid(1, 3, 101, 112))  # RFC 8410, 3
    name = _der(_SEQUENCE, _oid(2, 5, 4, 3), _der(_TEXT, b"Solana node"))
    extensions = [
        _der(_SEQUENCE, _oid(2, 5, 29, number), _der(_BOOLEAN, b"\xff"), _der(_OCTETS, value))
        for number, value in (
            (17, _der(_SEQUENCE, _der(0x82, b"localhost"))),  # subjectAltName, a DNS name
            (19, _der(_SEQUENCE)),  # basicConstraints: no authority
        )
    ]
    signed = _der(
        _SEQUENCE,
        _der(_VERSION, _der(_INTEGER, b"\x02")),
        _der(_INTEGER, b"\x01" * 8),
        ed25519,
        _der(_SEQUENCE, _der(_SET, name)),
        _der(_SEQUENCE, _der(_UTC_TIME, b"700101000000Z"), _der(_TIME, b"40960101000000Z")),
        _der(_SEQUENCE),
        _der(_SEQUENCE, ed25519, _der(_BITS, b"\0", public_key)),
        _der(_EXTENSIONS, _der(_SEQUENCE, *extensions)),
    )
    return _der(_SEQUENCE, signed, ed25519, _der(_BITS, b"\0", b"\xff" * 64))


class Identity:
    """A key pair and its certificate; UsageError unless the seed is 32 bytes."""

    __slots__ = ("certificate", "certificate_der", "private_key", "public_key")

    def __init__(self, seed: bytes) -> None:
        if not (type(seed) is bytes and len(seed) == KEY_SIZE):
            raise UsageError(f"a seed is {KEY_SIZE} bytes", hint="it is the first half of a Solana key pair")
        self.private_key = Ed25519PrivateKey.from_private_bytes(seed)
        #: 32 bytes.
        self.public_key = self.private_key.public_key().public_bytes_raw()
        self.certificate_der = _certificate(self.public_key)
        self.certificate = x509.load_der_x509_certificate(self.certificate_der)

    def pem(self) -> tuple[bytes, bytes]:
        """Certificate and private key (PKCS #8, not encrypted) as text."""
        return (
            self.certificate.public_bytes(Encoding.PEM),
            self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )

    def __repr__(self) -> str:
        return f"<Identity {self.public_key.hex()}>"


def peer_key(certificate: bytes | x509.Certificate) -> bytes:
    """The 32 bytes of the Ed25519 key in a certificate (DER, or parsed); UsageError when there is none.

    The bytes come from the network, and nothing else in them is looked at.
    """
    try:
        if not isinstance(certificate, x509.Certificate):
            if len(certificate) > CERTIFICATE_MAXIMUM:
                raise UsageError(f"a certificate has at most {CERTIFICATE_MAXIMUM} bytes")
            certificate = x509.load_der_x509_certificate(certificate)
        key = certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"no certificate with a key that can be read: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"the certificate's key is {type(key).__name__}, not Ed25519")
    return key.public_bytes_raw()
