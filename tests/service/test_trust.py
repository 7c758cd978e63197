"""A company's own CA, named in one variable: every client trusts it, or says at once why not."""

import os
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corun_ray.service.cluster.ports import PortError, ask_for_jobs_api
from corun_ray.service.storage import StorageError, locate
from corun_ray.service.trust import DRIVER, VARIABLES, TrustError, find_certificate_fault, share_ca_file
from tests.faulty_s3 import FaultyS3


class OwnCa(NamedTuple):
    """The file of a CA that nobody knows, and the TLS of a server at 127.0.0.1 for which it vouches."""

    file: str
    server: ssl.SSLContext


@pytest.fixture(scope="module")
def own_ca(tmp_path_factory) -> OwnCa:
    folder, now = tmp_path_factory.mktemp("ca"), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Own CA")])
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def sign(subject: x509.Name, public_key, is_authority: bool) -> bytes:
        builder = x509.CertificateBuilder().issuer_name(name).subject_name(subject).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        signed = builder.add_extension(address, critical=False).sign(authority, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    (folder / "ca.pem").write_bytes(sign(name, authority.public_key(), True))
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    (folder / "server.pem").write_bytes(sign(subject, key.public_key(), False))
    plain = serialization.NoEncryption()
    encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.key").write_bytes(encoded)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    return OwnCa(str(folder / "ca.pem"), server)


@pytest.fixture
def bare(monkeypatch):
    """An environment that names no CA."""
    for variable in (*VARIABLES, DRIVER, "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    locate.cache_clear()
    yield monkeypatch
    locate.cache_clear()


CLIENTS = """
import os, urllib.request
import boto3, requests
from corun_ray.service.storage import locate
from corun_ray.service.trust import share_ca_file
share_ca_file()
print(locate("s3://trust/a.txt").read())
print(boto3.client("s3").get_object(Bucket="trust", Key="a.txt")["Body"].read())
url = os.environ["AWS_ENDPOINT_URL"]
print(requests.head(url).status_code, urllib.request.urlopen(url).status)
"""


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_every_client_trusts_the_ca_that_one_variable_names(s3_server, own_ca, bare, variable):
    store = boto3.client("s3")
    store.create_bucket(Bucket="trust")
    store.put_object(Bucket="trust", Key="a.txt", Body=b"text")
    with FaultyS3(s3_server, tls=own_ca.server) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, variable: own_ca.file}
        done = subprocess.run([sys.executable, "-c", CLIENTS], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["b'text'", "b'text'", "200", "200"], done.stderr[-2000:]


def test_a_certificate_that_is_refused_is_told_at_once(s3_server, own_ca, bare):
    """pyarrow takes it for a failing network, and asks for 100 s."""
    with FaultyS3(s3_server, tls=own_ca.server) as proxy:
        bare.setenv("AWS_ENDPOINT_URL", proxy.url)
        began_s = time.monotonic()
        with pytest.raises(StorageError, match=f"certificate of {proxy.url} is refused .*AWS_CA_BUNDLE") as error:
            locate("s3://trust/a.txt").read()
        assert time.monotonic() - began_s < 30 and "\n" not in str(error.value)
        assert find_certificate_fault(proxy.url, own_ca.file) is None

    # The other way round: https:// before a server that speaks none.
    assert "begins with http://" in find_certificate_fault(s3_server.replace("http:", "https:"), None)


def test_a_jobs_api_whose_certificate_is_refused_or_that_is_not_there_is_told(s3_server, own_ca, bare):
    with FaultyS3(s3_server, tls=own_ca.server) as proxy:
        with pytest.raises(PortError, match=f"^the certificate of {proxy.url} is refused .*REQUESTS_CA_BUNDLE"):
            ask_for_jobs_api(proxy.url)
        bare.setenv("REQUESTS_CA_BUNDLE", own_ca.file)
        ask_for_jobs_api(proxy.url)
    with pytest.raises(PortError, match="no Jobs API answers there .nobody listens there"):
        ask_for_jobs_api(proxy.url)


def test_a_client_with_a_variable_of_its_own_keeps_it(own_ca):
    environment = {"REQUESTS_CA_BUNDLE": own_ca.file}
    share_ca_file(environment)
    assert environment["REQUESTS_CA_BUNDLE"] == own_ca.file and "AWS_CA_BUNDLE" not in environment

    # The others reach public servers as before.
    joined = Path(environment["SSL_CERT_FILE"]).read_text()
    assert joined.count("BEGIN CERTIFICATE") > 50 and Path(own_ca.file).read_text() in joined


def test_a_file_that_cannot_be_used_is_refused_by_its_variable(tmp_path):
    with pytest.raises(TrustError, match="^AWS_CA_BUNDLE: cannot read /none.pem: No such file or directory$"):
        share_ca_file({"AWS_CA_BUNDLE": "/none.pem"})
    (tmp_path / "page.pem").write_text("<html>")
    with pytest.raises(TrustError, match="^SSL_CERT_FILE: .*page.pem holds no certificate in PEM format$"):
        share_ca_file({"SSL_CERT_FILE": str(tmp_path / "page.pem")})

    # `requests` takes a folder; nothing is made of it for the others.
    environment = {"REQUESTS_CA_BUNDLE": str(tmp_path)}
    share_ca_file(environment)
    assert "SSL_CERT_FILE" not in environment
