"""Configurations are read as data."""

from pathlib import Path

import pytest
import yaml
from stable_baselines3 import HerReplayBuffer
from torch import nn

from sb3_diffrl.configs import (
    EVALUATED,
    UnsafeConfigError,
    dump_yaml,
    is_plain,
    load_settings,
    load_yaml,
    nearest,
    parse_entry,
    parse_python,
    resolve,
)
from tests.zoo_process import gymnasium_put_back  # noqa: F401


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


@pytest.mark.parametrize("key", EVALUATED)
def test_strings_within_strings_are_not_left_to_be_evaluated(key: str) -> None:
    code = "__import__('os').system('touch ran')"
    with pytest.raises(UnsafeConfigError, match=r"within a string.*--trust"):
        resolve({key: repr(code)})


def test_values_of_strings() -> None:
    assert parse_python("dict(a=-1.5, b=(1, 'x'), c=[True, None], d={'e': 2})") == {
        "a": -1.5,
        "b": (1, "x"),
        "c": [True, None],
        "d": {"e": 2},
    }
    assert parse_python("HerReplayBuffer") is HerReplayBuffer
    assert parse_python("th.nn.ReLU") is nn.ReLU


NAMED = {
    "env_wrapper": "gymnasium.wrappers.TimeLimit",
    "vec_env_wrapper": "stable_baselines3.common.vec_env.VecFrameStack",
    "callback": "rl_zoo3.callbacks.RawStatisticsCallback",
    "policy": "stable_baselines3.sac.policies.SACPolicy",
}


@pytest.mark.parametrize("key", NAMED)
def test_names_of_unknown_packages_need_trust(key: str) -> None:
    for name in ("subprocess.Popen", {"my.Wrapper": {"a": 1}}, [NAMED[key], "os.system"]):
        with pytest.raises(UnsafeConfigError, match=r"--trust"):
            resolve({key: name})
        assert resolve({key: name}, trust=True)[key] == name
    assert resolve({key: NAMED[key]})[key] == NAMED[key]
    with pytest.raises(UnsafeConfigError):  # a package whose name only begins alike
        resolve({key: "gymnasium_evil.wrappers.X"})


@pytest.mark.parametrize("key", NAMED)
@pytest.mark.parametrize(
    "name",
    [
        {"gymnasium.register": {"id": "Evil-v0", "entry_point": "subprocess:call"}},
        "gymnasium.make",
        {"stable_baselines3.common.save_util.load_from_pkl": {"path": "x.pkl"}},
        {"sb3_diffrl.zoo.wrappers.inside_monitor": {"wrappers": ["os.system"]}},
        "stable_baselines3.common.utils.os.system",
        "gymnasium.core.Any",
        "stable_baselines3.SAC",
    ],
)
def test_a_name_is_a_class_of_its_kind(key: str, name: str | dict[str, dict[str, str]]) -> None:
    with pytest.raises((UnsafeConfigError, ValueError), match=r"not a subclass|cannot be imported"):
        resolve({key: [name]} if key != "policy" else {key: name})


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("env_wrapper", {"stable_baselines3.common.monitor.Monitor": {"filename": "/x"}}),
        ("env_wrapper", {"gymnasium.wrappers.RecordVideo": {"video_folder": "/x"}}),
        ("vec_env_wrapper", {"stable_baselines3.common.vec_env.VecMonitor": {"filename": "/x"}}),
        ("vec_env_wrapper", {"stable_baselines3.common.vec_env.VecVideoRecorder": {"video_folder": "/x"}}),
        ("callback", {"stable_baselines3.common.callbacks.CheckpointCallback": {"save_freq": 1, "save_path": "/x"}}),
        ("callback", {"stable_baselines3.common.callbacks.EvalCallback": {"log_path": "/x"}}),
        ("callback", {"rl_zoo3.callbacks.SaveVecNormalizeCallback": {"save_freq": 1, "save_path": "/x"}}),
    ],
)
def test_a_file_does_not_say_which_files_are_written(key: str, entry: dict[str, dict[str, object]]) -> None:
    with pytest.raises(UnsafeConfigError, match=r"which file to write.*--trust"):
        resolve({key: [entry]})
    assert resolve({key: [entry]}, trust=True)[key] == [entry]


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


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [
        'a: !!bool "abc"',
        'a: !!timestamp "abc"',
        'a: !!int ""',
        'a: !!float "x"',
        "a: 2001-99-99",
        "a: 0x" + "f" * 17,
        "a: " + "9" * 5000,
        "a: " + "[" * 5000,
        "{a: " * 3000,
        "a: !!python/object/apply:collections.OrderedDict [[[[1], 2]]]",
        "a: !!python/object/apply:collections.OrderedDict [3]",
        "a: !!set [1]",
        "&a [*a]",
        "a: &a {b: *a}",
        "<<: 3",
        "a: =",
        "a: \x00",
        BOMB,
        "a: &a " + "x" * 10_000 + "\nb: [" + "*a, " * 1000 + "]",
        "x0: &x0 {k: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [{', '.join([f'*x{i - 1}'] * 10)}]}}\n" for i in range(1, 9)),
        "a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40,
        "a: 1\n" * 300_000,
    ],
)
def test_what_no_parser_takes_is_refused_with_the_name_of_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"config\.yml"):
        load_yaml(written(tmp_path, text))


@pytest.mark.parametrize("text", ["[1, 2]", "1", "", "{1: 2}", "{a: 1, 2001-01-01: 2}"])
def test_settings_have_names(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"config\.yml holds no settings"):
        load_settings(written(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["{[]: 1}", "{[1]}", "-" * 20_000 + "1", "-" * 9000 + "1", "(" * 300, "9" * 5000, "a." * 3000 + "b", "\ud800", "\x00"]
)
def test_expressions_that_no_parser_takes_are_refused_in_short(text: str) -> None:
    with pytest.raises(UnsafeConfigError) as error:
        parse_python(text)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("entry", [3, [["a.B", 3]], {"a.B": 1}, {"a.B": {1: 2}}, {"a.B": {}, "c.D": {}}, "TimeLimit"])
def test_entries_of_another_form_are_named(entry: object) -> None:
    with pytest.raises(ValueError, match=r"`env_wrapper`"):
        resolve({"env_wrapper": entry})
