"""The table says what was held to a bound, and nothing else gets into it."""

from pathlib import Path

import pytest
import torch

from tests.parity.fidelity import BEGIN, END, Record, is_whole_folder

ONES = torch.ones(3)


def test_a_row_is_the_worst_of_its_comparisons() -> None:
    record = Record()
    for layout, error in (("one rank", 1e-8), ("TP2", 3e-7), ("TP2+SP", 2e-8)):
        record.of("oracle", "fp64", layout).values("logits", 2 * ONES.double() + error, 2 * ONES, 1e-6)
    record.of("another", "fp32").gradients({"weight": ONES}, {"weight": ONES}, 1e-6)
    lines = record.table().splitlines()[2:]
    assert lines == [
        "| another | gradients | fp32 | 0 | 1e-06 | 0 | 1 | one rank |",
        "| oracle | logits | fp64 | 1.5e-07 | 1e-06 | 3.0e-07 | 3 | TP2, TP2+SP, one rank |",
    ]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weight": ONES * 1.01}, "weight differs by 1.00e-02, more than 1e-06"),
        ({"weight": ONES * torch.nan}, "weight is not finite"),
        ({"weight": ONES[:2]}, "weight: "),
        ({"weight": ONES, "bias": ONES}, "bias"),
        ({}, "weight"),
    ],
    ids=["far", "not a number", "shape", "too many", "too few"],
)
def test_gradients_that_differ_are_refused(wrong: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Record().of("oracle", "fp64").gradients(wrong, {"weight": ONES}, 1e-6)


def test_nothing_is_no_comparison() -> None:
    with pytest.raises(AssertionError, match="nothing to compare"):
        Record().of("oracle", "fp64").gradients({"weight": 0 * ONES}, {"weight": 0 * ONES}, 1e-6)
    with pytest.raises(AssertionError, match="nothing to compare"):
        Record().of("oracle", "fp64").gradients({}, {}, 1e-6)


def test_the_gradient_of_a_key_bias_is_rounding_of_its_weights() -> None:
    expected = {"k_proj.weight": ONES, "k_proj.bias": 0 * ONES}
    comparison = Record().of("oracle", "fp64")
    comparison.gradients({"k_proj.weight": ONES, "k_proj.bias": 1e-8 * ONES}, expected, 1e-6)
    with pytest.raises(AssertionError, match=r"k_proj\.bias differs"):
        comparison.gradients({"k_proj.weight": ONES, "k_proj.bias": 1e-5 * ONES}, expected, 1e-6)


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    page, record = tmp_path / "page.md", Record()
    record.of("oracle", "fp64").values("logits", ONES, ONES, 1e-6)
    page.write_text(f"# Head\n{BEGIN}\nold\n{END}\ntail\n")
    record.write(page, "the command")
    text = page.read_text()
    assert text.startswith(f"# Head\n{BEGIN}\nWritten by `the command` on ")
    assert text.endswith(f"{record.table()}\n{END}\ntail\n")
    assert "old" not in text
    page.write_text("# No marks\n")
    with pytest.raises(ValueError, match="for the table to stand between"):
        record.write(page, "the command")


@pytest.mark.parametrize(
    "arguments, is_whole",
    [(["tests/parity"], True), (["tests/parity/test_xpos.py"], False), (["tests"], False), ([], False)],
)
def test_a_part_of_the_tests_makes_no_table(arguments: list[str], is_whole: bool) -> None:
    assert is_whole_folder(arguments, Path(__file__).parents[2]) == is_whole
