"""`kosmos generate` on the processes that torchrun starts: one answer, one message, one end."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_kosmos.cli.main import build_app
from megatron_kosmos.engine import parallel_generation as _imported_before_ranks_are_forked  # noqa: F401
from megatron_kosmos.engine.generate import Decoding, Generator
from tests.distributed.harness import free_port
from tests.unit.engine.exported import exported_folder, picture

pytestmark = pytest.mark.distributed

RANKS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, its export, a picture and prompts; the run's tokenizer has been moved."""
    root = tmp_path_factory.mktemp("root")
    exported_folder(root)
    (root / "tokenizer").rename(root / "moved")
    picture(0).save(root / "0.png")
    (root / "prompts.jsonl").write_text(
        '{"prompt": "An image of", "images": ["0.png"], "id": "a"}\n{"prompt": "Words and numbers"}\n'
    )
    return root


def fork_rank(arguments: list[str], rank: int, port: int, output: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(output / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - pytest's are caught
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
        os.environ.update(LOCAL_RANK=str(rank))
        torch.set_num_threads(1)
        build_app()(["generate", *arguments], standalone_mode=False)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        print("" if isinstance(error.code, int) else error.code, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kosmos_generate(output: Path, *arguments: object) -> tuple[list[int], list[str], str]:
    """Run the command on all ranks; return their exit codes, what each printed, and what all said of errors."""
    output.mkdir()
    port = free_port()
    ranks = [fork_rank(list(map(str, arguments)), rank, port, output) for rank in range(RANKS)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    printed, errors = ([(output / f"{rank}.{stream}").read_text() for rank in range(RANKS)] for stream in (1, 2))
    return codes, printed, "".join(errors)


def test_the_first_process_prints_what_one_alone_would(root: Path, tmp_path: Path) -> None:
    (expected,) = Generator.load(root / "hf").generate(["seven"], decoding=Decoding(6))
    options = ["--model", root / "run", "--tokenizer", root / "moved", "--prompt", "seven", "--max-new-tokens", 6]
    for name, stream in {"whole": [], "stream": ["--stream"]}.items():
        codes, printed, errors = kosmos_generate(tmp_path / name, *options, *stream)
        assert codes == [0, 0], errors
        assert printed == [expected + "\n", ""]


def test_the_first_process_writes_the_answers(root: Path, tmp_path: Path) -> None:
    lines = ["--tokenizer", root / "moved", "--prompts", root / "prompts.jsonl", "--max-new-tokens", 5]
    codes, printed, errors = kosmos_generate(
        tmp_path / "ranks", "--model", root / "run", *lines, "--output", tmp_path / "answers"
    )
    assert (codes, printed) == ([0, 0], ["", ""]), errors
    texts = Generator.load(root / "hf").generate(
        ["An image of", "Words and numbers"], [[root / "0.png"], []], Decoding(5)
    )
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [answer["text"] for answer in answers] == texts


@pytest.mark.parametrize(
    ("model", "prompt", "message"),
    [("run", "one <image>", "1 <image> for 0 image(s)"), ("hf", "seven", "generates in one process, without torchrun")],
)
def test_an_error_ends_all_with_one_message(model: str, prompt: str, message: str, root: Path, tmp_path: Path) -> None:
    codes, printed, errors = kosmos_generate(
        tmp_path / "ranks", "--model", root / model, "--tokenizer", root / "moved", "--prompt", prompt
    )
    assert (codes, printed) == ([1, 1], ["", ""])
    assert errors.count("kosmos generate: ") == errors.count(message) == 1
    assert "Traceback" not in errors
