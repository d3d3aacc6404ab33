# SPDX-License-Identifier: Apache-2.0
"""Whether a broker takes a certificate: one connection beside the running session, under a client id of its own.

A TLS 1.3 server refuses a client's certificate after the handshake, so that only an answer to CONNECT tells. Any CONNACK
but "banned" will do: the certificate was taken, and what a broker thinks of the client id concerns this trial only.

Source: MQTT 5.0, sections 3.1 and 3.2; RFC 8446, section 4.6.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from edgeopt_agent.endpoint import NO_CHECK_TIME
from edgeopt_wire.errors import TransportError, TrustError

TIMEOUT_S = 15.0
_CONNACK, _BANNED = 0x20, 0x8A


def try_pair(host: str, port: int, client_id: str, pair: Path, authorities: str) -> None:
    """Connect with the pair in a file and leave again.

    Raises:
        TransportError: The broker cannot be reached, or says nothing: nothing is known.
        TrustError: The broker does not take the certificate, or is another broker.
    """
    context = ssl.create_default_context(cadata=authorities)
    context.verify_flags |= ssl.VerifyFlags(
        NO_CHECK_TIME
    )  # the pair is on trial; the session checks the broker's dates
    try:
        context.load_cert_chain(pair)
        plain = socket.create_connection((host, port), TIMEOUT_S)
    except ssl.SSLError as error:
        raise TrustError(f"{pair} cannot be used: {error}") from error
    except OSError as error:
        raise TransportError(f"the broker {host}:{port} is away: {error}") from error
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                secure.sendall(_connect(client_id))
                answer = secure.recv(64)
                if len(answer) >= 4 and answer[0] == _CONNACK:
                    secure.sendall(b"\xe0\x00")  # DISCONNECT, normal
        except ssl.SSLCertVerificationError as error:
            raise TrustError(f"{host}:{port} is not our broker: {error.verify_message}") from error
        except (ssl.SSLError, ConnectionError) as error:
            raise TrustError(
                f"the broker {host}:{port} does not take the new certificate: {error}"
            ) from error
        except OSError as error:
            raise TransportError(f"the broker {host}:{port} says nothing: {error}") from error
    if len(answer) < 4 or answer[0] != _CONNACK or answer[3] == _BANNED:
        raise TrustError(
            f"the broker {host}:{port} does not take the new certificate (answer {answer[:8].hex()})"
        )


def _connect(client_id: str) -> bytes:
    """CONNECT of MQTT 5: clean start, keep alive 30 s, no properties, no will."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x05\x02\x00\x1e\x00" + len(name).to_bytes(2, "big") + name
    length, head = len(body), bytearray(b"\x10")
    while True:
        head.append(length % 128 | (0x80 if length > 127 else 0))
        length //= 128
        if not length:
            return bytes(head) + body
