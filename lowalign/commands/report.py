"""`lowalign report`: a page about runs, from the files that they have written. It changes none of them and needs no model."""

import time
from dataclasses import replace
from pathlib import Path

from lowalign.config.report import ReportConfig
from lowalign.durable import write_file
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.report.page import GENERATOR, render
from lowalign.report.run_files import find_runs, read_run, run_folder
from lowalign.train.lock import in_use

PAUSE = 5  # seconds between two pages of --live


def report(config: ReportConfig) -> int:
    """Run the command. Returns the exit code."""
    config = replace(config, runs=tuple(map(run_folder, config.runs)))
    find(config)  # before the place of the page is looked at: a RUN that is none is the likelier mistake
    out = config.out or config.runs[0] / "report.html"
    _check(out)
    if config.live and not running(config):
        log("no run is in progress: the page is written once")
    try:
        while config.live and running(config):
            _write(config, out, refresh=PAUSE)
            time.sleep(PAUSE)
    finally:  # also after Ctrl-C: a page that is open must not reload for ever
        _write(config, out, refresh=0)
    log(f"the report is in {out}")
    return 0


def find(config: ReportConfig) -> list[Path]:
    """The folders of all runs, each once. Raises UserError for a folder without one."""
    return list({folder.resolve(): folder for root in config.runs for folder in find_runs(root)}.values())


def running(config: ReportConfig) -> set[Path]:
    """Of the folders named and those found in them, those that a process works in."""
    return {folder for folder in (*config.runs, *find(config)) if in_use(folder)}


def _check(out: Path) -> None:
    """Raise UserError where the page cannot be, or would replace what is not a report."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the file of the page, such as {out / 'report.html'}")
    try:
        if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
            raise UserError(f"{out} is there, and no report of lowalign; it is not replaced: choose another --out")
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}") from error


def _write(config: ReportConfig, out: Path, refresh: int) -> None:
    runs = [read_run(folder) for folder in find(config)]
    page = render(runs, config.runs, running(config), config.smooth, refresh)
    try:
        write_file(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
