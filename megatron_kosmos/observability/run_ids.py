"""The ids under which services know a run, kept in its folder so that a resumed run goes on there as the same."""

from pathlib import Path


def read_run_id(run_dir: Path, service: str) -> str | None:
    """Return the run's id at `service`; None where it has none yet."""
    try:
        return _path(run_dir, service).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def write_run_id(run_dir: Path, service: str, run_id: str) -> None:
    """Keep the id for the next start; the file is whole or absent."""
    path = _path(run_dir, service)
    unfinished = path.with_name(f".{path.name}.writing")
    unfinished.write_text(f"{run_id}\n", encoding="utf-8")
    unfinished.replace(path)


def _path(run_dir: Path, service: str) -> Path:
    return run_dir / f"{service}_run_id"
