"""Calls that are given up."""

import threading

import pytest

from megatron_kosmos.engine.doctor.deadline import within


def test_a_call_that_never_ends_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        within(0.1, never.wait)
    never.set()


def test_result_and_error_arrive() -> None:
    assert within(60, max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        within(60, divmod, 1, 0)
