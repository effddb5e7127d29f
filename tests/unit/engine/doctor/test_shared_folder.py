"""Tokens in real folders: one that both nodes have, and two that aren't the same."""

from pathlib import Path

from megatron_kosmos.engine.doctor.shared_folder import SharedFolder


def test_nodes_with_one_folder_see_each_other_and_leave_nothing(tmp_path: Path) -> None:
    first, second = (SharedFolder(tmp_path / "runs" / "a", timeout_seconds=60) for _ in range(2))
    tokens = [first.leave_token(0), second.leave_token(1)]
    assert all(told.free_bytes > 0 and not told.error for told in tokens)
    assert first.unseen([tokens[1].token]) == second.unseen([tokens[0].token]) == []
    second.clear(tokens[1].token, with_others=False)
    first.clear(tokens[0].token, with_others=True)
    assert list(tmp_path.iterdir()) == []


def test_nodes_with_folders_of_their_own_dont_see_each_other(tmp_path: Path) -> None:
    first, second = SharedFolder(tmp_path / "a", timeout_seconds=0.1), SharedFolder(tmp_path / "b", timeout_seconds=60)
    first.leave_token(0)
    token = second.leave_token(1).token
    assert first.unseen([token]) == [token]


def test_a_run_that_is_there_is_left_as_it_was(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoints" / "step_00000010" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(1000))
    folder = SharedFolder(tmp_path, timeout_seconds=60)
    left = folder.leave_token(0)
    assert left.held_bytes == 1000
    folder.clear(left.token, with_others=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert weights.stat().st_size == 1000


def test_a_folder_that_cant_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = SharedFolder(tmp_path / "file" / "run", timeout_seconds=60).leave_token(0)
    assert str(tmp_path / "file") in told.error
    assert told.token == ""
