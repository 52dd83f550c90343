"""The picture of docs/report.md: three SFT runs in the demo's world, their report, and screenshots of it.

    python benchmarks/report_pictures.py --out OUT [--chromium PROGRAM]

It writes OUT/report.html and OUT/report-WIDTH-SCHEME.png at the widths of a phone and a screen, in light and dark. A run takes
one to two minutes on one core; runs that are in OUT already are kept. docs/report.png is report-1280-light.png.
"""

import argparse
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from lowalign.commands.report import report
from lowalign.commands.sft import sft
from lowalign.config.report import ReportConfig
from lowalign.demo.configs import BASE, BASE_CONFIG, stage_config
from lowalign.model.base.base import Base

LEARNING_RATES = ("1e-3", "5e-3", "2e-2")
STEPS = 90
SIZES = {390: 2400, 1280: 965}  # width: height of the picture, in pixels
SCHEMES = ("light", "dark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chromium", default=next(filter(shutil.which, ("chromium", "google-chrome")), "chromium"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = make_runs(options.out.resolve())
    page = options.out.resolve() / "report.html"
    report(ReportConfig(runs=tuple(runs), out=page))
    for width, height in SIZES.items():
        for scheme in SCHEMES:
            picture = page.with_name(f"report-{width}-{scheme}.png")
            screenshot(options.chromium, page, picture, width, height)
            print(picture)


def make_runs(out: Path) -> list[Path]:
    """SFT runs that differ in the learning rate."""
    torch.set_num_threads(1)
    base = None
    runs = [out / f"lr-{rate}" for rate in LEARNING_RATES]
    for rate, run in zip(LEARNING_RATES, runs, strict=True):
        if not (run / "adapter" / "lowalign.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            base = base or Base.load(BASE, **vars(BASE_CONFIG))
            config = stage_config(out, "sft")  # writes the rows
            train = replace(config.train, learning_rate=float(rate), steps=STEPS, log_every=1, eval_every=15)
            if sft(replace(config, out=run, train=train), base):
                raise SystemExit("stopped; the same command goes on")
    return runs


def screenshot(chromium: str, page: Path, picture: Path, width: int, height: int) -> None:
    """The top of a page. It is in a frame, because a window cannot be as narrow as a phone."""
    dark = "dark" in picture.stem
    frame = picture.with_suffix(".html")
    frame.write_text(
        f'<meta name="color-scheme" content="light dark"><body style="margin:0;overflow:hidden">'
        f'<iframe src="{page.as_uri()}" style="border:0;width:{width}px;height:{height}px" scrolling="no"></iframe>'
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    flags += [
        f"--blink-settings=preferredColorScheme={int(not dark)}",
        f"--user-data-dir={picture.parent / '.profile'}",
    ]
    try:
        subprocess.run([chromium, *flags, f"--screenshot={picture}", frame.as_uri()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{chromium} makes no screenshot ({error}); name one with --chromium") from error
    finally:
        frame.unlink()


if __name__ == "__main__":
    main()
