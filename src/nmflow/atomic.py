"""How a file is written: whole or not at all, so that a full disk or a killed process leaves the old one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; what was written there takes the name `path` on leaving.

    File and folder are synced to the disk. On an error the temporary file is removed and `path` is what it was.
    Raises as `refuse_bad_place` does.
    """
    path = Path(path)
    refuse_bad_place(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode  # what the umask leaves; safetensors makes files that only their owner reads
    try:
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def refuse_bad_place(path: Path) -> None:
    """Raise where no file can be written: `FileNotFoundError` where the folder does not exist, `IsADirectoryError`
    where `path` is one, `PermissionError` where it takes no files from us."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} cannot be written to")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
