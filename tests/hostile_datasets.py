"""Datasets that nobody's accident makes: each is a good one, tampered with by a seeded generator.

All but those of ``HARMLESS`` must be refused. What lies outside the folder is ``SECRET``.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from gymnasium import spaces

from sb3_diffrl.offline.writing import DatasetWriter

from .mutations import Planted

SECRET = 1234.5
NAMES = ("observations", "actions", "rewards", "terminations", "truncations")
Tamper = Callable[[Path, np.random.Generator], None]


def good_dataset(root: Path, data_format: Any = "hdf5") -> Path:
    """Two episodes of three steps, with infos.

    :param data_format: Minari's storage
    :return: the folder of its data
    """
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    with DatasetWriter("fuzz/good-v0", spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)), data_format=data_format) as writer:
        for _ in range(2):
            ends = np.arange(3) == 2
            writer.add_episode(np.zeros((4, 2)), np.zeros((3, 1)), np.zeros(3), np.zeros(3, bool), ends, [{"a": 0.5}] * 4)
        writer.publish()
    return root / "fuzz/good-v0/data"


def _replace(data: Path, rng: np.random.Generator, put: Callable[[h5py.Group, str, h5py.Dataset], None]) -> None:
    # Another object in the place of one of the arrays, or of an info
    with h5py.File(data / "main_data.hdf5", "a") as file:
        group, names = file["episode_0"], list(NAMES)
        if rng.integers(4) == 0:
            group, names = group["infos"], ["a"]
        name = names[rng.integers(len(names))]
        former = group[name]
        del group[name]
        put(group, name, former)


def _outside(data: Path) -> Path:
    # A file of the same form, with what must not be read
    path = data.parents[2] / "outside.hdf5"
    with h5py.File(path, "w") as file:
        for name, shape in (("observations", (4, 2)), ("actions", (3, 1)), *((name, (3,)) for name in NAMES[2:]), ("a", (4,))):
            file[name] = np.full(shape, SECRET)
        episode = file.create_group("episode")
        for name in NAMES:
            episode[name] = file[name][()]
    path.with_suffix(".raw").write_bytes(np.full(100, SECRET).tobytes())
    return path


def external_link(data: Path, rng: np.random.Generator) -> None:
    path = _outside(data)
    _replace(data, rng, lambda group, name, _: group.__setitem__(name, h5py.ExternalLink(path, name)))


def external_episode(data: Path, rng: np.random.Generator) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        del file["episode_1"]
        file["episode_1"] = h5py.ExternalLink(_outside(data), "episode")


def external_storage(data: Path, rng: np.random.Generator) -> None:
    raw = _outside(data).with_suffix(".raw")

    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        group.create_dataset(name, former.shape, "f8", external=[(raw, 0, h5py.h5f.UNLIMITED)])

    _replace(data, rng, put)


def virtual_dataset(data: Path, rng: np.random.Generator) -> None:
    path = _outside(data)

    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        layout = h5py.VirtualLayout(former.shape, "f8")
        layout[:] = h5py.VirtualSource(path, name, former.shape)
        group.create_virtual_dataset(name, layout)

    _replace(data, rng, put)


def link_cycle(data: Path, rng: np.random.Generator) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        infos, kind = file["episode_0/infos"], rng.integers(3)
        for i in range(30):
            infos[f"loop{i}"] = infos if kind == 0 else file["/"] if kind == 1 else h5py.SoftLink("/episode_0")


def claimed_shape(data: Path, rng: np.random.Generator) -> None:
    """Shapes of terabytes of which nothing was written."""
    rows = int(10 ** rng.integers(9, 14))

    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        group.create_dataset(name, (rows, *former.shape[1:]), "f8", chunks=True if rng.integers(2) else None)

    _replace(data, rng, put)


def huge_chunk(data: Path, rng: np.random.Generator) -> None:
    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        chunk = (2**28, *former.shape[1:])
        group.create_dataset(name, former.shape, "f8", chunks=chunk, maxshape=(None, *former.shape[1:]), compression="gzip")

    _replace(data, rng, put)


def compressed(data: Path, rng: np.random.Generator) -> None:
    """Zeros that gzip makes a thousandth of."""

    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        shape = (4 * 10**7, *former.shape[1:])
        group.create_dataset(name, shape, "f8", chunks=(10**6, *shape[1:]), compression="gzip", fillvalue=0.0)
        group[name][: 10**6] = 0

    _replace(data, rng, put)


def same_text_often(data: Path, rng: np.random.Generator) -> None:
    """Texts of a megabyte whose places all lead to one."""
    with h5py.File(data / "main_data.hdf5", "a") as file:
        infos = file["episode_0/infos"]
        infos.create_dataset("b", (1,), h5py.string_dtype(), chunks=(1,), maxshape=(None,))
        infos["b"][0] = "x" * 2**20
        _, place = infos["b"].id.read_direct_chunk((0,))
        count = int(rng.integers(1000, 3000))
        infos["b"].resize((count,))
        for i in range(count):
            infos["b"].id.write_direct_chunk((i,), place)


def other_type(data: Path, rng: np.random.Generator) -> None:
    """References, opaque bytes (a pickle), compounds, a type, a group: whatever is no number."""
    kind = rng.integers(5)
    planted = np.void(pickle.dumps(Planted()))

    def put(group: h5py.Group, name: str, former: h5py.Dataset) -> None:
        rows = len(former)
        if kind == 0:
            group[name] = np.array([former.ref] * rows, h5py.ref_dtype)
        elif kind == 1:
            group[name] = np.array([planted] * rows)
        elif kind == 2:
            group[name] = np.zeros(rows, [("x", "f8"), ("y", "i4")])
        elif kind == 3:
            group[name] = np.dtype("f8")
        else:
            group[name] = np.zeros(rows, "c16")

    _replace(data, rng, put)


# ---------------------------------------------------------------------- files and metadata


def linked_file(data: Path, rng: np.random.Generator) -> None:
    name = ("main_data.hdf5", "metadata.json")[rng.integers(2)]
    shutil.move(data / name, data.parents[2] / name)
    (data / name).symlink_to(data.parents[2] / name)


def linked_arrow(data: Path, rng: np.random.Generator) -> None:
    folder = data / str(rng.integers(2))
    shutil.move(folder, data.parents[2] / "moved")
    folder.symlink_to(data.parents[2] / "moved")


def pipe(data: Path, rng: np.random.Generator) -> None:
    name = ("main_data.hdf5", "metadata.json", "other")[rng.integers(3)]
    (data / name).unlink(missing_ok=True)
    os.mkfifo(data / name)


def metadata(data: Path, rng: np.random.Generator) -> None:
    """Numbers, types and environments that Minari would believe."""
    document = json.loads((data / "metadata.json").read_text())
    box = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-1, -1], "high": [1, 1]}
    spec = {"id": "Hostile-v0", "entry_point": "os:mkdir", "kwargs": {"path": "mark"}, "additional_wrappers": []}
    changes: list[dict[str, Any]] = [
        {"total_steps": 10 ** int(rng.integers(10, 19))},
        {"total_episodes": 10 ** int(rng.integers(6, 19))},
        {"observation_space": None, "env_spec": json.dumps(spec)},
        {"observation_space": json.dumps({**box, "dtype": f"U{10 ** rng.integers(6, 9)}"})},
        {"observation_space": json.dumps({**box, "dtype": "O"})},
        {"observation_space": json.dumps({**box, "shape": [2**31, 2**31]})},
        {"observation_space": json.dumps({**box, "low": [-1], "high": [1], "shape": [2**33]})},
        {"observation_space": json.dumps({"type": "Discrete", "n": 10 ** int(rng.integers(10, 18)), "start": 0})},
        {"observation_space": json.dumps({"type": "MultiBinary", "n": [2**20, 2**20]})},
        {"observation_space": '{"type": "Dict", "subspaces": {"a": ' * 50_000},
        {"data_format": ["../x", "pickle", None, [], "HDF5"][rng.integers(5)]},
        {"observation_space": json.dumps({"type": ["Graph", None, [], 3][rng.integers(4)]})},
    ]
    document |= changes[rng.integers(len(changes))]
    if document["observation_space"] is None:
        del document["observation_space"]
    (data / "metadata.json").write_text(json.dumps(document))


# ---------------------------------------------------------------------- arrow and parquet


def _columns(**changes: Any) -> dict[str, Any]:
    observations = pa.array([[0.0, 0.0]] * 4, pa.list_(pa.float32(), 2))
    actions = pa.array([[0.0]] * 4, pa.list_(pa.float32(), 1))
    flags = pa.array([False] * 4)
    columns = {"observations": observations, "actions": actions, "rewards": pa.array([0.0] * 4)}
    return {**columns, "terminations": flags, "truncations": flags, **changes}


def _write_arrow(data: Path, table: pa.Table, compression: str | None = None) -> None:
    path = next((data / "0").glob("part-*"))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=10**9)


def arrow_compressed(data: Path, rng: np.random.Generator) -> None:
    zeros = pa.array(np.zeros(10**6 * int(rng.integers(1, 20))))
    rows = len(zeros) // 2
    columns = {"observations": pa.FixedSizeListArray.from_arrays(zeros, 2), "rewards": zeros[:rows]}
    _write_arrow(data, pa.table(columns), ("zstd", "lz4")[rng.integers(2)])


def arrow_other_type(data: Path, rng: np.random.Generator) -> None:
    """Columns that are larger than they look: dictionaries, runs, nothing at all."""
    name = ("observations", "actions", "rewards")[rng.integers(3)]
    rows, kind = int(10 ** rng.integers(5, 7)), rng.integers(3)
    if kind == 0:
        column: Any = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["x" * 10**6]))
    elif kind == 1:
        column = pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array([0.0]))
    else:
        column = pa.nulls(rows)
    _write_arrow(data, pa.table({name: column}))


def arrow_many_rows(data: Path, rng: np.random.Generator) -> None:
    """Lists of no numbers take no room on the disk."""
    rows = int(10 ** rng.integers(6, 8))
    empty = pa.Array.from_buffers(pa.list_(pa.float32(), 0), rows, [None], children=[pa.array([], pa.float32())])
    _write_arrow(data, pa.table({"observations": empty}))


def arrow_pickle(data: Path, rng: np.random.Generator) -> None:
    """A column that names a pickle, as former versions of pyarrow ran it."""
    name = ("observations", "actions", "rewards")[rng.integers(3)]
    table, meta = pa.table(_columns()), {"ARROW:extension:name": "arrow.py_extension_type"}
    field = table.schema.field(name).with_metadata({**meta, "ARROW:extension:metadata": pickle.dumps(Planted())})
    _write_arrow(data, table.cast(table.schema.set(table.schema.get_field_index(name), field)))


HDF5: dict[str, Tamper] = {
    function.__name__: function
    for function in (
        *(external_link, external_episode, external_storage, virtual_dataset, link_cycle, claimed_shape, huge_chunk, compressed),
        *(same_text_often, other_type, linked_file, pipe, metadata),
    )
}
ARROW: dict[str, Tamper] = {
    function.__name__: function for function in (arrow_compressed, arrow_other_type, arrow_many_rows, arrow_pickle, linked_arrow)
}
HARMLESS = {"arrow_pickle"}
