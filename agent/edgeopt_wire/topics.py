# SPDX-License-Identifier: Apache-2.0
"""MQTT topics: `eo/1/<tenant>/<device>/<what>`. Version 1 of the protocol; at most 7 slashes (AWS IoT's limit).

A reply topic is computed from the authenticated device's id, never taken from a Response-Topic that a device sends.
"""

import re

from edgeopt_wire.errors import DocumentError

PREFIX = "eo/1"
UP = ("presence", "reported", "event", "pull", "meta")
"""What a device publishes."""
DOWN = ("desired", "ack", "chunk", "refused", "meta-reply", "cmd")
"""What the control plane publishes."""
SHARED, BLOB = "-", "blob"
"""Stands for the device in the topics of lanes, which several devices read; only the control plane publishes there."""

OFFER = "lanes"
"""Stands in the place of a chunk's number: an offer (`edgeopt_wire.lanes`), not a chunk."""

_PART = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_part(text: str, what: str) -> str:
    """Return `text` if it may stand in a topic: letters, digits, `.`, `_`, `-`, at most 64 characters."""
    if not _PART.fullmatch(text):
        raise DocumentError(f"{what} {text!r} must match {_PART.pattern}")
    return text


def client_id(tenant: str, device: str) -> str:
    """The MQTT client id and the certificate's common name of a device."""
    return f"{check_part(tenant, 'tenant')}.{check_part(device, 'device')}"


def topic(tenant: str, device: str, what: str) -> str:
    """The topic for `what`, one of `UP` or `DOWN`."""
    if what not in UP and what not in DOWN:
        raise ValueError(f"{what!r} is no topic of ours")
    return f"{PREFIX}/{check_part(tenant, 'tenant')}/{check_part(device, 'device')}/{what}"


def chunk(tenant: str, device: str, sha256: str, index: int) -> str:
    """The topic on which chunk `index` of a blob is sent to one device."""
    return f"{topic(tenant, device, 'chunk')}/{sha256[:16]}/{index}"


def offer(tenant: str, device: str, sha256: str) -> str:
    """Where an offer of lanes comes: among the device's chunks, which every device listens to."""
    return f"{topic(tenant, device, 'chunk')}/{sha256[:16]}/{OFFER}"


def lane(tenant: str, kib_s: int, sha256: str) -> str:
    """The topic of a blob on the lane of `kib_s` KiB a second; the number of a chunk follows as one more level."""
    return f"{PREFIX}/{check_part(tenant, 'tenant')}/{SHARED}/{BLOB}/{kib_s:d}/{sha256[:16]}"


def every_device(tenant: str, what: str) -> str:
    """The control plane's subscription to `what` of all devices."""
    return f"{PREFIX}/{check_part(tenant, 'tenant')}/+/{what}"


def parse(name: str) -> tuple[str, str, str, tuple[str, ...]]:
    """Split a topic into (tenant, device, what, rest).

    Raises:
        DocumentError: Not a topic of ours.
    """
    parts = name.split("/")
    if len(parts) < 5 or "/".join(parts[:2]) != PREFIX or parts[4] not in (*UP, *DOWN, BLOB):
        raise DocumentError(f"{name!r} is no topic of version 1 of the protocol")
    return check_part(parts[2], "tenant"), check_part(parts[3], "device"), parts[4], tuple(parts[5:])
