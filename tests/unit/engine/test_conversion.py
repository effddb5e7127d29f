"""Where a conversion's output goes: at once or not at all, and over nothing that should stay."""

import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from megatron_kosmos.engine.conversion import (
    MAX_ABS_LOGIT_DIFF,
    ConversionError,
    ConversionReport,
    new_folder,
    refuse_existing,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(output: Path, content: str, overwrite: bool = False) -> None:
    with new_folder(output, overwrite) as writing:
        (writing / "file").write_text(content)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="directory"), new_folder(tmp_path / "out", False) as writing:
        writing.write_text("not a file")
    assert names_in(tmp_path) == []
    fill(tmp_path / "out", "new")
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("output", ["run", ".", "run/checkpoints", "run/checkpoints/step_1", "link"])
def test_an_output_that_is_or_holds_an_input_is_refused(output: str, tmp_path: Path) -> None:
    """Replacing it would remove what is converted."""
    source = tmp_path / "run" / "checkpoints" / "step_1"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(ConversionError, match=r"step_1, which is to be converted|is a link"):
        refuse_existing(tmp_path / output, True, Path("/elsewhere"), source)
    assert source.is_dir()


@pytest.mark.parametrize(("difference", "passes"), [(9e-5, True), (1.1e-4, False), (math.nan, False), (None, True)])
def test_the_gate_lets_rounding_pass_alone(difference: float | None, passes: bool) -> None:
    report = ConversionReport("here", 0, 1, "float32", difference, MAX_ABS_LOGIT_DIFF, "1")
    with nullcontext() if passes else pytest.raises(ConversionError, match="nothing was put in place"):
        report.check()


def test_an_output_inside_its_input_or_beside_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for output in ("run/hf", "run2", "ru"):
        refuse_existing(tmp_path / output, True, tmp_path / "run")


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_folder_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "dangling", "link"):
        with pytest.raises(ConversionError, match=rf"{name} (exists|is a link|is a file)"):
            refuse_existing(tmp_path / name, overwrite)


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    precious = tmp_path / "out" / "precious"
    with pytest.raises(ConversionError, match="exists"), new_folder(tmp_path / "out", overwrite=False):
        precious.mkdir(parents=True)
    assert names_in(tmp_path) == ["out"]
    assert names_in(tmp_path / "out") == ["precious"]


def kill_amid_the_exchange(output: Path) -> None:
    """Die when the old folder has been put aside and the new one has no name yet."""
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def rename_and_die(self: Path, target: Path) -> Path:
            renamed = rename(self, target)
            if self == output:
                os.kill(os.getpid(), signal.SIGKILL)
            return renamed

        Path.rename = rename_and_die  # type: ignore[method-assign,assignment]
        fill(output, "second", overwrite=True)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_conversion_that_was_killed_hinders_none_after_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    fill(output, "first")
    kill_amid_the_exchange(output)
    assert names_in(tmp_path) == [".out.replaced", ".out.writing"]
    fill(output, "third", overwrite=True)
    assert (tmp_path / ".out.replaced" / "file").read_text() == "first"  # no one has replaced that
    fill(output, "fourth", overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert (output / "file").read_text() == "fourth"
