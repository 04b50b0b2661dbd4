"""Objects as JSON and back, by a list of what is allowed: reading makes nothing that is not on it, and imports nothing else.

Numbers, strings, lists and dictionaries are themselves. Everything else is ``{"$": kind, ...}``, with ``kind`` one of ``CODECS``.
"""

import base64
import dataclasses
import inspect
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TrainFreq

from sb3_diffrl.saving.allowed import find_class, find_value_class, name_of_class, value_arguments
from sb3_diffrl.saving.limits import check_arguments

TAG = "$"
# Of numbers alone: an array of objects would be pickled.
DTYPE = re.compile(r"[<>|=]?[biufcSU]\d{1,4}|[|]?b1")


class NotAllowedError(ValueError):
    """An object that is not on the list, or JSON that stands for none."""


class Codec(NamedTuple):
    """How the objects of one kind are written and read.

    :param encode: object -> fields, JSON
    :param decode: fields -> object
    """

    encode: Callable[[Any], dict[str, Any]]
    decode: Callable[[dict[str, Any]], Any]


def encode(value: Any) -> Any:
    """An object as JSON.

    :raises NotAllowedError: naming what in it cannot be written
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is dict and all(type(key) is str and key != TAG for key in value):
        return {key: _encode_in(key, item) for key, item in value.items()}
    kind = _kind(value)
    return {TAG: kind, **CODECS[kind].encode(value)}


def decode(node: Any) -> Any:
    """What ``encode()`` wrote.

    :raises NotAllowedError: if it holds anything else
    """
    if node is None or type(node) in (bool, int, float, str):
        return node
    if type(node) is list:
        return [decode(item) for item in node]
    if TAG not in node:
        return {key: decode(item) for key, item in node.items()}
    kind = node[TAG]
    if not isinstance(kind, str) or kind not in CODECS:
        raise NotAllowedError(f"it holds an unknown kind of object, {str(kind)[:100]!r}")
    try:
        return CODECS[kind].decode(node)
    except (NotAllowedError, RecursionError):
        raise
    except Exception as error:
        raise NotAllowedError(f"its {kind} is damaged ({type(error).__name__}: {str(error)[:200]})") from error


def _encode_in(key: str, value: Any) -> Any:
    try:
        return encode(value)
    except NotAllowedError as error:
        raise NotAllowedError(f"{key}: {error}") from None


def _kind(value: Any) -> str:
    # By exact types: a subclass may do anything.
    if type(value) in KINDS:
        return KINDS[type(value)]
    if isinstance(value, type) and name_of_class(value) is not None:
        return "class"
    if isinstance(value, Enum) and name_of_class(type(value)) is not None:
        return "enum"
    if isinstance(value, np.generic) and DTYPE.fullmatch(value.dtype.str):
        return "scalar"
    if isinstance(value, np.dtype) and DTYPE.fullmatch(value.str):
        return "dtype"
    if isinstance(value, Path):
        return "path"
    if value_arguments(type(value)) is not None:
        return "object"
    if isinstance(value, type) or inspect.isroutine(value):
        raise NotAllowedError(f"{value.__module__}.{value.__qualname__}")
    raise NotAllowedError(f"an object of class {type(value).__module__}.{type(value).__qualname__}")


# ---------------------------------------------------------------------- numbers


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array of numbers or short texts as JSON fields."""
    if not DTYPE.fullmatch(array.dtype.str):
        raise NotAllowedError(f"an array of {array.dtype}")
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def decode_array(node: dict[str, Any]) -> np.ndarray:
    """The inverse of ``encode_array()``."""
    # frombuffer: what is in the file bounds the memory, whatever the shape says.
    return np.frombuffer(base64.b64decode(node["data"], validate=True), _dtype(node["dtype"])).reshape(node["shape"]).copy()


def _dtype(name: Any) -> np.dtype:
    if not DTYPE.fullmatch(name):
        raise NotAllowedError(f"its arrays are of type {name!r}")
    dtype: np.dtype = np.dtype(name)
    return dtype


# ---------------------------------------------------------------------- spaces


def _encode_rng(space: spaces.Space[Any]) -> dict[str, Any]:
    # The state of the space's random generator, if it was used
    generator = space._np_random
    if generator is None or type(generator.bit_generator) is not np.random.PCG64:
        return {}
    return {"rng": generator.bit_generator.state}


def _seeded(space: spaces.Space[Any], node: dict[str, Any]) -> spaces.Space[Any]:
    if "rng" in node:
        bits = np.random.PCG64(0)
        bits.state = node["rng"]
        space._np_random = np.random.Generator(bits)
    return space


def _space(make: Callable[..., spaces.Space[Any]], arguments: dict[str, str]) -> Codec:
    """A space that its constructor makes again.

    :param arguments: constructor argument -> attribute
    """
    return Codec(
        lambda space: {**{name: encode(getattr(space, attribute)) for name, attribute in arguments.items()}, **_encode_rng(space)},
        lambda node: _seeded(make(**{name: decode(node[name]) for name in arguments}), node),
    )


def _text(max_length: int, min_length: int, charset: list[str]) -> spaces.Text:
    return spaces.Text(max_length, min_length=min_length, charset="".join(charset))


def _box(low: np.ndarray, high: np.ndarray, dtype: np.dtype) -> spaces.Box:
    if low.dtype != dtype or high.dtype != dtype:
        raise NotAllowedError("the bounds of its Box are of another type than the space")
    return spaces.Box(low, high, low.shape, dtype)


