# SPDX-License-Identifier: Apache-2.0
"""Writes the records of an agent of a commit, with that agent's own code: `python write.py COMMIT` in the repository."""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLD = """
import dataclasses, sys
from pathlib import Path
from edgeopt_agent.machine import Installed, State
from edgeopt_agent.store import DeviceRecord, Store
from edgeopt_wire.messages import DesiredModel, Phase

def made(kind, **values):
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in known})

store = Store(Path(sys.argv[1]))
wish = DesiredModel("tiny", "2", "models/tiny/2/host.json", rollout="first")
first = made(Installed, slot="A", version="1", package_sha256="1" * 64, variant="a", measured_under="Linux")
second = dataclasses.replace(first, slot="B", version="2", package_sha256="2" * 64)
state = State("tiny", Phase.TRIAL, active=first, candidate=second, desired=wish, attempts=1)
store.save_state(state)
done = dataclasses.replace(state, phase=Phase.COMMITTED, active=second, previous=first, candidate=None, attempts=0)
store.save_state(dataclasses.replace(done, refused={"3" * 64: "wrong outputs"}))
store.save_device(
    made(DeviceRecord, revision=7, desired_sha256="4" * 64, newest_moment="2026-11-25T10:00:00Z", director=("k",))
)
"""


def main() -> None:
    """Write them into a folder named after the commit."""
    commit = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "agent"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive)
        state = Path(folder) / "state"
        subprocess.run([sys.executable, "-c", OLD, str(state)], check=True, cwd=Path(folder) / "agent")
        target = HERE / commit
        target.mkdir(exist_ok=True)
        for name in ("models/tiny/state-0.json", "models/tiny/state-1.json", "device.json"):
            (target / Path(name).name).write_bytes((state / name).read_bytes())


if __name__ == "__main__":
    main()
