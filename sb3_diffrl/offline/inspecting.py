"""What a dataset's files hold, looked at before Minari reads them: all is in the folder, and nothing unfolds in memory."""

import json
import struct
from collections.abc import Generator, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from h5py import h5d, h5g, h5l, h5o, h5s, h5t

from sb3_diffrl.offline.environments import check_env_spec
from sb3_diffrl.saving.allowed import NUMPY_TYPES

# A dataset's arrays in memory, at most: so many bytes, and so many times the bytes on disk
LEAST_BYTES, LARGEST_RATIO = 2**28, 500
# Texts are counted so many at a time: none is longer than the file.
TEXTS = LARGEST_RATIO
NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)
# What Minari takes of an episode in arrow
ARROW_ROWS = 131072


def size_on_disk(data_path: Path) -> int:
    """Bytes of all files of a dataset.

    :raises ValueError: if one is a link out of the folder, or no file
    """
    size, inside = 0, data_path.resolve()
    for path in data_path.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(f"{path.name} is a link out of the folder; copy the file there, or link the folder as a whole")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path.name} is no file")
        size += path.stat().st_size
    return size


def memory_limit(n_bytes: int) -> int:
    """Bytes in memory that so many on disk may become."""
    return LEAST_BYTES + LARGEST_RATIO * n_bytes


# ---------------------------------------------------------------------- metadata


def check_metadata(data_path: Path) -> None:
    """Check what Minari would follow, or make room for, when it opens a dataset.

    :raises ValueError: if it is not a dataset's
    """
    n_bytes = size_on_disk(data_path)
    metadata = json.loads((data_path / "metadata.json").read_bytes())
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no dictionary")
    for name in ("total_steps", "total_episodes"):
        if type(metadata.get(name)) is not int or metadata[name] < 0:
            raise ValueError(f"its {name} is {str(metadata.get(name))[:50]!r}")
    if metadata.get("data_format") == "parquet":
        raise ValueError(
            "it is parquet, of which a damaged file may end the whole program: write it as hdf5 or arrow, or, if you know where it "
            "comes from, open it by `minari.load_dataset()` and give that"
        )
    if metadata["total_episodes"] > n_bytes:
        raise ValueError(f"it speaks of {metadata['total_episodes']} episodes and has {n_bytes} bytes")
    for name in ("observation_space", "action_space"):
        if name in metadata:
            _check_space(json.loads(metadata[name]))
        else:  # Minari makes the environment to see its spaces.
            check_env_spec(EnvSpec.from_json(metadata["env_spec"]))


def _check_space(node: dict[str, Any]) -> None:
    if node.get("dtype", "int64") not in NUMPY_TYPES:
        raise ValueError(f"a space has the type {str(node['dtype'])[:50]!r}")
    parts = node.get("subspaces", [])
    for part in parts.values() if isinstance(parts, dict) else parts:
        _check_space(part)


# ---------------------------------------------------------------------- episodes


def check_episodes(source: minari.MinariDataset, indices: Sequence[int] | np.ndarray) -> Generator[dict[str, Any] | None]:
    """Check episodes of a dataset, one at each step of the iterator, right before it is read.

    :return: what an episode's group holds, opened (h5py's ``DatasetID``, or dictionaries of them); ``None`` if it is not in hdf5
    :raises ValueError: at the first that leads to other files, holds what is no number or text, or would be much larger in memory
        than on disk
    """
    path = Path(source.storage.data_path)
    n_bytes = size_on_disk(path)
    if source.storage.FORMAT == "hdf5":
        yield from _check_hdf5(path / "main_data.hdf5", indices, n_bytes)
        return
    # Minari reads ahead. Parquet comes here only if the user has opened it.
    for index in indices if source.storage.FORMAT == "arrow" else []:
        for file in sorted((path / str(index)).rglob("*")):
            if file.is_file() and file.name != "metadata.json":
                _check_arrow(file, memory_limit(n_bytes))
    for _ in indices:
        yield None


def _check_hdf5(path: Path, indices: Iterable[int], n_bytes: int) -> Generator[dict[str, Any]]:
    with h5py.File(path, "r") as file:
        for index in indices:
            name = f"episode_{index}".encode()
            link = file.id.links.get_info(name)
            size, found = _check_object(file.id, name, (link.type, link.u), n_bytes, set())
            if size > memory_limit(n_bytes):
                raise ValueError(f"it would take {size / 2**30:.3g} GiB of memory")
            if not isinstance(found, dict):
                raise ValueError(f"{name!r} is no group")
            yield found


def _check_object(group: Any, name: bytes, link: tuple[int, int], n_bytes: int, seen: set[int]) -> tuple[int, Any]:
    # Bytes that it takes in memory, and what it is, opened; what was seen is known by its address
    kind, address = link
    if kind != h5l.TYPE_HARD or address in seen:
        raise ValueError(f"{name!r} is a link; h5repack puts the data in its place")
    seen.add(address)
    found = h5o.open(group, name)
    if isinstance(found, h5d.DatasetID):
        return _check_data(found, repr(name), n_bytes), found
    if not isinstance(found, h5g.GroupID):
        raise ValueError(f"{name!r} is no data")
    parts: list[tuple[bytes, tuple[int, int]]] = []
    found.links.iterate(lambda part, info: parts.append((part, (info.type, info.u))), info=True)
    inside = {part.decode(): _check_object(found, part, link, n_bytes, seen) for part, link in parts}
    return sum(size for size, _ in inside.values()), {part: opened for part, (_, opened) in inside.items()}


