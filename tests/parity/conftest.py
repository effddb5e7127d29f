"""Writes docs/fidelity.md from the figures of the parity tests: pytest tests/parity --fidelity docs/fidelity.md."""

from pathlib import Path

import pytest

from tests.parity.fidelity import Record, is_whole_folder

record_key = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fidelity", type=Path, metavar="PAGE", help="write the parity tests' figures into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[record_key] = Record()
    selects = config.option.keyword or config.option.markexpr or config.option.deselect
    if _page(config) is not None and (selects or not is_whole_folder(config.args, config.invocation_params.dir)):
        raise pytest.UsageError("--fidelity needs every parity test and no others: pytest tests/parity --fidelity PAGE")


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
