"""The commands of the pages on data are legal ones, and the way from OBELICS with addresses to a corpus works."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import typer
import yaml
from pyarrow import parquet

from benchmarks import losses_by_source
from megatron_kosmos.cli import inspect, preprocess, tokenizer, train
from megatron_kosmos.config import CorpusConfig, load_config
from megatron_kosmos.data.filters import Filters
from megatron_kosmos.data.preparation.preprocess import Preparation, prepare
from megatron_kosmos.data.sources.input_format import InputFormat
from tools import fetch_debian_corpora, obelics_images

ROOT = Path(__file__).parents[3]
PAGE = "".join((ROOT / "docs" / name).read_text() for name in ("data.md", "debian_corpora.md"))
COMMANDS = [
    line
    for block in re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(".venv/")
]


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    """Every command of the page, by the words that it begins with."""
    app, obelics = typer.Typer(), typer.Typer()
    preprocess.register(app)
    tokenizer.register(app)
    inspect.register(app)
    train.register(app)
    app.command("fetch")(fetch_debian_corpora.main)
    app.command("losses")(losses_by_source.main)
    obelics_images.register(obelics)
    kosmos, obelics_commands = typer.main.get_command(app), typer.main.get_command(obelics)
    assert isinstance(kosmos, typer.core.TyperGroup)
    assert isinstance(obelics_commands, typer.core.TyperGroup)
    tokenizers, inspections = kosmos.commands["tokenizer"], kosmos.commands["inspect"]
    preparations = kosmos.commands["preprocess"]
    assert isinstance(tokenizers, typer.core.TyperGroup)
    assert isinstance(inspections, typer.core.TyperGroup)
    assert isinstance(preparations, typer.core.TyperGroup)
    return {
        "tools/fetch_debian_corpora.py": kosmos.commands["fetch"],
        "benchmarks/losses_by_source.py": kosmos.commands["losses"],
        ".venv/bin/kosmos inspect data": inspections.commands["data"],
        ".venv/bin/kosmos train": kosmos.commands["train"],
        **{f"tools/preprocess_data.py {name}": command for name, command in preparations.commands.items()},
        **{f"tools/obelics_images.py {name}": command for name, command in obelics_commands.commands.items()},
        **{f".venv/bin/kosmos tokenizer {name}": command for name, command in tokenizers.commands.items()},
    }


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_legal(commands: dict[str, Any], line: str) -> None:
    line = line.removeprefix(".venv/bin/python ")
    line = line.replace("$SLURM_ARRAY_TASK_ID", "0").replace("$SLURM_ARRAY_TASK_COUNT", "32")
    (beginning,) = (beginning for beginning in commands if line.startswith(f"{beginning} "))
    context = commands[beginning].make_context(beginning, shlex.split(line.removeprefix(beginning)))
    if "preprocess" in beginning:
        folder = context.params.get("tokenizer")
        places = {(base, base / "tokenizer") for base in (Path("data"), Path("data/debian"))}
        assert folder is None or (context.params["output"].parent, folder) in places
        assert str(context.params["output"]).startswith("data/")
    elif context.params.get("config"):
        load_config([ROOT / file for file in context.params["config"]], context.params["overrides"] or [])


def test_the_page_has_every_kind_of_command() -> None:
    assert len(COMMANDS) > 15
    for kind in preprocess.KINDS:
        assert any(f"preprocess_data.py {kind} " in command for command in COMMANDS)


def test_the_yaml_of_the_page_is_legal() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    corpora = [CorpusConfig.model_validate(entry) for entry in yaml.safe_load(block)["data"]["train"]]
    assert {corpus.kind for corpus in corpora} == {"text", "caption", "interleaved"}
    assert all(any(f"--output {corpus.prefix} " in command for command in COMMANDS) for corpus in corpora)


def test_the_page_prepares_what_the_debian_run_reads() -> None:
    blend = load_config([ROOT / "configs" / "kosmos_tiny.yaml", ROOT / "configs" / "data" / "debian.yaml"])
    row_format = f"--sequence-length {blend.data.sequence_length} --num-latents {blend.model.resampler.num_latents}"
    for corpus in blend.data.train:
        (command,) = [command for command in COMMANDS if f"--output {corpus.prefix} " in command]
        assert row_format in " ".join(command.split())
    vocabulary = f"--output {blend.data.tokenizer} --vocab-size {blend.model.decoder.vocab_size}"
    assert any(vocabulary in command for command in COMMANDS)


def test_obelics_from_addresses_to_a_corpus(
    picture: Callable[..., bytes], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = "https://example.org/a.png", "https://example.org/b"
    documents = [
        {"images": [None, a, None, b], "texts": ["one", None, "two", None], "metadata": "[]"},
        {"images": [a, None], "texts": [None, "three"], "metadata": "[]"},
    ]
    shard = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(documents), shard)
    obelics_images.addresses([shard], output=tmp_path / "addresses.parquet")
    assert capsys.readouterr().out.startswith("2 addresses in ")
    assert parquet.read_table(tmp_path / "addresses.parquet").to_pylist() == [{"url": a}, {"url": b}]

    downloads = tmp_path / "downloads"
    (downloads / "00000").mkdir(parents=True)
    (downloads / "00000" / "000000000.jpg").write_bytes(picture(file_format="JPEG"))
    listing = {"url": [a, b], "key": ["000000000", "000000001"], "status": ["success", "failed_to_download"]}
    parquet.write_table(pyarrow.table(listing), downloads / "00000.parquet")
    obelics_images.paths([shard], downloads=downloads, output=tmp_path / "local")
    assert capsys.readouterr().out.startswith("2 of 3 pictures are in ")

    preparation = Preparation(
        "interleaved",
        (tmp_path / "local" / shard.name,),
        tmp_path / "obelics",
        tokenizer_folder,
        filters=Filters(drop_unusable_images=True),
        input_format=InputFormat(image_folder=downloads),
    )
    manifest = prepare(preparation)
    assert (manifest.documents, manifest.images, manifest.dropped_images) == (2, 2, {"remote_image": 1})


def test_a_folder_without_downloads(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="no picture in"):
        obelics_images.paths([], downloads=tmp_path, output=tmp_path / "local")