def _check_data(data: Any, name: str, n_bytes: int) -> int:
    settings, dtype = data.get_create_plist(), data.get_type()
    layout = settings.get_layout()
    if layout == h5d.VIRTUAL or (layout == h5d.CONTIGUOUS and settings.get_external_count()):
        raise ValueError(f"{name} is in another file; h5repack puts the data in its place")
    if data.shape is None:  # nothing at all
        return 0
    size: int = prod(data.shape)
    if layout == h5d.CHUNKED:
        chunk = settings.get_chunk()
        # A chunk that was written has its address in the file; looking for those that were not takes long.
        if 8 * prod(-(-side // part) for side, part in zip(data.shape, chunk, strict=True)) > n_bytes:
            raise ValueError(f"{name} of shape {data.shape} was not written as a whole")
        size = max(size, prod(chunk))
    size *= int(dtype.get_size())
    is_text = dtype.get_class() == h5t.STRING
    if not (is_text or dtype.get_class() in NUMBERS or _is_list_of_numbers(dtype)):
        raise ValueError(f"{name} is of type {h5py.Dataset(data).dtype}, neither numbers nor texts")
    if size > memory_limit(n_bytes):
        raise ValueError(f"{name} would take {size / 2**30:.3g} GiB of memory")
    if dtype.get_class() in NUMBERS or (is_text and not dtype.is_variable_str()):
        return size
    return size + _size_of_texts(data, name, 1 if is_text else int(dtype.get_super().get_size()), memory_limit(n_bytes) - size)


def read_opened(found: Any) -> Any:
    """The arrays of what ``check_episodes()`` gives."""
    if isinstance(found, dict):
        return {name: read_opened(part) for name, part in found.items()}
    if found.get_type().get_class() not in NUMBERS or not found.shape or not prod(found.shape):
        return h5py.Dataset(found)[()]
    array = np.empty(found.shape, found.dtype)
    found.read(h5s.ALL, h5s.ALL, array)
    return array


def _size_of_texts(data: Any, name: str, width: int, limit: int) -> int:
    if len(data.shape) > 1:
        raise ValueError(f"{name} is a table of texts or lists")
    size = 0
    for start in range(0, data.shape[0] if data.shape else 0, TEXTS):
        size += width * sum(map(len, h5py.Dataset(data)[start : start + TEXTS]))
        if size > limit:
            raise ValueError(f"{name} would take more than {limit / 2**30:.3g} GiB of memory")
    return size


def _is_list_of_numbers(dtype: Any) -> bool:
    return bool(dtype.get_class() == h5t.VLEN) and dtype.get_super().get_class() in NUMBERS


# ---------------------------------------------------------------------- arrow


def _check_arrow(path: Path, limit: int) -> None:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for field in reader.schema:
            _check_arrow_type(field.type, f"{field.name} in {path.name}")
        if _is_compressed(path.read_bytes()):
            raise ValueError(f"{path.name} is compressed, which Minari's are not; write it again by Minari")
        size = 0
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate(full=True)
            size += batch.nbytes
            if batch.num_rows > ARROW_ROWS or size > limit:
                raise ValueError(f"{path.name} has {batch.num_rows} rows, and takes {size / 2**30:.3g} GiB of memory")


def _check_arrow_type(dtype: Any, where: str) -> None:
    # Numbers and texts, plain, or in lists and structures: what else there is may be larger than it looks.
    import pyarrow as pa

    kinds = pa.types
    for i in range(dtype.num_fields):
        _check_arrow_type(dtype.field(i).type, where)
    if kinds.is_struct(dtype) or kinds.is_list(dtype) or kinds.is_fixed_size_list(dtype):
        return
    plain = (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_string, kinds.is_binary)
    if not any(is_kind(dtype) for is_kind in plain):
        raise ValueError(f"{where} is of type {dtype}, neither numbers nor texts")


def _is_compressed(content: bytes) -> bool:
    # pyarrow does not tell before it has unpacked it: this follows the file's tables, see Arrow's File.fbs and Message.fbs.
    footer = content[-10 - struct.unpack_from("<i", content, len(content) - 10)[0] :]
    place = _field(footer, struct.unpack_from("<I", footer)[0], 3)
    if place is None:
        return False
    place += struct.unpack_from("<I", footer, place)[0]
    for i in range(struct.unpack_from("<I", footer, place)[0]):
        start = struct.unpack_from("<q", footer, place + 4 + 24 * i)[0]
        start += 8 if content[start : start + 4] == b"\xff" * 4 else 4
        message = content[start:]
        header = _field(message, struct.unpack_from("<I", message)[0], 2)
        if header is None or _field(message, header + struct.unpack_from("<I", message, header)[0], 3) is not None:
            return True
    return False


def _field(content: bytes, table: int, number: int) -> int | None:
    # Where a table of a flatbuffer has a field
    fields = table - struct.unpack_from("<i", content, table)[0]
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", content, fields + slot)[0] if slot < struct.unpack_from("<H", content, fields)[0] else 0
    return table + offset if offset else None