# ---------------------------------------------------------------------- objects made of their arguments


def _encode_object(value: Any) -> dict[str, Any]:
    arguments = value_arguments(type(value))
    assert arguments is not None
    fields = {name: _encode_in(name, getattr(value, attribute)) for name, attribute in arguments.items()}
    return {"class": name_of_class(type(value)), "arguments": fields}


def _decode_object(node: dict[str, Any]) -> Any:
    made = find_value_class(node["class"])
    arguments = {name: decode(value) for name, value in node["arguments"].items()}
    check_arguments(made, arguments)
    return made(**arguments)


def _decode_class(node: dict[str, Any]) -> type:
    return find_class(node["class"])


def _sequence(make: Callable[[list[Any]], Any]) -> Codec:
    return Codec(lambda value: {"items": [encode(item) for item in value]}, lambda node: make(decode(node["items"])))


def _pairs(make: Callable[[list[tuple[Any, Any]]], Any]) -> Codec:
    return Codec(
        lambda value: {"items": [[encode(key), _encode_in(str(key), item)] for key, item in value.items()]},
        lambda node: make([(decode(key), decode(item)) for key, item in node["items"]]),
    )


CODECS: dict[str, Codec] = {
    "tuple": _sequence(tuple),
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "dict": _pairs(dict),
    "OrderedDict": _pairs(OrderedDict),
    "deque": Codec(
        lambda value: {"items": [encode(item) for item in value], "maxlen": value.maxlen},
        lambda node: deque(decode(node["items"]), node["maxlen"]),
    ),
    "TrainFreq": Codec(
        lambda value: {"frequency": value.frequency, "unit": encode(value.unit)},
        lambda node: TrainFreq(node["frequency"], decode(node["unit"])),
    ),
    "array": Codec(encode_array, decode_array),
    "scalar": Codec(lambda value: encode_array(np.asarray(value)), lambda node: decode_array(node)[()]),
    "dtype": Codec(lambda value: {"name": value.str}, lambda node: _dtype(node["name"])),
    "tensor": Codec(lambda value: encode_array(value.detach().cpu().numpy()), lambda node: th.as_tensor(decode_array(node))),
    "path": Codec(lambda value: {"path": str(value)}, lambda node: Path(node["path"])),
    "class": Codec(lambda value: {"class": name_of_class(value)}, _decode_class),
    "enum": Codec(
        lambda value: {"class": name_of_class(type(value)), "name": value.name},
        lambda node: getattr(find_class(node["class"]), "__members__")[node["name"]],  # noqa: B009
    ),
    "object": Codec(_encode_object, _decode_object),
    "Box": _space(_box, {"low": "low", "high": "high", "dtype": "dtype"}),
    "Discrete": _space(spaces.Discrete, {"n": "n", "start": "start"}),
    "MultiDiscrete": _space(spaces.MultiDiscrete, {"nvec": "nvec", "start": "start", "dtype": "dtype"}),
    "MultiBinary": _space(spaces.MultiBinary, {"n": "n"}),
    "Text": _space(_text, {"max_length": "max_length", "min_length": "min_length", "charset": "character_list"}),
    # A list of pairs keeps its order, a dictionary would be sorted.
    "Dict": Codec(
        lambda space: {"spaces": [[key, encode(part)] for key, part in space.items()], **_encode_rng(space)},
        lambda node: _seeded(spaces.Dict([(key, decode(part)) for key, part in node["spaces"]]), node),
    ),
    "Tuple": Codec(
        lambda space: {"spaces": [encode(part) for part in space], **_encode_rng(space)},
        lambda node: _seeded(spaces.Tuple([decode(part) for part in node["spaces"]]), node),
    ),
}
KINDS: dict[type, str] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    dict: "dict",
    OrderedDict: "OrderedDict",
    deque: "deque",
    TrainFreq: "TrainFreq",
    np.ndarray: "array",
    th.Tensor: "tensor",
    spaces.Box: "Box",
    spaces.Discrete: "Discrete",
    spaces.MultiDiscrete: "MultiDiscrete",
    spaces.MultiBinary: "MultiBinary",
    spaces.Text: "Text",
    spaces.Dict: "Dict",
    spaces.Tuple: "Tuple",
}


@dataclasses.dataclass
class Refused:
    """Stands in the file for what cannot be written as JSON.

    :param reason: what it is
    """

    reason: str


def encode_all(data: dict[str, Any]) -> dict[str, Any]:
    """A dictionary of attributes as JSON; what cannot be written is ``{"$": "refused", "reason": what it is}``."""
    encoded = {}
    for key, value in data.items():
        try:
            encoded[key] = encode(value)
        except NotAllowedError as error:
            encoded[key] = {TAG: "refused", "reason": str(error)}
        except RecursionError:
            encoded[key] = {TAG: "refused", "reason": "an object that holds itself"}
    return encoded


def decode_all(data: dict[str, Any], skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The inverse of ``encode_all()``.

    :param skip: keys to leave out
    :return: attributes, ``Refused`` in the place of what could not be written
    :raises NotAllowedError: naming the key
    """
    decoded: dict[str, Any] = {}
    for key, node in data.items():
        if key in skip:
            continue
        if isinstance(node, dict) and node.get(TAG) == "refused":
            decoded[key] = Refused(str(node.get("reason"))[:300])
            continue
        try:
            decoded[key] = decode(node)
        except (NotAllowedError, RecursionError) as error:
            raise NotAllowedError(f"its entry {key[:100]!r} cannot be read: {error}") from error
    return decoded
