"""Options of `lowalign report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lowalign.config.ranges import Checked, Range
from lowalign.errors import UserError


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Write one HTML page about runs: the curves of all metrics, runs of one verb in the same charts; options and their
    differences, data, samples, speed, and the commands to repeat them. The page needs no network and no JavaScript."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN…")] = ()
    """Folders of runs, finished or not. The folder of a pipeline, or a folder of runs, stands for all runs in it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html")] = None
    """The page. An older report there is replaced, any other file is refused. Default, for one RUN: report.html in it."""
    smooth: Annotated[float, Range(0, 1, below=True)] | None = None
    """Weight of the moving average behind the strong lines, from 0 (none) to below 1; the values themselves are drawn
    faintly. Default: by the number of values, with none up to 50, and none for curves without noise."""
    live: bool = False
    """Write the page again every 5 seconds until the runs end; an open page reloads by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UserError("no run to report: lowalign report RUN… --out FILE.html")
        if self.out is None and len(self.runs) > 1:
            raise UserError("a report of several runs needs a place: give --out FILE.html")
