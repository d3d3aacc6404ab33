# SPDX-License-Identifier: Apache-2.0
"""What there is to say about a device's certificate: until when it lives, who renews it, and what went wrong last."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgeopt_agent.config import AgentConfig
from edgeopt_agent.credentials import common_name, serial_of, spread_renewal
from edgeopt_agent.renewal import Progress, read_progress
from edgeopt_agent.renewing import is_ours
from edgeopt_wire.document import format_moment


@dataclass(frozen=True)
class CertificateStatus:
    """One device's certificate. `error` says why it cannot be read; then nothing else is known."""

    path: Path
    is_renewed: bool
    progress: Progress
    error: str = ""
    name: str = ""
    serial: str = ""
    expires_at: datetime | None = None
    renews_at: datetime | None = None

    def to_json(self, now: datetime) -> dict[str, Any]:
        """For `status --json`."""
        days = (self.expires_at - now).total_seconds() / 86400 if self.expires_at else None
        return {
            "file": str(self.path),
            "error": self.error,
            "name": self.name,
            "serial": self.serial,
            "expires_at": format_moment(self.expires_at) if self.expires_at else None,
            "days_left": None if days is None else round(days, 2),
            "renews_at": format_moment(self.renews_at) if self.renews_at and self.is_renewed else None,
            "renewed_at": self.progress.renewed_at or None,
            "renewal_error": self.progress.error,
        }


def certificate_status(config: AgentConfig) -> CertificateStatus | None:
    """Look at the certificate of a configuration; None where it names none."""
    from cryptography import x509

    named = str(config.transport.get("certificate", ""))
    if config.transport.get("kind") != "mqtt" or not named:
        return None
    path, renewed = Path(named), is_ours(config) and config.enrolment.renew
    progress = read_progress(path.parent) if renewed else Progress()
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        return CertificateStatus(path, renewed, progress, str(error))
    return CertificateStatus(
        path,
        renewed,
        progress,
        name=common_name(found),
        serial=serial_of(found),
        expires_at=found.not_valid_after_utc,
        renews_at=spread_renewal(found),
    )
