"""A configuration that cannot run stops at once, with the field, its value and what is legal."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_kosmos.config import ConfigError, RunConfig, find_run_dir, load_config, parse_config, save_config

PRESETS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def values(**changes: object) -> dict[str, Any]:
    """Return a small legal configuration with `section__field=value` changes."""
    tree: dict[str, Any] = {
        "run_dir": "runs/test",
        "model": {
            "decoder": {
                "num_layers": 4,
                "width": 64,
                "ffn_width": 128,
                "num_heads": 8,
                "vocab_size": 500,
                "vocab_multiple": 64,
                "max_sequence_length": 64,
            },
            "vision": {
                "width": 32,
                "ffn_width": 64,
                "num_layers": 2,
                "num_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
            "resampler": {"kind": "perceiver", "num_latents": 8},
        },
        "parallel": {},
        "training": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
        "data": {"tokenizer": "tokenizer", "sequence_length": 64, "train": [{"kind": "text", "prefix": "text"}]},
        "logging": {},
        "checkpoint": {},
    }
    for path, value in changes.items():
        *sections, field = path.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[field] = value
    return tree


def config(**changes: object) -> RunConfig:
    return parse_config(values(**changes), "test.yaml")


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values()))
    return path


def test_unset_fields_have_their_defaults() -> None:
    assert config().parallel.zero_stage == 1
    assert config().training.precision == "bf16"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_a_round_trip(preset: Path, tmp_path: Path) -> None:
    loaded = load_config(preset)
    save_config(loaded, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == loaded


def test_there_are_presets() -> None:
    assert {"kosmos_tiny"} <= {preset.stem for preset in PRESETS}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"run_dirs": "x"}, "run_dirs: Extra inputs are not permitted"),
        ({"model__decoder__layers": 3}, r"model\.decoder\.layers: Extra inputs are not permitted \(got 3\)"),
        (
            {"model__resampler": {"kind": "cross_attention", "depth": 2}},
            r"model\.resampler\.depth: Extra inputs are not permitted",
        ),
        (
            {"model__resampler": {"kind": "perceiver", "depth": 0}},
            r"  model\.resampler\.depth: Input should be greater",
        ),
        ({"training__steps": "5"}, r"training\.steps: .*valid integer \(got '5'\)"),
        ({"training__steps": 5.0}, r"training\.steps: .*valid integer \(got 5\.0\)"),
        ({"training__steps": True}, r"training\.steps: .*valid integer \(got True\)"),
        ({"training__steps": None}, r"training\.steps: .*valid integer \(got None\)"),
        ({"parallel__sequence_parallel": 1}, r"parallel\.sequence_parallel: .*valid boolean \(got 1\)"),
        ({"optimizer__learning_rate": float("inf")}, r"optimizer\.learning_rate: .*finite number"),
        ({"optimizer__learning_rate": float("nan")}, r"optimizer\.learning_rate: .*finite number"),
        ({"run_dir": 3}, r"run_dir: .*valid string \(got 3\)"),
        ({"training__steps": 0}, r"training\.steps: .*greater than 0 \(got 0\)"),
        ({"parallel__zero_stage": 4}, r"parallel\.zero_stage: Input should be 0, 1, 2 or 3 \(got 4\)"),
        ({"training__precision": "fp16"}, r"training\.precision: Input should be 'fp32' or 'bf16' \(got 'fp16'\)"),
        ({"model__decoder__dropout": 1.0}, r"model\.decoder\.dropout: .*less than 1 \(got 1\.0\)"),
        ({"optimizer__betas": [0.9, 1.0]}, r"optimizer\.betas\.1: .*less than 1"),
        ({"data__train": []}, "data: train is empty"),
        ({"data__train": [{"kind": "video", "prefix": "p"}]}, r"data\.train\.0\.kind: .*'text', 'caption' or 'interl"),
    ],
)
def test_an_unknown_key_or_a_wrong_value_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize("section, field", [("training", "steps"), ("optimizer", "learning_rate"), ("data", "train")])
def test_a_missing_field_is_named(section: str, field: str) -> None:
    tree = values()
    del tree[section][field]
    with pytest.raises(ConfigError, match=rf"test\.yaml: 1 problem\(s\)\n  {section}\.{field}: Field required$"):
        parse_config(tree, "test.yaml")


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2 problem\(s\)") as caught:
        config(training__steps=0, parallel__zero_stage=9)
    assert "training.steps" in str(caught.value)
    assert "parallel.zero_stage" in str(caught.value)


VPP = {"parallel__pipeline_parallel_size": 2, "parallel__virtual_pipeline_parallel_size": 2}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel__context_parallel_size": 2}, "context_parallel_size=2 is not supported; use 1"),
        ({"parallel__zero_stage": 2, "parallel__pipeline_parallel_size": 2}, "zero_stage=2 .* use zero_stage 0 or 1"),
        ({"parallel__zero_stage": 3, "parallel__pipeline_parallel_size": 2}, "zero_stage=3 .* use zero_stage 0 or 1"),
        ({"parallel__sequence_parallel": True}, "sequence_parallel=true needs tensor_parallel_size > 1"),
        ({"parallel__virtual_pipeline_parallel_size": 2}, "=2 needs pipeline_parallel_size > 1"),
        (VPP | {"parallel__batch_p2p": True}, "use batch_p2p=false"),
        ({"parallel__tensor_parallel_size": 16}, r"num_heads=8 is not a multiple of parallel\.tensor_parallel_size=16"),
        (
            {"parallel__tensor_parallel_size": 4, "model__decoder__ffn_width": 130},
            r"ffn_width=130 is not a multiple of parallel\.tensor_parallel_size=4",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "model__decoder__vocab_multiple": 65},
            r"vocab_multiple=65 is not a multiple of parallel\.tensor_parallel_size=2",
        ),
        (
            {
                "parallel__tensor_parallel_size": 4,
                "model__decoder__width": 96,
                "model__decoder__num_heads": 12,
                "model__decoder__num_query_groups": 3,
            },
            r"num_query_groups=3 and parallel\.tensor_parallel_size=4: one must be a multiple of the other",
        ),
        (
            {
                "parallel__tensor_parallel_size": 8,
                "model__decoder__width": 16,
                "model__decoder__num_query_groups": 1,
            },
            r"the 20 rows of queries, keys and values, \(num_heads=8 \+ 2 x num_query_groups=1\) x head size 2",
        ),
        (
            {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True, "data__sequence_length": 63},
            r"data\.sequence_length=63 is not a multiple",
        ),
        ({"model__decoder__width": 60}, "width=60 is not a multiple of num_heads=8"),
        ({"model__decoder__num_query_groups": 3}, "num_heads=8 is not a multiple of num_query_groups=3"),
        ({"model__decoder__width": 72}, "xpos rotates pairs: width/num_heads=9 must be even"),
        ({"model__vision__image_size": 30}, "image_size=30 is not a multiple of patch_size=8"),
        ({"model__vision__width": 30}, "width=30 is not a multiple of num_heads=4"),
        ({"optimizer__groups": [{"parameters": []}]}, "groups.0.parameters is empty"),
        ({"model__resampler__num_latents": 62}, "max_sequence_length=64 holds no image"),
        ({"data__sequence_length": 65}, r"data\.sequence_length=65 exceeds model\.decoder\.max_sequence_length=64"),
        ({"data__sequence_length": 10}, r"data\.sequence_length=10 holds no image"),
        ({"parallel__pipeline_parallel_size": 8}, "num_layers=4 cannot be cut into 8 chunks"),
        ({"parallel__chunk_layers": [2, 2]}, r"chunk_layers=\[2, 2\] must be 1 numbers"),
        (VPP | {"parallel__chunk_layers": [1, 1, 1, 2]}, r"add up to model\.decoder\.num_layers=4"),
        (VPP | {"parallel__chunk_layers": [0, 1, 1, 2]}, "every chunk needs a layer"),
        ({"optimizer__min_learning_rate": 1.0}, r"min_learning_rate=1\.0 exceeds learning_rate=0\.001"),
        ({"parallel__zero_stage": 0}, r"zero_stage=0 keeps no fp32 masters beside training\.precision=bf16; use"),
        ({"optimizer__warmup_steps": 11}, r"optimizer\.warmup_steps=11 exceeds training\.steps=10"),
    ],
)
def test_an_illegal_combination_is_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__zero_stage": 3, "parallel__tensor_parallel_size": 4, "parallel__sequence_parallel": True},
        VPP | {"parallel__chunk_layers": [1, 1, 1, 1], "parallel__zero_stage": 1},
        {"parallel__pipeline_parallel_size": 2, "parallel__chunk_layers": [1, 3], "parallel__batch_p2p": True},
        {"model__decoder__num_query_groups": 1, "parallel__tensor_parallel_size": 4},
        {"model__decoder__width": 72, "model__decoder__xpos": False},
        {"optimizer__groups": [{"parameters": ["vision_tower.*"], "frozen": True}]},
        {"parallel__zero_stage": 0, "training__precision": "fp32"},
    ],
)
def test_legal_combinations_pass(changes: dict[str, object]) -> None:
    config(**changes)


def test_the_ranks_must_fit_layout_and_batch() -> None:
    run = config(parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2)
    assert run.data_parallel_size(8) == 2
    assert run.num_microbatches(8) == 2
    with pytest.raises(ConfigError, match=r"6 processes cannot be cut into .* start a multiple of 4"):
        run.data_parallel_size(6)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=8 .*\.micro_batch_size=2 x 3 data-parallel"):
        run.data_parallel_size(12)


def test_the_interleaved_schedule_needs_whole_rounds_of_microbatches() -> None:
    run = config(**VPP, training__global_batch_size=6)
    with pytest.raises(ConfigError, match=r"multiples of .*=2, not 3; change training\.global_batch_size"):
        run.data_parallel_size(2)


def test_vocabulary_is_padded_to_one_shape_for_every_tensor_parallel_size() -> None:
    assert config().model.decoder.padded_vocab_size == 512
    assert config(model__decoder__vocab_size=512).model.decoder.padded_vocab_size == 512


def test_a_configuration_does_not_change() -> None:
    run = config()
    with pytest.raises(ValidationError, match="frozen"):
        run.training.steps = 3


def test_overrides_apply_in_order_and_are_typed(yaml_file: Path) -> None:
    run = load_config(yaml_file, ["training.steps=5", "training.steps=7", "optimizer.betas=[0.8,0.9]", "run_dir=x"])
    assert run.training.steps == 7
    assert run.optimizer.betas == (0.8, 0.9)
    assert run.run_dir == Path("x")


def test_an_override_reads_numbers_as_the_file_does(yaml_file: Path) -> None:
    run = load_config(yaml_file, ["optimizer.learning_rate=1e-4", "optimizer.epsilon=1.5E-7", "run_dir=2026-01-02"])
    assert (run.optimizer.learning_rate, run.optimizer.epsilon, run.run_dir) == (1e-4, 1.5e-7, Path("2026-01-02"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.steps", "override 'training.steps' is not of the form a.b=c"),
        ("training.stepz=3", r"training\.stepz: Extra inputs are not permitted"),
        ("training.steps=three", r"training\.steps: .*\(got 'three'\)"),
        ("training=3", r"run\.yaml with training=3: 1 problem\(s\)\n  training: .*object \(got 3\)"),
        ("data.train=text", r"data\.train: "),
        ("run_dir=${nowhere}", "nowhere"),
    ],
)
def test_a_bad_override_is_a_config_error(yaml_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file, [override])


@pytest.mark.parametrize("content", ["a: [1, 2", "- 1\n- 2\n", "just text", "", "\xff\xfe"])
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(path)


@pytest.mark.parametrize("path", ["missing.yaml", "."])
def test_a_path_that_is_no_file_is_a_config_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path / path)


def test_the_folder_of_a_run_is_known_though_its_configuration_is_bad(tmp_path: Path) -> None:
    """A script that started it looks there for how it ended."""
    one, two, broken = (tmp_path / name for name in ("one.yaml", "two.yaml", "broken.yaml"))
    one.write_text("run_dir: runs/one\ntraining: {steps: many}\n")
    two.write_text("trainin: {}\n")
    broken.write_text("run_dir: [\n")
    assert find_run_dir([one, two, broken]) == Path("runs/one")
    assert find_run_dir([one], ["run_dir=a", "training.steps=x", "run_dir=b"]) == Path("b")
    assert find_run_dir([two, broken, tmp_path / "nowhere.yaml"], ["training.steps"]) is None
