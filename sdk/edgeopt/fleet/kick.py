# SPDX-License-Identifier: Apache-2.0
"""End a device's session at any MQTT 5 broker: connect under its client id, which takes its session over, and leave.

The device finds itself thrown out, connects again, and is refused by its revoked certificate. A broker that binds client
ids to certificates refuses the kick: there the session ends by the broker's own means (an API, a restart), and until then
its access list and the control plane give the device nothing.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeopt.fleet.worker import BrokerAddress

_log = logging.getLogger(__name__)

TIMEOUT_S = 5.0


def kick(address: BrokerAddress, client_id: str) -> bool:
    """Take a client's session over and drop it; returns whether the broker let us."""
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    answered = threading.Event()
    reasons: list[Any] = []

    def on_connect(_client: Any, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        reasons.append(reason)
        answered.set()

    client = mqtt.Client(
        CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5, reconnect_on_failure=False
    )
    client.on_connect = on_connect
    if address.ca:
        client.tls_set(address.ca, address.certificate or None, address.key or None)
    try:
        client.connect(address.host, address.port, keepalive=10, clean_start=True)
        client.loop_start()
        answered.wait(TIMEOUT_S)
        client.disconnect()
    except (OSError, ValueError) as error:
        _log.warning("%s was not thrown out of the broker: %s", client_id, error)
        return False
    finally:
        client.loop_stop()
    done = bool(reasons) and not reasons[0].is_failure
    if not done:
        _log.warning("the broker did not let us throw %s out: %s", client_id, reasons or "no answer")
    return done
