"""Writes docs/fidelity.md from the figures of the parity tests: pytest tests/parity --fidelity docs/fidelity.md."""

from pathlib import Path

import pytest

from tests.parity.fidelity import Record, is_whole_folder

record_key = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fidelity", type=Path, metavar="PAGE", help="write the parity tests' figures into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[record_key] = Record()
    option = config.option
    selects = option.keyword or option.markexpr or option.deselect
    is_spread = getattr(option, "numprocesses", None)  # by pytest-xdist: each process would know its own figures alone
    is_whole = is_whole_folder(config.args, config.invocation_params.dir) and not selects and not is_spread
    if _page(config) is not None and not is_whole:
        raise pytest.UsageError(
            "--fidelity needs every parity test, no others, and one process: pytest tests/parity --fidelity PAGE"
        )


@pytest.fixture
def fidelity(request: pytest.FixtureRequest) -> Record:
    """Where a parity test enters what it compares."""
    return request.config.stash[record_key]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page, unless a test failed: the figures would not be the ones that hold."""
    page = _page(session.config)
    if page is not None and exitstatus == pytest.ExitCode.OK:
        session.config.stash[record_key].write(page, f"pytest tests/parity --fidelity {page}")


def _page(config: pytest.Config) -> Path | None:
    page: Path | None = config.getoption("fidelity", None)
    return page
