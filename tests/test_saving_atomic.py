"""A file is written whole or not at all, and what went wrong is said."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from gymnasium import spaces

from sb3_diffrl import NCLQL
from sb3_diffrl.saving import atomic_file

from .envs import RandomEnv, box_env


def in_child(work: Callable[[], None]) -> int:
    """Do something in a forked process.

    :return: its exit status: 0 if ``work()`` returned, 1 if it raised
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write(path: Path, content: bytes) -> None:
    with atomic_file(path, "zip") as file:
        file.write(content)


def test_a_file_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write(tmp_path / "model", content)
        assert (tmp_path / "model.zip").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "model.zip").symlink_to(tmp_path / "there" / "model.zip")
    write(tmp_path / "model.zip", b"new")
    assert (tmp_path / "model.zip").is_symlink()
    assert (tmp_path / "there" / "model.zip").read_bytes() == b"new"


def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    write(tmp_path / "model.zip", b"one")
    for mode in (0o600, 0o640):
        (tmp_path / "model.zip").chmod(mode)
        write(tmp_path / "model.zip", b"two")
        assert (tmp_path / "model.zip").stat().st_mode & 0o777 == mode


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe.zip").read_bytes()))
    reader.start()
    write(tmp_path / "pipe.zip", b"content")
    reader.join(10)
    assert received == [b"content"]
    assert (tmp_path / "pipe.zip").is_fifo()


@pytest.mark.parametrize("name", ["a" * 250, "\u6a21" * 80, "\u6a21" * 83])
def test_names_as_long_as_the_system_allows_are_written(name: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}.zip", b"content")
    assert (tmp_path / f"{name}.zip").read_bytes() == b"content"


def test_folders_are_made_and_not_overwritten(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        write(tmp_path / "a" / "b" / "model", b"")
    (tmp_path / "run.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        write(tmp_path / "run.zip", b"beside")
    assert (tmp_path / "run.zip_2").read_bytes() == b"beside"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_interrupts_leaves_the_former_file(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "model.zip", b"former")

    def interrupted() -> None:
        with atomic_file(tmp_path / "model.zip", "zip") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "model.zip").read_bytes() == b"former"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_leaves_the_former_file(tmp_path: Path) -> None:
    write(tmp_path / "model.zip", b"former")

    def killed() -> None:
        with atomic_file(tmp_path / "model.zip", "zip") as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / "model.zip").read_bytes() == b"former"
    assert [path.name for path in tmp_path.glob("*.zip")] == ["model.zip"]


def test_a_full_disk_is_named_and_leaves_the_former_model(tmp_path: Path) -> None:
    model = NCLQL("MlpPolicy", box_env(), policy_kwargs={"net_arch": [8]}, device="cpu")
    model.save(tmp_path / "model")
    former = (tmp_path / "model.zip").read_bytes()

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond 4 kB
        with pytest.raises(OSError, match=r"too large\. Nothing was saved, and a former file is as it was.*model.zip"):
            model.save(tmp_path / "model")
        with pytest.raises(OSError, match="Nothing was saved"):
            model.save_replay_buffer(tmp_path / "buffer")
        with pytest.raises(OSError, match="Nothing was saved"):
            model.policy.save(tmp_path / "policy")

    assert in_child(save) == 0
    assert (tmp_path / "model.zip").read_bytes() == former
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    NCLQL.load(tmp_path / "model", device="cpu")


def read_only_folder(folder: Path) -> Path:
    folder.chmod(0o555)
    return Path("/sys") if os.geteuid() == 0 else folder  # permissions do not bind root


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    folder = read_only_folder(tmp_path)
    model = NCLQL("MlpPolicy", box_env(), policy_kwargs={"net_arch": [8]}, device="cpu")
    with pytest.raises(OSError, match=rf"Nothing was saved.*{folder}/model\.zip"):
        model.save(folder / "model")


def test_an_unwritable_log_folder_stops_before_training(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)))
    model = NCLQL("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu", tensorboard_log=str(tmp_path / "logs" / "run"))
    with pytest.raises(OSError, match=r"logs/run"):
        model.learn(100)
    assert env.steps == 0
    assert model.num_timesteps == 0


def test_two_writers_leave_one_whole_file(tmp_path: Path) -> None:
    contents = [bytes([i]) * 200_000 for i in (1, 2)]

    def writer(content: bytes) -> Callable[[], None]:
        def work() -> None:
            for _ in range(50):
                write(tmp_path / "model.zip", content)

        return work

    children = []
    for content in contents:
        child = os.fork()
        if child == 0:
            writer(content)()
            os._exit(0)
        children.append(child)
    seen = set()
    while children:
        if (tmp_path / "model.zip").exists():
            seen.add((tmp_path / "model.zip").read_bytes())
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    assert seen
    assert seen <= set(contents)
