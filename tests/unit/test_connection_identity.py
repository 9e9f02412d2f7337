# SPDX-License-Identifier: Apache-2.0
"""Identities: the bytes that TPU clients and servers show, and whose certificate something is."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from userspace.connection.identity import CERTIFICATE_MAXIMUM, Identity, peer_key
from xdp.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SEED = bytes(range(32))
#: What Agave's TPU clients and servers show before and after the key, as seen on the wire.
PREFIX = bytes.fromhex(
    "3081f63081a9a00302010202080101010101010101300506032b6570301631143012060355"
    "04030c0b536f6c616e61206e6f64653020170d3730303130313030303030305a180f343039"
    "36303130313030303030305a3000302a300506032b6570032100"
)
SUFFIX = (
    bytes.fromhex(
        "a329302730170603551d110101ff040d300b82096c6f63616c686f7374300c0603551d1301"
        "01ff04023000300506032b6570034100"
    )
    + b"\xff" * 64
)


def test_the_certificate_is_that_of_a_tpu_client() -> None:
    identity = Identity(SEED)
    assert identity.certificate_der == PREFIX + identity.public_key + SUFFIX
    assert len(identity.certificate_der) == 249


def test_the_key_is_that_of_the_seed() -> None:
    """RFC 8032, 7.1, test 1."""
    identity = Identity(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert identity.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    signature = identity.private_key.sign(b"")
    identity.private_key.public_key().verify(signature, b"")
    with pytest.raises(InvalidSignature):
        Identity(SEED).private_key.public_key().verify(signature, b"")


def test_the_certificate_can_be_read() -> None:
    certificate = Identity(SEED).certificate
    assert certificate.issuer.rfc4514_string() == "CN=Solana node"
    assert certificate.not_valid_after_utc.year == 4096
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_as_text() -> None:
    """As other libraries load them, and `openssl x509` too."""
    identity = Identity(SEED)
    certificate, key = identity.pem()
    assert x509.load_pem_x509_certificate(certificate) == identity.certificate
    loaded = load_pem_private_key(key, None)
    assert isinstance(loaded, ed25519.Ed25519PrivateKey)
    assert loaded.private_bytes_raw() == SEED
    pkcs8 = loaded.private_bytes(
        Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert pkcs8 == bytes.fromhex("302e020100300506032b657004220420") + SEED


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=30)
def test_whose_certificate_it_is(seed: bytes) -> None:
    identity = Identity(seed)
    assert peer_key(identity.certificate_der) == peer_key(identity.certificate) == identity.public_key


def test_nothing_tells_the_seed() -> None:
    identity = Identity(SEED)
    assert repr(identity) == f"<Identity {identity.public_key.hex()}>"
    with pytest.raises(AttributeError):
        identity.more = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33), bytes(64), "x" * 32, None, bytearray(32)])
def test_seeds_that_are_none(seed: bytes) -> None:
    with pytest.raises(UsageError, match="seed") as caught:
        Identity(seed)
    assert caught.value.hint


def web_certificate() -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + dt.timedelta(1))
    return builder.sign(key, hashes.SHA256())


def test_keys_of_other_kinds_are_named() -> None:
    with pytest.raises(UsageError, match=r"ECPublicKey|EllipticCurve"):
        peer_key(web_certificate())


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_what_is_no_certificate(data: bytes) -> None:
    with pytest.raises(UsageError):
        peer_key(data)


@given(st.data())
@settings(max_examples=100)
def test_damaged_certificates(data: st.DataObject) -> None:
    """A key of 32 bytes comes out or an error of ours, and never anybody else's key by an edit elsewhere."""
    whole = bytearray(Identity(SEED).certificate_der)
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    del whole[data.draw(st.integers(1, len(whole))) :]
    try:
        key = peer_key(bytes(whole))
    except UsageError:
        return
    assert (key == Identity(SEED).public_key) == (not len(PREFIX) <= at < len(PREFIX) + 32)


def test_a_certificate_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(UsageError, match="at most"):
        peer_key(bytes(CERTIFICATE_MAXIMUM + 1))


@pytest.mark.parametrize(
    ("hidden", "module"),
    [
        ("cryptography", "userspace.connection.identity"),
        ("aioquic", "userspace.connection.quic_session"),
        ("aioquic", "userspace.connection.quic"),
    ],
)
def test_without_the_library_it_is_said_what_to_install(hidden: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{hidden!r}] = None\n"
        "import userspace.connection, userspace.connection.udp\n"
        "from xdp.errors import UnsupportedError\n"
        f"try:\n    import {module}\n"
        "except UnsupportedError as error:\n    print(error, '|', error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{hidden} is not installed | pip install 'sluice[quic]'\n"
