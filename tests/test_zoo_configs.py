"""Configurations are read as data."""

from pathlib import Path

import pytest
import yaml
from stable_baselines3 import HerReplayBuffer
from torch import nn

from sb3_diffrl.configs import UnsafeConfigError, dump_yaml, is_plain, load_yaml, nearest, parse_entry, parse_python, resolve


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(text)
    return path


def test_rl_zoo_style_is_read(tmp_path: Path) -> None:
    text = """
base: &base
  n_timesteps: !!float 1e6
  learning_rate: lin_3e-4
  normalize: "{'norm_obs': True, 'norm_reward': False}"
Task-v0:
  <<: *base
  policy_kwargs: "dict(net_arch=[400, 300], activation_fn=nn.Tanh)"
"""
    entry = load_yaml(written(tmp_path, text))["Task-v0"]
    assert entry["n_timesteps"] == 1e6
    assert isinstance(entry["n_timesteps"], float)
    resolved = resolve(entry)
    assert resolved["policy_kwargs"] == {"net_arch": [400, 300], "activation_fn": nn.Tanh}
    assert resolved["normalize"] == {"norm_obs": True, "norm_reward": False}
    assert resolved["learning_rate"] == "lin_3e-4"


def test_what_rl_zoo_saves_is_read(tmp_path: Path) -> None:
    from collections import OrderedDict

    saved = OrderedDict([("algo", "sac"), ("env_kwargs", None), ("train_freq", (1, "episode"))])
    assert load_yaml(written(tmp_path, yaml.dump(saved))) == dict(saved)


@pytest.mark.parametrize(
    "code",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system ''",
        "!!python/object/apply:collections.OrderedDict [!!python/object/apply:os.system ['touch ran']]",
        "!!python/object/apply:collections.OrderedDict [[[a, b, c]]]",
        "!!python/module:antigravity ''",
    ],
)
def test_objects_in_yaml_are_refused_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeConfigError):
        load_yaml(written(tmp_path, f"a: {code}"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch ran')",
        "dict(a=open('x'))",
        "(lambda: 1)()",
        "nn.Module.__subclasses__()",
        "nn.__loader__",
        "os.system",
        "[x for x in (1, 2)]",
        "dict(**{'a': 1})",
        "1 if True else 2",
    ],
)
def test_strings_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeConfigError):
        parse_python(text)
    with pytest.raises(UnsafeConfigError, match=r"--trust"):
        resolve({"policy_kwargs": text})
    assert not (tmp_path / "ran").exists()


def test_values_of_strings() -> None:
    assert parse_python("dict(a=-1.5, b=(1, 'x'), c=[True, None], d={'e': 2})") == {
        "a": -1.5,
        "b": (1, "x"),
        "c": [True, None],
        "d": {"e": 2},
    }
    assert parse_python("HerReplayBuffer") is HerReplayBuffer
    assert parse_python("th.nn.ReLU") is nn.ReLU


@pytest.mark.parametrize("key", ["env_wrapper", "vec_env_wrapper", "callback", "policy"])
def test_names_of_unknown_packages_need_trust(key: str) -> None:
    for name in ("subprocess.Popen", {"my.Wrapper": {"a": 1}}, ["gymnasium.wrappers.TimeLimit", "os.system"]):
        with pytest.raises(UnsafeConfigError, match=r"--trust"):
            resolve({key: name})
        assert resolve({key: name}, trust=True)[key] == name
    assert resolve({key: "gymnasium.wrappers.TimeLimit"})[key] == "gymnasium.wrappers.TimeLimit"
    with pytest.raises(UnsafeConfigError):  # a package whose name only begins alike
        resolve({key: "gymnasium_evil.wrappers.X"})


def test_entries_of_the_command_line() -> None:
    assert parse_entry("learning_rate:3e-4") == ("learning_rate", 3e-4)
    assert parse_entry("preset:pointmaze/paper") == ("preset", "pointmaze/paper")
    assert parse_entry("normalize:true") == ("normalize", True)
    assert parse_entry("policy_kwargs:dict(net_arch=[8])") == ("policy_kwargs", {"net_arch": [8]})
    # stays text, so that it can be saved
    assert parse_entry("policy_kwargs:dict(activation_fn=nn.ReLU)") == ("policy_kwargs", "dict(activation_fn=nn.ReLU)")
    for wrong in ("learning_rate", ":3", "a b:1"):
        with pytest.raises(ValueError, match="name:value"):
            parse_entry(wrong)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    data = {"a": (1, 2), "b": {"c": [None, True, 1e-4]}, "path": tmp_path}
    dump_yaml(data, tmp_path / "x.yml")
    assert load_yaml(tmp_path / "x.yml") == {"a": [1, 2], "b": {"c": [None, True, 1e-4]}, "path": str(tmp_path)}
    assert yaml.safe_load((tmp_path / "x.yml").read_text())["a"] == [1, 2]


def test_plain_and_nearest() -> None:
    assert is_plain({"a": [1, ("b", None)]})
    assert not is_plain({"a": nn.ReLU})
    assert nearest("nclq", ["nclql", "sac"]) == " Nearest: nclql."
    assert nearest("zzz", ["nclql", "sac"]) == ""


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_yaml(tmp_path / "absent.yml")
    with pytest.raises(ValueError, match="not YAML"):
        load_yaml(written(tmp_path, "a: [1"))
