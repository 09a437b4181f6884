"""One run a directory: the newest to begin there has it, and an older one that still runs ends with its next step.

No lock: one that outlives its process, as a lost node's can on a network's file system, would keep out the very run
that should go on. What is written and found again cannot.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from lora_dist.run_dir import CLAIM_FILE
from lora_dist.stopping import request_stop
from lora_dist.topology import Topology, run_on_first
from lora_dist.writing import write_text


@dataclass(frozen=True, slots=True)
class Claim:
    """What this run wrote into its directory when it began, and whether it is there still."""

    path: Path
    text: str
    topology: Topology

    def look(self) -> None:
        """Have all processes stop after the step that begins now, where another run has the directory.

        Global rank 0 alone looks. A file that cannot be read is nobody's claim: whether the file system still takes
        what is written, the next write will say.
        """
        if self.topology.global_rank != 0:
            return
        try:
            is_ours = self.path.read_bytes() == self.text.encode()
        except OSError:
            return
        if not is_ours:
            request_stop()

    def confirm(self) -> None:
        """ValueError, with who has it, where another run has the directory. Collective."""
        run_on_first(self.topology, self._confirm)

    def _confirm(self) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else self.text
        if text != self.text:
            raise ValueError(
                f"run_dir={self.path.parent} was taken over by a run that began later ({_describe(text)});"
                " this one ends and does not save its last step. Give each run a run_dir of its own"
            )


def claim_run_dir(run_dir: str, topology: Topology) -> Claim:
    """From here on the directory, which exists, is this run's. Collective."""
    path = Path(run_dir) / CLAIM_FILE
    return Claim(path, run_on_first(topology, lambda: _write(path)), topology)


def _write(path: Path) -> str:
    about = {
        "run": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    text = json.dumps(about) + "\n"
    write_text(path, text)
    return text


def _describe(text: str) -> str:
    try:
        about = json.loads(text)
    except json.JSONDecodeError:
        about = None
    if not isinstance(about, dict):
        return f"{CLAIM_FILE} is not this run's"
    return ", ".join(f"{name} {about[name]}" for name in ("host", "process", "slurm_job", "began") if about.get(name))
