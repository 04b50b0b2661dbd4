"""Files as an accident or an attacker would leave them, made from a good one by a seeded generator."""

import base64
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from sb3_diffrl.saving.archive import ENTRY

Entries = dict[str, bytes]
#: A file that exists afterwards if anything was run.
MARK_VARIABLE = "SB3_DIFFRL_MARK"


class Planted:
    """Un-pickled, it leaves a mark."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f'touch "${MARK_VARIABLE}"',)


def unpack(content: bytes) -> Entries:
    """The entries of a zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(entries: Entries, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bits, anywhere."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def flip_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes of the JSON, with a zip that is in order."""
    entries = unpack(content)
    changed = bytearray(entries[ENTRY])
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(changed))] = int(rng.integers(32, 127))
    return pack({**entries, ENTRY: bytes(changed)})


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut off anywhere."""
    return content[: rng.integers(len(content))]


def replace_value(content: bytes, rng: np.random.Generator) -> bytes:
    """Another value anywhere in the JSON."""
    entries = unpack(content)
    document = json.loads(entries[ENTRY])
    places = list(_places(document))
    parent, key = places[rng.integers(len(places))]
    values: list[Any] = [None, True, -1, 0, 10**12, 1e308, float("nan"), "", "x" * 1000, [], {}, [[]] * 50, {"$": "Box"}, 2**63]
    values += [{"$": "object", "class": "os.system", "arguments": {}}, {"$": "tuple", "items": 3}, {"$": "array", "shape": [10**9]}]
    values += [0.5, 2**40, [[1, 2]], {"$": "tuple", "items": [1]}, {"$": "class", "class": "torch.nn.ReLU"}]
    parent[key] = values[rng.integers(len(values))]
    return pack({**entries, ENTRY: json.dumps(document).encode()})


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from _places(value)


def reshape_weights(content: bytes, rng: np.random.Generator) -> bytes:
    """A tensor of another shape, type or name, or one too few."""
    entries = unpack(content)
    state = th.load(io.BytesIO(entries["policy.pth"]), weights_only=True)
    name = list(state)[rng.integers(len(state))]
    kind = rng.integers(4)
    if kind == 0:
        state[name] = th.zeros(7, 3)
    elif kind == 1:
        state["x" + name] = state.pop(name)
    elif kind == 2:
        del state[name]
    else:
        state[name] = "no tensor"
    buffer = io.BytesIO()
    th.save(state, buffer)
    return pack({**entries, "policy.pth": buffer.getvalue()})


def change_optimizer(content: bytes, rng: np.random.Generator) -> bytes:
    """A moment of another shape, type or value, one too many or too few."""
    entries = unpack(content)
    name = next(name for name in entries if name.endswith("optimizer.pth"))
    saved = th.load(io.BytesIO(entries[name]), weights_only=True)
    state = saved["state"][0]
    key = ("exp_avg", "exp_avg_sq", "step")[rng.integers(3)]
    values: list[Any] = [
        th.zeros(1),
        th.full_like(state[key], float("nan")),
        th.zeros(()).expand(10**8),
        "text",
        None,
        th.zeros(7, 3),
    ]
    values += [th.sparse_coo_tensor(th.zeros(1, 1, dtype=th.long), th.ones(1), (10**12,)), state[key].to(th.complex64), -1]
    kind = rng.integers(12)
    if kind < 9:
        state[key] = values[kind]
        if key == "step" and kind == 0:
            del state[key]
    elif kind == 9:
        state["more"] = th.zeros(1)
    elif kind == 10:
        saved["state"][99] = dict(state)
    else:
        saved["param_groups"][0]["params"].pop()
    buffer = io.BytesIO()
    th.save(saved, buffer)
    return pack({**entries, name: buffer.getvalue()})


def poison_weights(content: bytes, rng: np.random.Generator) -> bytes:
    """A weight that is not finite."""
    entries = unpack(content)
    state = th.load(io.BytesIO(entries["policy.pth"]), weights_only=True)
    name = next(name for name, value in state.items() if isinstance(value, th.Tensor) and value.is_floating_point())
    state[name].flatten()[rng.integers(state[name].numel())] = (float("nan"), float("inf"))[rng.integers(2)]
    buffer = io.BytesIO()
    th.save(state, buffer)
    return pack({**entries, "policy.pth": buffer.getvalue()})


def plant_pickle(content: bytes, rng: np.random.Generator) -> bytes:
    """A pickle that leaves a mark, wherever one might be read."""
    entries = unpack(content)
    planted = pickle.dumps(Planted())
    torch_file = io.BytesIO()
    th.save(Planted(), torch_file)
    data = json.loads(entries["data"])
    name = list(data)[rng.integers(len(data))]
    data[name] = {":type:": "x", ":serialized:": base64.b64encode(planted).decode()}
    choices: list[Entries] = [
        {"policy.pth": planted},
        {"policy.pth": torch_file.getvalue()},
        {"pytorch_variables.pth": torch_file.getvalue()},
        {"data": json.dumps(data).encode()},
        {"x.pth": torch_file.getvalue()},
        {"critic.pth": planted},
        {ENTRY: json.dumps({**json.loads(entries[ENTRY]), "attributes": data}).encode()},
        {ENTRY: planted},
    ]
    return pack({**entries, **choices[rng.integers(len(choices))]})


def traverse(content: bytes, rng: np.random.Generator) -> bytes:
    """Names that lead out of the folder."""
    names = ["../../outside.pth", "/tmp/outside.pth", "..\\outside.pth", "policy/../../outside.pth", "__class__.pth", "a" * 5000]
    return pack({**unpack(content), names[rng.integers(len(names))]: b"outside"})


def bomb(content: bytes, rng: np.random.Generator) -> bytes:
    """Little on disk, much in memory."""
    entries, kind = unpack(content), rng.integers(6)
    document = json.loads(entries[ENTRY])
    attributes = document["attributes"]
    if kind == 0:
        return pack({**entries, "policy.pth": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED)
    if kind == 1:
        packed = bytearray(pack({**entries, "policy.pth": bytes(1000)}))
        end = packed.rfind(b"PK\x01\x02")
        packed[end + 20 : end + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)  # sizes in the directory
        return bytes(packed)
    if kind == 2:
        return pack({**entries, "policy.pth": pack({"archive/data.pkl": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED)})
    if kind == 3:
        attributes["policy_kwargs"] = {"net_arch": [int(10 ** rng.integers(6, 12))] * 2}
    elif kind == 4:
        attributes["policy_kwargs"] = {"net_arch": [2] * 10**4}
    else:
        return pack({**entries, ENTRY: b"[" * 10**6})
    return pack({**entries, ENTRY: json.dumps(document).encode()})


def change_version(content: bytes, rng: np.random.Generator) -> bytes:
    """Another format, or none."""
    entries = unpack(content)
    document = json.loads(entries[ENTRY])
    document["format"] = [2, 10**9, -1, "1", None, 1.5][rng.integers(6)]
    return pack({**entries, ENTRY: json.dumps(document).encode()})


def drop_entry(content: bytes, rng: np.random.Generator) -> bytes:
    """One entry of the zip too few, or one twice, or another's content in its place."""
    entries, kind = unpack(content), rng.integers(3)
    names = list(entries)
    name, other = names[rng.integers(len(names))], names[rng.integers(len(names))]
    if kind == 0:
        del entries[name]
        return pack(entries)
    if kind == 1:
        return pack({**entries, name: entries[other]})
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name + "\x00x"), entries[name])
    return buffer.getvalue()


MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    function.__name__: function
    for function in (
        *(flip_bits, flip_json, truncate, replace_value, reshape_weights, plant_pickle, traverse, bomb, change_version, drop_entry),
        *(change_optimizer, poison_weights),
    )
}
