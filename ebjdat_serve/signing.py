"""Bundle signatures: ed25519 over the bytes of bundle.json, which holds the sha256 of every other file.

Keys are PEM files, as written by OpenSSL:

    openssl genpkey -algorithm ed25519 -out key.pem && openssl pkey -in key.pem -pubout -out key.pub.pem
    ebjdat-serve sign BUNDLE --key key.pem
    ebjdat-serve serve STORE --trust key.pub.pem

``bundle.json.sig`` is the bare 64-byte signature, so that OpenSSL can verify it too.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from ebjdat_serve.atomic import replacing
from ebjdat_serve.bundle import MANIFEST, SIGNATURE, read_bytes
from ebjdat_serve.errors import BundleError, EbjdatError, cause

SIGNATURE_BYTES = 64


def write_signature(folder: Path, signature: bytes) -> Path:
    """Write ``signature`` as the bundle's ``bundle.json.sig``; raise EbjdatError when it cannot be written."""
    file = folder / SIGNATURE
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(signature)
    except OSError as error:
        raise EbjdatError(f"{file} cannot be written: {cause(error)}") from error
    return file


def private_key(file: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file; raise EbjdatError when it does not contain one."""
    try:
        private = load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EbjdatError(f"{file} cannot be read as a private key without password: {error}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise EbjdatError(f"{file} is not an ed25519 key: openssl genpkey -algorithm ed25519 -out NEW.pem makes one")
    return private


def public_key(file: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file; raise EbjdatError when it does not contain one."""
    try:
        content = file.read_bytes()
        key = load_pem_public_key(content)
    except OSError as error:
        raise EbjdatError(f"{file} cannot be read as a public key: {cause(error)}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        what = "holds a private key, which does not belong on a server" if b"PRIVATE KEY" in content else "cannot be read as a public key"
        # not into this file: it may be the only copy of the private key
        raise EbjdatError(f"{file} {what}: openssl pkey -in PRIVATE.pem -pubout -out NEW.pub.pem makes a public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise EbjdatError(f"{file} is not an ed25519 public key")
    return key


def trusted_keys(files: Sequence[Path]) -> tuple[bytes, ...]:
    """Return the public keys in PEM files, 32 bytes each."""
    return tuple(public_key(file).public_bytes_raw() for file in files)


def check_signature(folder: Path, trust: Sequence[bytes]) -> str:
    """Return the sha256 of the manifest of the bundle at ``folder``; raise BundleError unless one of the keys ``trust`` signed it."""
    file = folder / SIGNATURE
    if not file.is_file():
        raise BundleError(f"{folder} is not signed ({SIGNATURE} is missing) but serve --trust is set: ebjdat-serve sign BUNDLE --key KEY")
    content = read_bytes(folder / MANIFEST)
    check_signed(content, read_bytes(file), trust, file)
    return hashlib.sha256(content).hexdigest()


def check_signed(content: bytes, signature: bytes, trust: Sequence[bytes], file: Path) -> None:
    """Raise BundleError naming ``file`` unless ``signature`` is of ``content``, a manifest, by one of the public keys ``trust``."""
    if len(signature) != SIGNATURE_BYTES:
        raise BundleError(f"{file} is not an ed25519 signature: it must have {SIGNATURE_BYTES} bytes")
    for key in trust:
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
        except InvalidSignature:
            continue
        return
    raise BundleError(f"{file} is not a signature of {MANIFEST} by a key that serve --trust names")
