"""Writing a file so that it is there as a whole or not at all."""

import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | Path, suffix: str) -> Iterator[BinaryIO]:
    """A new file to write, which takes its place when the block is left without an error.

    It is written aside in the same folder, under a hidden name that ends in ``.saving``, flushed to the disk and renamed. Whatever
    interrupts this, the former file is as it was. A process that is killed in between may leave the hidden file behind. The new
    file has the mode of the one it replaces. What is no file, such as a pipe or a device, is written to as it is.

    :param path: where it goes, as Stable-Baselines3 reads paths: without a suffix it gets one, a missing folder is made, and beside
        a folder of that name it is called ``<name>_2``, the latter two with a warning
    :param suffix: without the dot; none if empty
    :return: the open file
    :raises OSError: if the file cannot be written, with the reason, and the path
    """
    target = target_of(path, suffix)
    folder = str(target).removesuffix("_2")
    if folder in (str(Path(path)), f"{Path(path)}.{suffix}") and Path(folder).is_dir():
        warnings.warn(f"Path '{folder}' is a folder. Will save instead to {target}", stacklevel=4)
    # What a link leads to is replaced, not the link.
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        with open(target, "wb") as file:
            yield file
        return
    # Names are limited to 255 bytes.
    name = os.fsencode(target.name)[:200].decode(errors="ignore")
    aside = target.with_name(f".{name}.{secrets.token_hex(4)}.saving")
    try:
        if not target.parent.exists():
            warnings.warn(f"Path '{target.parent}' does not exist. Will create it.", stacklevel=4)
            target.parent.mkdir(exist_ok=True, parents=True)
        with open(aside, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, aside)
        os.replace(aside, target)
        _flush_folder(target.parent)
    except OSError as error:
        # OSError picks its subclass by the number.
        raise OSError(
            error.errno or errno.EIO,
            f"{error.strerror or error}. Nothing was saved, and a former file is as it was; make room or choose another place",
            str(target),
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def target_of(path: str | Path, suffix: str) -> Path:
    """Where ``atomic_file()`` writes."""
    target = Path(path)
    target = target if target.suffix or not suffix else Path(f"{target}.{suffix}")
    return Path(f"{target}_2") if target.is_dir() else target


def _flush_folder(folder: Path) -> None:
    # The rename itself reaches the disk with the folder. Not every system can open one.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
