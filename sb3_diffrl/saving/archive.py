"""The zip of a saved model, as Stable-Baselines3 writes it, with one more entry that holds its attributes as JSON."""

import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch as th
from stable_baselines3.common.save_util import open_path

from sb3_diffrl.saving.versions import versions

#: Entry of the zip with the attributes as JSON; Stable-Baselines3's own entry ``data``, which holds pickles, is beside it.
ENTRY = "sb3_diffrl.json"
#: Version of what that entry looks like
FORMAT = 1
WEIGHTS = re.compile(r"[a-z][a-zA-Z0-9_]*(\.[a-z][a-zA-Z0-9_]*)*\.pth")

#: Entries of Stable-Baselines3 for tensors that are in no network
VARIABLES = {"pytorch_variables.pth", "tensors.pth"}


class ModelFileError(ValueError):
    """A file that is damaged, or holds what is not loaded without ``trusted=True``. Nothing that it holds was run."""


class Archive(NamedTuple):
    """What is read of a saved model.

    :param attributes: as JSON, see ``encoding``
    :param versions: that it was saved by
    :param weights: the entries of ``torch.save``, by their file names
    :param system_info: as Stable-Baselines3 writes it
    :param made_by: name of the algorithm's class, empty where the file does not say
    """

    attributes: dict[str, Any]
    versions: dict[str, str]
    weights: dict[str, bytes]
    system_info: str
    made_by: str


class Document(NamedTuple):
    """What a JSON holds, see ``Archive``."""

    attributes: dict[str, Any]
    versions: dict[str, str]
    made_by: str


def document(attributes: Mapping[str, Any], made_by: str = "") -> str:
    """The JSON of encoded attributes, with the version of the format and the versions of the packages."""
    return json.dumps({"format": FORMAT, "versions": versions(), "made_by": made_by, "attributes": attributes})


def read_document(text: str | bytes, what: str) -> Document:
    """What ``document()`` wrote.

    :param what: the file, for messages
    :raises ModelFileError: if it is something else, or from a later version
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is damaged: its JSON cannot be read ({str(error)[:200]}).") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{what} is damaged: its JSON is no dictionary.")
    number, saved = content.get("format"), content.get("versions")
    if not isinstance(saved, dict) or not all(isinstance(value, str) for value in saved.values()):
        raise ModelFileError(f"{what} is damaged: it does not say which versions it was saved by.")
    if type(number) is not int or number < 1:
        raise ModelFileError(f"{what} is damaged: it does not say which format it has.")
    if number > FORMAT:
        raise ModelFileError(
            f"{what} was saved by sb3_diffrl {saved.get('sb3_diffrl', '?')[:50]}, in a later format than is known here. Update "
            "sb3_diffrl to load it."
        )
    if not isinstance(content.get("attributes"), dict):
        raise ModelFileError(f"{what} is damaged: it holds no attributes.")
    return Document(content["attributes"], saved, str(content.get("made_by", "")))


def read_zip(file: BinaryIO, what: str) -> zipfile.ZipFile:
    """Open a zip that cannot be a trap: its entries are not compressed, do not overlap, and are there once.

    :param what: the file, for messages
    :raises ModelFileError: if it is none
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ModelFileError(f"{what} is damaged, or no saved model: it is no zip file ({error}).") from error
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise ModelFileError(f"{what} is damaged: entries of the zip have the same name.")
    # What is not compressed is not larger than the file.
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ModelFileError(
            f"{what} holds compressed or encrypted entries, which a saved model does not: unpack it and pack it again by `zip -0`."
        )
    if sum(entry.file_size for entry in entries) > size:
        raise ModelFileError(f"{what} is damaged: its entries are larger than the file.")
    return archive


def read_archive(file: BinaryIO, what: str) -> Archive:
    """Read a saved model without un-pickling anything. Entries that are not known are left alone.

    :param file: open for reading
    :param what: the file, for messages
    :raises ModelFileError: if it is damaged, or was not saved by this package
    """
    archive = read_zip(file, what)
    header, names = read_document(_entry(archive, what), what), archive.namelist()
    try:
        weights = {name: archive.read(name) for name in names if WEIGHTS.fullmatch(name)}
        system_info = archive.read("system_info.txt").decode() if "system_info.txt" in names else ""
    except Exception as error:
        raise _damaged(what, error) from error
    for name, content in weights.items():
        check_weights(content, f"{name} in {what}")
    for name in VARIABLES & weights.keys():
        _check_empty(weights.pop(name), f"{name} in {what}")
    return Archive(header.attributes, header.versions, weights, system_info, header.made_by)


def saved_class(path: str | Path) -> str:
    """Name of the algorithm's class that a file was saved by, empty where the file does not say.

    :param path: file of a saved model, with or without its suffix
    :raises ModelFileError: if it is damaged, or was not saved by this package
    :raises FileNotFoundError: if there is none
    """
    what = f"The file {path}"
    with open_path(path, "r", suffix="zip") as file:
        archive = read_zip(file, what)
        return read_document(_entry(archive, what), what).made_by


def _entry(archive: zipfile.ZipFile, what: str) -> bytes:
    if ENTRY not in archive.namelist():
        raise ModelFileError(
            f"{what} has no entry {ENTRY}: it was not saved by a release of sb3_diffrl. If you know where it comes from, load it "
            "with `trusted=True`, which runs what it holds."
        )
    try:
        return archive.read(ENTRY)
    except Exception as error:
        raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> ModelFileError:
    return ModelFileError(f"{what} is damaged: {str(error)[:200] or type(error).__name__}.")


def _check_empty(content: bytes, what: str) -> None:
    # Such tensors would be put wherever their names say, whatever their shape.
    try:
        variables = th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelFileError(f"{what} is damaged: {str(error)[:200] or type(error).__name__}.") from error
    if variables:
        raise ModelFileError(
            f"{what} holds variables of a class of your own. If you know where the file comes from, load it with `trusted=True`."
        )


def check_weights(content: bytes, what: str) -> None:
    """Check that a file of ``torch.save`` cannot unfold in memory.

    :raises ModelFileError: if it could, or is none
    """
    read_zip(io.BytesIO(content), what).close()


def weights_alone(archive: Archive) -> io.BytesIO:
    """The zip again, with the tensors and the names of the attributes alone: there is nothing to un-pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as clean:
        clean.writestr("data", json.dumps(dict.fromkeys(archive.attributes)))
        clean.writestr("system_info.txt", archive.system_info)
        for name, content in archive.weights.items():
            clean.writestr(name, content)
    buffer.seek(0)
    return buffer
