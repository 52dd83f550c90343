"""`lowalign synth`: rows written by a model from guidelines and seed rows, as in Self-Instruct (arXiv 2212.10560).

OUT                     the rows: prompt, completion, source, recipe; reward where answers were scored
.OUT.run/rounds.jsonl   one line a round: its rows, and what was dropped; a stopped run resumes from it
.OUT.run/inputs.json    options and hashes of the inputs
.OUT.run/report.json    the counts
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowalign.commands.synth_writer import ROW, SEED, Writer
from lowalign.config.synth import SynthConfig
from lowalign.data.chat import Chat
from lowalign.data.seeds import read_seeds
from lowalign.durable import write_json, write_jsonl
from lowalign.errors import UserError
from lowalign.log import log, progress
from lowalign.model.adapters.files import adapter_template, refuse_reward_runs, trained_format
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.positions import usable_positions
from lowalign.rewards.reward_run import check_reward_runs
from lowalign.rewards.spec import files_and_runs
from lowalign.train.lock import lock_folder
from lowalign.train.output_file import check_or_write, stoppable
from lowalign.train.run_folder import Journal, input_hashes

KINDS = {
    "empty": "prompts were empty",
    "unfinished": "prompts were cut off at --sampling.max-new-tokens",
    SEED: "prompts were like a seed",
    ROW: "prompts were like an earlier row",
    "unanswered": "prompts got no answer that was finished",
}


def synth(config: SynthConfig, base: Base | None = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code: 1 when fewer rows than asked for came."""
    results: list[int] = []
    code = stoppable(lambda config: results.append(_run(config, base)), config)
    return code or results[0]


def _run(config: SynthConfig, base: Base | None) -> int:
    refuse_reward_runs(config.adapter)
    seeds = read_seeds(config.data.files)
    tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
    chat = Chat(tokenizer, adapter_template(config.adapter))
    files, runs = files_and_runs(config.reward)
    chat.positions = usable_positions(
        base.folder if base else config.model, config.base.revision, [*config.adapter, *runs]
    )
    writer = Writer(config, seeds, chat)
    check_reward_runs(runs, ())
    for run in runs:
        if trained_format(run) not in (None, "mixed", config.ask):
            raise UserError(
                f"--reward {run} was trained on the other format of prompts: give --ask {trained_format(run)}"
            )
    inputs = {"seeds": [vars(seed) for seed in seeds], "texts": writer.texts}
    inputs |= input_hashes(files, [*config.adapter, *runs])
    folder = config.out.with_name(f".{config.out.name}.run")
    with lock_folder(folder):
        # Neither changes a row that is there.
        check_or_write(replace(config, n=1, patience=1), inputs, folder / "inputs.json")
        journal = Journal(folder / "rounds.jsonl")
        begun = config.out.exists() and config.out.stat().st_size
        journal.keep(len(journal.lines) if begun else 0)  # without a line that a kill left incomplete
        try:
            _fill(config, writer, journal, base)
        finally:
            writer.close()
        return _finish(config, journal, folder)


def _fill(config: SynthConfig, writer: Writer, journal: Journal, base: Base | None) -> None:
    """Rounds until there are n rows, or too many have given none."""
    for line in journal.lines:
        writer.learn(line["rows"])
    idle = next((k for k, line in enumerate(reversed(journal.lines)) if line["rows"]), len(journal.lines))
    with progress(total=config.n, initial=min(len(writer.rows), config.n), unit="row") as bar:
        while len(writer.rows) < config.n and idle < config.patience:
            if writer.host is None:
                writer.load(base or Base.load(config.model, **vars(config.base)))
            line = writer.round(len(journal.lines))
            journal.add([line])
            write_jsonl(config.out, _rows(journal)[: config.n])
            writer.learn(line["rows"])
            idle = 0 if line["rows"] else idle + 1
            bar.update(min(len(line["rows"]), config.n - bar.n))


def _rows(journal: Journal) -> list[dict[str, Any]]:
    return [row for line in journal.lines for row in line["rows"]]


def _finish(config: SynthConfig, journal: Journal, folder: Path) -> int:
    """Write OUT and the report -> the exit code."""
    rows = _rows(journal)
    write_jsonl(config.out, rows[: config.n])
    dropped = sum((Counter(line["dropped"]) for line in journal.lines), Counter())
    figures = {"rounds": len(journal.lines), "sampled": config.batch * len(journal.lines), "rows": len(rows)}
    write_json(folder / "report.json", figures | {"dropped": dict(dropped)})
    log(
        f"{figures['sampled']:,} prompts were sampled in {figures['rounds']:,} rounds; {len(rows):,} of them became rows"
    )
    log("\n".join(f"  {dropped[kind]:,} {meaning}" for kind, meaning in KINDS.items() if dropped[kind]))
    log(f"{len(rows[: config.n]):,} rows are in {config.out}")
    if len(rows) >= config.n:
        return 0
    log(
        f"stopped: the last {config.patience} rounds gave no row. Give more or other seeds, a higher --max-similarity or "
        "--sampling.temperature, or a higher --patience with --resume"
    )
    return 1
