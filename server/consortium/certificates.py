"""The consortium's certificate authority and the server's certificate."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_secret, write_text

AUTHORITY_DAYS = 3650
SERVER_DAYS = 398  # what current TLS libraries accept at most
BACK_DATED = timedelta(days=1)  # a site's clock may be behind
LOCAL = ("localhost", "127.0.0.1", "::1")
"""The coordinator's own commands and the door dial the link by these."""


@dataclass(frozen=True)
class Certificate:
    """What a certificate says of itself."""

    subject: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime

    @property
    def days_left(self) -> float:
        """Until it expires; negative after that."""
        return (self.not_after - datetime.now(UTC)) / timedelta(days=1)


def make_authority(name: str, key_file: Path, certificate_file: Path) -> None:
    """A new CA: an EC key on P-256 and its own certificate over it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name, f"{name} CA")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begin(subject, subject, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_secret(key_file, _pem(key))
    write_text(certificate_file, certificate.public_bytes(serialization.Encoding.PEM).decode())


def issue(host: str, authority_key: Path, authority: Path, key_file: Path, certificate_file: Path) -> None:
    """A new key and certificate for the server that sites reach as `host`.

    Raises:
        MmfmError: the CA's key or certificate cannot be read.
    """
    issuer, issuer_key = _load(authority), _load_key(authority_key)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(each) for each in dict.fromkeys([host, *LOCAL])]
    organisation = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value
    certificate = (
        _begin(_subject(str(organisation), host[:64]), issuer.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    write_secret(key_file, _pem(key))
    write_text(certificate_file, certificate.public_bytes(serialization.Encoding.PEM).decode())


def describe(path: Path) -> Certificate:
    """Read a certificate.

    Raises:
        MmfmError: there is none in the file.
    """
    certificate = _load(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(name.value) for name in names)
    except x509.ExtensionNotFound:
        hosts = ()
    subject = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return Certificate(str(subject), hosts, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def check_server(certificate_file: Path, authority: Path, host: str) -> Certificate:
    """Check that sites will accept the server's certificate today.

    Raises:
        MmfmError: it has expired, does not name `host`, or another CA signed it.
    """
    remedy = "renew it with 'mmfm coordinator certificate --renew'"
    found = describe(certificate_file)
    if found.days_left <= 0:
        raise MmfmError(f"{certificate_file}: expired on {found.not_after:%Y-%m-%d}, so no site can connect; {remedy}")
    if host not in found.hosts:
        raise MmfmError(f"{certificate_file}: does not name '{host}', where sites dial; {remedy}")
    try:
        _load(certificate_file).verify_directly_issued_by(_load(authority))
    except Exception as error:  # several types, none of them a common one
        raise MmfmError(f"{certificate_file}: was not signed by {authority}; {remedy}") from error
    return found


def _begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACK_DATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _subject(organisation: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise MmfmError(f"{path}: cannot be read ({error.strerror}); restore it from the backup") from error
    except ValueError as error:
        raise MmfmError(f"{path}: is not a certificate; restore it from the backup") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise MmfmError(f"{path}: cannot be read ({error.strerror}); bring the CA's key back for this step") from error
    except ValueError as error:
        raise MmfmError(f"{path}: is not a private key; restore it from the backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MmfmError(f"{path}: is not a key on an elliptic curve; restore it from the backup")
    return key
