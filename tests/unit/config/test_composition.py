"""A run out of several YAML files: each changes what the ones before it say."""

from pathlib import Path

import pytest

from megatron_kosmos.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = CONFIGS / "kosmos_tiny.yaml"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.yaml"
    path.write_text("training: {steps: 600}\ndata: {train: [{kind: caption, prefix: there}]}\n")
    return path


def test_mappings_merge_and_lists_are_replaced(other: Path) -> None:
    alone, run = load_config(TINY), load_config([TINY, other], ["training.seed=9"])
    assert (run.training.steps, run.training.seed) == (600, 9)
    assert [corpus.prefix for corpus in run.data.train] == [Path("there")]
    assert run.training.global_batch_size == alone.training.global_batch_size
    assert (run.model, run.data.heldout) == (alone.model, alone.data.heldout)
    assert load_config([other, TINY]) == alone


@pytest.mark.parametrize(
    "content, message",
    [
        ("training: {stepz: 3}", r"tiny\.yaml and .*other\.yaml: 1 problem\(s\)\n  training\.stepz: Extra inputs"),
        ("- 1", r"tiny\.yaml and .*other\.yaml: "),
        ("a: [1", r"other\.yaml is not valid YAML"),
    ],
)
def test_a_bad_second_file_is_a_config_error(other: Path, content: str, message: str) -> None:
    other.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config([TINY, other])


def test_debian_s_corpora_go_with_the_small_preset() -> None:
    run = load_config([TINY, CONFIGS / "data" / "debian.yaml"])
    assert {corpus.kind for corpus in run.data.train} == {"text", "caption", "interleaved"}
    heldout = {(corpus.prefix, corpus.heldout_fraction) for corpus in run.data.heldout}
    assert heldout == {(corpus.prefix, corpus.heldout_fraction) for corpus in run.data.train}


def test_kosmos1_has_the_paper_s_tokens_and_text_weights() -> None:
    """arXiv 2302.14045: 0.5, 0.5 and 0.2 million tokens a step, and the percentages of the text corpora."""
    percentages = {
        "openwebtext2": 21.8,
        "cc_2021_04": 17.7,
        "books3": 16.2,
        "cc_2020_50": 14.7,
        "pile_cc": 10.6,
        "realnews": 10.2,
        "wikipedia": 5.4,
        "bookcorpus2": 1.1,
        "pg19": 1.0,
        "cc_stories": 1.0,
        "nih_exporter": 0.2,
    }
    corpora = load_config(CONFIGS / "kosmos1.yaml").data.train
    shares = {corpus.prefix.name: corpus.weight / 0.5 * 100 for corpus in corpora if corpus.kind == "text"}
    assert shares == pytest.approx(percentages)
    sums = {
        kind: sum(corpus.weight for corpus in corpora if corpus.kind == kind)
        for kind in ("text", "caption", "interleaved")
    }
    assert sums == pytest.approx({"text": 0.5, "caption": 0.5, "interleaved": 0.2}, rel=2e-3)
