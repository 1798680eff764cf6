"""What a run was made with: versions, source revision, device."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import kvzip.version


def describe() -> dict[str, str | None]:
    """Versions, git revision and time, for the file beside the results."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "kvzip": kvzip.version.__version__,
        "git": git_revision(Path(kvzip.version.__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def git_revision(source: Path) -> str | None:
    """The commit of the checkout that `source` is tracked in, with "-dirty" where files were changed; else None."""
    # A package inside a virtual environment may lie in somebody else's checkout: only a tracked file counts.
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=source.parent, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
