# SPDX-License-Identifier: Apache-2.0
"""python-tuf's own client on a repository folder: a judge that shares no code with the agent."""

from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface


class FolderFetcher(FetcherInterface):
    """Gives python-tuf's own client the repository folder, and remembers nothing."""

    def _fetch(self, url: str) -> Any:
        path = Path(url.removeprefix("file://"))
        if not path.is_file():
            from tuf.api.exceptions import DownloadHTTPError

            raise DownloadHTTPError(f"no {path}", 404)
        yield path.read_bytes()


def client_reads(
    repository: Path, target: str, scratch: Path, now: datetime, root: bytes | None = None
) -> bytes:
    """What python-tuf's client, told only the first root, verifies and downloads."""
    (scratch / "metadata").mkdir(parents=True, exist_ok=True)
    (scratch / "targets").mkdir(exist_ok=True)
    updater = Updater(
        str(scratch / "metadata"),
        f"file://{repository}/metadata/",
        str(scratch / "targets"),
        f"file://{repository}/targets/",
        fetcher=FolderFetcher(),
        bootstrap=root or (repository / "metadata" / "1.root.json").read_bytes(),
    )
    updater._trusted_set.reference_time = now
    info = updater.get_targetinfo(target)
    assert info is not None, f"{target} is not listed"
    return Path(updater.download_target(info)).read_bytes()
