"""`lowalign label`: people judge answers on a local web page; the judgements are rows for `reward` and `dpo`.

OUT                         the rows, with annotator
.OUT.run/judgements.jsonl   every judgement, skip and undo; a restart goes on from it
.OUT.run/answers.jsonl      the sampled answers, as in `lowalign compare`
.OUT.run/inputs.json        what they were sampled with
"""

import json
import webbrowser
from pathlib import Path

from lowalign.commands.policies import PolicyAnswers, adapters_of, base_named_by, prompts_for, read_policies
from lowalign.config.label import LabelConfig
from lowalign.data.prompt_format import formatted
from lowalign.data.rows.answers import Answers, read_answers
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.labelling.items import Item, make_items
from lowalign.labelling.judgements import Judgements
from lowalign.labelling.server import LabelServer
from lowalign.labelling.task import Labelling
from lowalign.log import log
from lowalign.model.adapters.files import refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.positions import usable_positions
from lowalign.train.lock import lock_folder
from lowalign.train.run_folder import Journal, content_hashes, input_hashes
from lowalign.train.signals import Interrupted, StopSignals

PROMPTS_PER_BLOCK = 64  # prompts that all policies answer before these answers are written


def label(config: LabelConfig, base: Base | None = None) -> int:
    """Run the command until it is stopped; `base` is one that is loaded already. Returns the exit code."""
    if config.out.is_dir() or not config.out.resolve().parent.is_dir():
        raise UserError(f"--out {config.out}: give a file in a folder that exists, such as prefs.jsonl")
    folder = config.out.with_name(f".{config.out.name}.run")
    with lock_folder(folder):
        try:
            with StopSignals(at_once=True):  # sampled answers are written block by block
                items = _items(config, folder, base)
        except Interrupted as stopped:
            log(f"stopped by {stopped.signal.name}; the same command goes on")
            return 128 + stopped.signal
        judgements = Judgements(config.out, folder)
        mode = config.by or ("pick" if all(len(item.answers) == 2 for item in items) else "rank")
        with LabelServer(Labelling(items, judgements, mode, config.annotator), config.port) as server:
            _serve(server, config.open)
            judgements.close()
        done = [event for name in judgements.annotators for event in judgements.of(name).values()]
        log(f"{sum('row' in event for event in done):,} judgements are in {config.out}; the same command goes on")
    return 0


def _serve(server: LabelServer, open_page: bool) -> None:
    """Until Ctrl-C or SIGTERM, which is how labelling ends: every judgement is on the disk by then."""
    log(f"{len(server.labelling.items):,} prompts to judge: open {server.address} (Ctrl-C ends; nothing is lost)")
    try:
        with StopSignals(at_once=True):
            if open_page:
                webbrowser.open(server.address)
            server.serve_forever()
    except Interrupted:
        log("")


def _items(config: LabelConfig, folder: Path, base: Base | None) -> list[Item]:
    """Raises UserError when nothing is left to judge."""
    data = config.data
    if config.samples:
        rows, policies = _sampled(config, folder, base)
    else:
        rows, policies = [formatted(row, data.prompt_format) for row in read_answers(data.files)][: data.limit], ()
    items, left_out = make_items(rows, policies)
    for reason, count in left_out.items():
        log(f"left out: {count:,} {reason}")
    if not items:
        files = ", ".join(data.files)
        raise UserError(
            f"no prompt of {files} has two different answers; for answers of a model give --adapter POLICY or --model M"
        )
    return items


def _sampled(config: LabelConfig, folder: Path, base: Base | None) -> tuple[list[Answers], list[list[str]]]:
    """-> the prompts with the answers of all policies, and the policy of each answer. The base is loaded only where answers are
    missing, and is left without adapters."""
    adapters = adapters_of(config.policies)
    refuse_reward_runs(adapters)
    model = base_named_by(config.model, config.policies)
    tokenizer = base.tokenizer if base else load_tokenizer(model, config.base.revision)
    positions = usable_positions(base.folder if base else model, config.base.revision, adapters)
    policies = read_policies(config.policies, tokenizer, positions)
    rows = [row for row, _ in prompts_for(policies, config.data.files, config.data)]
    journal = Journal(folder / "answers.jsonl")
    options = {
        "model": model,
        "policies": config.policies,
        "answers": config.answers,
        "sampling": vars(config.sampling),
    }
    inputs = options | {"prompts": [row.prompt for row in rows]} | input_hashes((), adapters)
    _check_inputs(config.out, folder / "inputs.json", inputs, bool(journal.lines))
    starts = range(0, len(rows), PROMPTS_PER_BLOCK)
    if blocks := journal.resume([range(i, min(i + PROMPTS_PER_BLOCK, len(rows))) for i in starts]):
        host = Host(base or Base.load(model, **vars(config.base)))
        n = config.answers // len(policies)
        try:
            answer = PolicyAnswers(host, policies, rows, n, config.sampling, config.allow_base_mismatch)
            journal.fill(blocks, answer, "prompt")
        finally:
            host.delete_all()
    completions = [line["completions"] for line in journal.lines]
    answers = [
        Answers(row.prompt, [c["completion"] for c in own], row.where)
        for row, own in zip(rows, completions, strict=True)
    ]
    return answers, [[c["policy"] for c in own] for own in completions]


def _check_inputs(out: Path, file: Path, inputs: dict[str, object], has_answers: bool) -> None:
    """Write the hashes of what the answers are sampled with, or compare them with those of the answers that are there."""
    hashes = content_hashes(inputs)
    before = json.loads(file.read_text()) if has_answers and file.exists() else hashes
    if changed := [name for name in hashes if hashes[name] != before.get(name)]:
        raise UserError(
            f"{out} was begun with other answers ({', '.join(changed)} differ); use the same options, or choose another --out"
        )
    write_json(file, hashes)
