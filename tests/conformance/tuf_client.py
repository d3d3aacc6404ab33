#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The agent's trust code behind the command line of tuf-conformance, the suite of The Update Framework.

Only the transport is another one: plain HTTP, as the suite serves. Limits, root, trusted time, version floor and
verification are the agent's (`edgeopt_agent.trust`). `make conformance` runs the suite with it.
"""

import argparse
import hashlib
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from edgeopt_agent.trust import Trust, read_root
from edgeopt_agent.trusted_time import TrustedClock
from edgeopt_wire.errors import EdgeoptError, ForgedError, TransportError

ROOT = "enrolled_root"
"""The root of enrolment; without `.json`, so that the suite does not take it for metadata."""

SUITE_BEGINS = datetime(2020, 1, 1, tzinfo=UTC)
"""The suite replays repositories of 2024 and 2025; the agent itself believes no clock from before it was built."""


class Http:
    """A repository's two base addresses as one transport."""

    def __init__(self, metadata: str, targets: str) -> None:
        self._bases = {"metadata": metadata, "targets": targets}

    def fetch(self, name: str, max_bytes: int) -> bytes | None:
        part, _, rest = name.partition("/")
        url = f"{self._bases[part].rstrip('/')}/{rest}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                content: bytes = answer.read(max_bytes + 1)
        except urllib.error.HTTPError as error:
            if error.code in (403, 404):
                return None
            raise TransportError(f"{url}: {error}") from error
        except OSError as error:
            raise TransportError(f"{url}: {error}") from error
        if len(content) > max_bytes:
            raise ForgedError(f"{url} has more than {max_bytes} bytes")
        return content


def main() -> int:
    """Do what the suite asks; 0 if it was done and 1 if it was refused."""
    parser = argparse.ArgumentParser()
    for name in ("--metadata-url", "--metadata-dir", "--target-dir", "--target-base-url"):
        parser.add_argument(name, default="")
    parser.add_argument("--target-name", action="append", default=[])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    options = parser.parse_args()
    folder = Path(options.metadata_dir)
    if options.command == "init":
        (folder / ROOT).write_bytes(options.trusted_root.read_bytes())
        return 0
    try:
        trust = Trust(
            folder,
            read_root(folder / ROOT),
            Http(options.metadata_url, options.target_base_url).fetch,
            TrustedClock(lambda: datetime.now(UTC), built=SUITE_BEGINS),
        )
        view = trust.refresh()
        for name in options.target_name:
            _download(view, name, Path(options.target_dir))
    except EdgeoptError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _download(view, name: str, folder: Path) -> None:
    """Keep a verified target, once: the agent's store is content-addressed, so that nothing comes twice."""
    path = folder / quote(name, safe="")
    info = view.find(name)
    if info is not None and path.is_file():
        found = path.read_bytes()
        if all(hashlib.new(kind, found).hexdigest() == digest for kind, digest in info.hashes.items()):
            return
    path.write_bytes(view.read(name))


if __name__ == "__main__":
    sys.exit(main())
