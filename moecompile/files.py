"""Files that are there whole or not at all: everything is written aside and renamed; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError, InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is missing, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object")
    return data


def explain_os_error(error: OSError, path: Path) -> CheckpointError:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(f"no room to write {path}: {error.strerror}; free some space or choose another folder")
    return CheckpointError(f"cannot write {path}: {error.strerror or error}")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside and rename it into place.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind.
    """
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A name that no other process has: in containers that share a folder process numbers are equal."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file aside and rename it into place.

    Raises:
        CheckpointError: it cannot be written; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = _beside(path)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except SafetensorError as error:
        text = str(error)
        if "os error 28" in text or "os error 27" in text or "os error 122" in text:
            raise CheckpointError(f"no room to write {path}; free some space or choose another folder") from error
        raise CheckpointError(f"cannot write {path}: {text}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A folder to fill: it appears under ``path`` when the block ends well, and not at all otherwise.

    An existing folder is replaced only with ``overwrite``, and only once the new one is complete.

    Raises:
        InputError: the folder exists, or its parent cannot hold one.
        CheckpointError: there is no room.
    """
    path = path.resolve()  # a link stays, and the folder it leads to is written
    check_new_folder(path, overwrite, needed_bytes)
    parent = path.parent
    made = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=parent))
    except OSError as error:
        raise explain_os_error(error, path) from error
    old = aside.with_suffix(".old")
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        if path.is_dir():
            os.replace(path, old)
        os.replace(aside, path)
    except OSError as error:
        raise explain_os_error(error, path) from error
    finally:
        if old.exists() and not path.exists():  # also when interrupted between the two renames
            os.replace(old, path)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for folder in made if not path.exists() else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_new_folder(path: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Whether a folder can be written there; asked before the work is done.

    Raises:
        InputError: the folder exists, or something on the way to it is no folder.
        CheckpointError: there is no room.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder that does not exist yet")
    if path.exists() and not overwrite and any(path.iterdir()):
        raise InputError(f"{path} exists already; give another folder, or --overwrite to replace it")
    if path.is_dir() and overwrite and any(path.iterdir()) and not (path / "config.json").exists():
        raise InputError(f"{path} holds no model, so it will not be overwritten; give another folder")
    probe = path.absolute()
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir():
        raise InputError(f"{probe} is a file, so {path} cannot be made")
    if not os.access(path.absolute().parent if path.exists() else probe, os.W_OK):
        raise InputError(f"{probe} cannot be written to")
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise CheckpointError(
            f"no room to write {path}: {needed_bytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
