"""A thread that ends a rank which makes no progress, so that whoever started the job can start it again.

The ranks of a run hear of each other through files in `run_dir/hang`, which need no process to be well: each writes
where it is every few seconds, and the first to give up leaves `alarm` there. Then each that still can writes its
stacks, sees who wrote none or is behind the others, and ends with `EXIT_CODE`. Files of earlier starts bear another
number and are passed over.
"""

import faulthandler
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Final

from megatron_kosmos.observability.hang_report import RankReport, verdict
from megatron_kosmos.observability.heartbeat import PATIENCE, Heartbeat

logger = logging.getLogger(__name__)

EXIT_CODE: Final = os.EX_SOFTWARE
"""70: what a rank ends with that its watchdog has ended."""
LONGEST_PERIOD: Final = 5.0
"""Seconds between looks at the heartbeat, and between two words to the others; less for a short limit."""
REPORT_SECONDS: Final = 60.0
"""How long writing down what is known may take, where the disk itself may be what hangs."""


class Watchdog:
    """Watches one rank's `heartbeat`: the same place for longer than `seconds` ends the process (0: nothing does).

    Slow phases get `PATIENCE` times as long. Time in which this process was stopped as a whole (a suspended job) does
    not count.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float, heartbeat: Heartbeat) -> None:
        self.folder, self.rank, self.seconds, self.heartbeat = run_dir / "hang", rank, seconds, heartbeat
        self.period = min(LONGEST_PERIOD, seconds / 10)
        self._start_number, self._num_ranks = 0, 1
        self._is_joined, self._alarm = Event(), Event()

    def start(self) -> None:
        """Begin to watch, until the process ends."""
        if self.seconds:
            Thread(target=self._watch, name="watchdog", daemon=True).start()
            Thread(target=self._talk, name="watchdog files", daemon=True).start()

    def join(self, start_number: int, num_ranks: int) -> None:
        """From now on hear the others, which know the same number of this start."""
        self._start_number, self._num_ranks = start_number, num_ranks
        self._is_joined.set()

    def _watch(self) -> None:
        """Count the time at one place. Touches no files: one that hangs must not keep it."""
        place, idle, last = self.heartbeat.place, 0.0, time.monotonic()
        while idle <= self.seconds * (PATIENCE if place.is_slow else 1) and not self._alarm.is_set():
            time.sleep(self.period)
            now = time.monotonic()
            idle, last = idle + min(now - last, 2 * self.period), now
            if self.heartbeat.place is not place:
                place, idle = self.heartbeat.place, 0.0
        try:
            reporting = Thread(target=self._report, args=(idle,), name="watchdog report", daemon=True)
            reporting.start()  # raises where there is no memory left for a thread
            reporting.join(REPORT_SECONDS)
            # The first to go breaks the others' connections: not before they too have spoken.
            time.sleep(2 * self.period)
        finally:
            os._exit(EXIT_CODE)

    def _talk(self) -> None:
        """Tell the others where this rank is, and hear their alarm."""
        self._is_joined.wait()
        while not self._alarm.is_set():
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._beat_path(self.rank).write_text(self._here(0.0).to_line(), encoding="utf-8")
            with suppress(OSError, ValueError):
                if int(self._alarm_path.read_text(encoding="utf-8")) == self._start_number:
                    self._alarm.set()
            time.sleep(self.period)

    def _report(self, idle: float) -> None:
        here = self._here(idle)
        try:
            self._report_into_files(here)
        except OSError as error:
            self._say(f"no progress for {idle:.0f} s: {here}; nothing more is known, for {error}")

    def _report_into_files(self, here: RankReport) -> None:
        """Raise the alarm, write this rank's stacks, wait for the others' and say who is to blame."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._is_joined.is_set():
            _write_whole(self._alarm_path, str(self._start_number))
        self._write_stacks(here)
        if not self._is_joined.is_set():
            self._say(f"no progress for {here.idle_seconds:.0f} s, before the ranks have met: {here}")
            return
        reports = self._wait_for_reports(max(LONGEST_PERIOD, 6 * self.period))
        beats = {rank: RankReport.read(self._beat_path(rank)) for rank in range(self._num_ranks)}
        message = verdict(reports, beats)
        if self.rank == min(reports):
            _write_whole(self.folder / "summary.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S}\n{message}\n")
            self._say(message)
        logger.error("%s", message)  # at last: the main thread may stand still with the lock of the logs

    def _wait_for_reports(self, seconds: float) -> Mapping[int, RankReport]:
        """Return what each rank has written since the alarm, once all have or the time is over."""
        deadline, reports = time.monotonic() + seconds, dict[int, RankReport]()
        while True:
            for rank in range(self._num_ranks):
                report = RankReport.read(self._stacks_path(rank))
                if report is not None and report.start_number == self._start_number:
                    reports[rank] = report
            if len(reports) == self._num_ranks or time.monotonic() > deadline:
                return reports
            time.sleep(self.period)

    def _write_stacks(self, here: RankReport) -> None:
        path = self._stacks_path(self.rank)
        unfinished = path.with_suffix(".writing")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(here.to_line())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        unfinished.replace(path)

    def _say(self, message: str) -> None:
        print(
            f"kosmos train: {message}\nThe Python stacks of all ranks that answered are in {self.folder}; the run ends "
            f"with code {EXIT_CODE}. health.watchdog_seconds={self.seconds:g} is the limit.",
            file=sys.stderr,
            flush=True,
        )

    def _here(self, idle: float) -> RankReport:
        place = self.heartbeat.place
        return RankReport(
            self._start_number, self.rank, socket.gethostname(), os.getpid(), place.steps, place.phase, place.mark, idle
        )

    @property
    def _alarm_path(self) -> Path:
        return self.folder / "alarm"

    def _beat_path(self, rank: int) -> Path:
        return self.folder / f"beat_{rank:05d}.json"

    def _stacks_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.txt"


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
