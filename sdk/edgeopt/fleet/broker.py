# SPDX-License-Identifier: Apache-2.0
"""The embedded MQTT broker: rumqttd from the `iotcore` wheel, on loopback, for one machine and no root.

It checks no client certificates and forgets retained messages when it restarts; the control plane republishes them.
For anything else than this machine, run Mosquitto or another MQTT 5 broker and give its address to `fleet up`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeopt_wire.errors import EdgeoptError, TransportError, UnsupportedError

MAX_PAYLOAD_BYTES = 1024 * 1024
"""Above a chunk (64 KiB) and a page of metadata (88 kB as base64); the broker's default is 20 kB."""

_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {payload}
max_inflight_count = 100
dynamic_filters = true
"""


class EmbeddedBroker:
    """A broker in a child process that ends with this one."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self._config = folder / "broker.toml"
        self._broker: Any = None

    def start(self) -> None:
        """Start and wait until it listens.

        Raises:
            UnsupportedError: `iotcore` is not installed.
            TransportError: The port is taken, or the broker did not start.
        """
        try:
            from iotcore.broker import Broker, port_in_use
        except ImportError as error:
            raise UnsupportedError(
                "the embedded broker needs iotcore: pip install 'edgeopt[fleet]'"
            ) from error
        if port_in_use(self.port):
            raise TransportError(f"port {self.port} is taken; choose another with --mqtt-port")
        self._config.write_text(_CONFIG.format(port=self.port, payload=MAX_PAYLOAD_BYTES), encoding="utf-8")
        self._broker = Broker(config_path=str(self._config))
        try:
            self._broker.start()
        except EdgeoptError:
            raise
        except Exception as error:  # the wheel's own errors; all mean that there is no broker
            raise TransportError(f"the embedded broker did not start on port {self.port}: {error}") from error

    def stop(self) -> None:
        """Stop it; its port is free afterwards."""
        if self._broker is not None:
            self._broker.stop()
            self._broker = None


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
