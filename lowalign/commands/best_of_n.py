"""`lowalign best-of-n`: sample n completions of each prompt, score them, and write the best as training data.

OUT/candidates.jsonl   one line a prompt: all its completions with their scores; a stopped run resumes from it
OUT/best.jsonl         the best completion of each prompt, for `lowalign sft`
OUT/pairs.jsonl        best against worst, for `lowalign dpo`
OUT/rankings.jsonl     all completions ranked by score, for `lowalign reward`
OUT/report.json        mean reward at n = 1, 2, 4, …, and the number of rows in each file

With --train these files are in OUT/round-1, OUT/round-2, …, and OUT/round-K/sft is the run trained on best.jsonl of round
K. As in RAFT (arXiv 2304.06767, algorithm 1) each round samples from the policy that the round before trained, and
continues training its weights; the first continues from --adapter. Llama 2 (arXiv 2307.09288, 3.2.3) samples from its
newest policy too.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from lowalign.commands.sft import sft
from lowalign.config.commands import BestOfNConfig
from lowalign.config.sections import DataConfig
from lowalign.config.training import SFTConfig
from lowalign.data.chat import Chat
from lowalign.data.prompt_format import check_prompt_format, formats_of
from lowalign.data.prompts import Prompts, distinct_prompts
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import duration, log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.files import adapter_template, refuse_reward_runs
from lowalign.model.adapters.kinds import BY_OPTION
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_policy
from lowalign.model.positions import usable_positions
from lowalign.rewards.function import FunctionReward, Samples, same_columns
from lowalign.rewards.reward_run import check_reward_runs
from lowalign.rewards.rewards import RewardOptions, Rewards, load_functions, load_rewards
from lowalign.rewards.selection import report, report_lines, write_datasets
from lowalign.rewards.spec import files_and_runs, require_flags
from lowalign.train import checkpoint
from lowalign.train.lock import lock_folder
from lowalign.train.run_folder import RECIPE_FILE, Journal, announce_start, check_or_write_inputs, input_hashes
from lowalign.train.signals import Interrupted, StopSignals

PROMPTS_PER_BLOCK = 64  # prompts that are sampled, scored and written together


def best_of_n(config: BestOfNConfig, base: Base | None = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code."""
    require_flags(prompts=config.data.files, reward=config.reward)
    started = time.monotonic()
    try:
        # Only the block in progress is lost, so a signal may arrive anywhere.
        with lock_folder(config.out), StopSignals(at_once=True):
            announce_start(config.resume, config.out / RECIPE_FILE)
            code = _run(config, base)
            if not code:
                log(f"{duration(started)} in all. Next: {_next_command(config)}")
            return code
    except Interrupted as stopped:
        log(f"stopped by {stopped.signal.name}; go on with the same command and --resume")
        return 128 + stopped.signal


def _next_command(config: BestOfNConfig) -> str:
    """What one does with the result."""
    model, out = quote(config.model), config.out
    if config.train:
        return f"lowalign generate --model {model} --adapter {quote(f'{out}/round-{config.rounds}/sft')} --prompt TEXT"
    sampled = f"--model {model}" + (f" --init {quote(config.adapter[0])}" if len(config.adapter) == 1 else "")
    best, pairs = quote(f"{out}/best.jsonl"), quote(f"{out}/pairs.jsonl")
    return (
        f"lowalign dpo lora/dpo {sampled} --data {pairs} --out DIR\n"
        f"or: lowalign sft lora/sft {sampled} --data {best} --out DIR"
    )


def _run(config: BestOfNConfig, base: Base | None) -> int:
    # Errors in prompts, rewards and adapters are found before a 7B model is loaded.
    refuse_reward_runs(config.adapter)
    if config.train and config.adapter:
        _check_kind(config)
    tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
    chat = Chat(tokenizer, adapter_template(config.adapter))
    files, runs = files_and_runs(config.reward)
    chat.positions = usable_positions(
        base.folder if base else config.model, config.base.revision, [*config.adapter, *runs]
    )
    data = config.data
    prompts = distinct_prompts(data.files, chat, data.limit, data.max_length, data.prompt_format)
    formats = formats_of(row.prompt for row, _ in prompts)
    if data.prompt_format is None:
        for adapter in config.adapter:
            check_prompt_format(f"--adapter {adapter}", adapter_files.trained_format(adapter), formats)
    folders = [config.out / f"round-{k + 1}" for k in range(config.rounds)] if config.train else [config.out]
    check_reward_runs(runs, formats)
    columns = same_columns([row.columns for row, _ in prompts])
    functions = load_functions(config.reward, columns[0])
    inputs = {"data": [row.prompt for row, _ in prompts]}
    if any(function.parameters.uses_columns for function in functions.values()):
        inputs["columns"] = columns
    inputs |= input_hashes(files, [*config.adapter, *runs])
    check_or_write_inputs(config, bool(Journal(folders[0] / "candidates.jsonl").lines), inputs)
    base = base or Base.load(config.model, **vars(config.base))
    base.end_at(chat.end_of_turn)
    adapters = config.adapter
    for k, folder in enumerate(folders):
        trained = folder / "sft"
        if not (trained / "adapter" / "lowalign.json").exists():
            if config.train:
                log(f"round {k + 1} of {config.rounds}")
            # Another seed each round: with the same one a prompt would get the same random numbers again.
            sampling = replace(config.sampling, seed=config.sampling.seed + k)
            _sample_round(
                replace(config, adapter=adapters, sampling=sampling),
                base,
                Reading(chat, prompts, columns, functions),
                folder,
            )
            if config.train and (code := sft(_sft_config(config, folder, adapters), base)):
                return code
        adapters = (str(trained),)
    return 0


@dataclass(frozen=True)
class Reading:
    """What is read before the base. columns: of each prompt's row. functions: the rewards that are functions, by their names
    in --reward."""

    chat: Chat
    prompts: Prompts
    columns: list[dict[str, Any]]
    functions: dict[str, FunctionReward]


def _sample_round(config: BestOfNConfig, base: Base, read: Reading, folder: Path) -> None:
    """Sample and score one round, and write all files of its folder but the sft run."""
    folder.mkdir(exist_ok=True)
    journal, total = Journal(folder / "candidates.jsonl"), len(read.prompts)
    starts = range(0, total, PROMPTS_PER_BLOCK)
    blocks = journal.resume([range(start, min(start + PROMPTS_PER_BLOCK, total)) for start in starts])
    if blocks:
        host = Host(base)
        options = RewardOptions(config.allow_base_mismatch, config.allow_training_spread, config.token_budget)
        try:
            stack = load_policy(host, config.adapter, config.allow_base_mismatch)
            rewards = load_rewards(config.reward, host, read.chat, options, read.functions)
            journal.fill(blocks, partial(_candidates, config, host, stack, rewards, read), "prompt")
        finally:
            host.delete_all()
    figures = report(journal.lines) | write_datasets(folder, journal.lines, config.unfinished == "keep")
    write_json(folder / "report.json", figures)
    log("\n".join([*report_lines(figures), f"all of it is in {folder}"]))


def _candidates(
    config: BestOfNConfig, host: Host, stack: Stack, rewards: Rewards, read: Reading, block: range
) -> list[dict[str, Any]]:
    """The lines of candidates.jsonl for the prompts with the numbers in `block`, which are their sampling seeds too."""
    texts, ids = [read.prompts[i][0].prompt for i in block], [read.prompts[i][1] for i in block]
    with host.use(*stack):
        completions = host.generate(ids, config.n, config.sampling, seeds=block)
    decode = host.base.tokenizer.decode
    decoded = [[decode(c.ids, skip_special_tokens=True) for c in group] for group in completions]
    samples = Samples([read.columns[i] for i in block], [[c.stopped for c in group] for group in completions])
    scores = rewards(texts, ids, decoded, [[c.ids for c in group] for group in completions], samples)
    return [
        {
            "prompt": prompt,
            "completions": [
                {"completion": text, "score": s.total, "parts": s.parts, "stopped": c.stopped, "tokens": len(c.ids)}
                for c, text, s in zip(*group, strict=True)
            ],
        }
        for prompt, *group in zip(texts, completions, decoded, scores, strict=True)
    ]


def _check_kind(config: BestOfNConfig) -> None:
    """Raises UserError when --sft.adapter is of another kind than --adapter, whose weights it continues."""
    adapter, _ = adapter_files.read(adapter_files.locate(config.adapter[0]))
    kind = BY_OPTION[config.sft.adapter.kind]
    if adapter.kind is not kind:
        kinds = f"{adapter.kind.peft_type}, not {kind.peft_type}"
        raise UserError(f"--train continues training --adapter {config.adapter[0]}, which is {kinds}; set --sft.adapter.kind to its kind")  # fmt: skip


def _sft_config(config: BestOfNConfig, folder: Path, adapters: tuple[str, ...]) -> SFTConfig:
    """The run that trains on the best completions of a round, from the weights that sampled them."""
    best = folder / "best.jsonl"
    if not best.stat().st_size:
        raise UserError(f"{best} is empty: no completion was finished; raise --sampling.max-new-tokens, or --unfinished keep")  # fmt: skip
    init = adapters[0] if adapters else None
    template = init and adapter_files.locate(init) / "chat_template.jinja"
    return SFTConfig(
        model=config.model,
        out=folder / "sft",
        data=DataConfig(
            files=(str(best),),
            max_length=config.sft.max_length,
            prompt_format=config.data.prompt_format,
            template=template if template and template.exists() else None,
            cache=False,
        ),
        adapter=config.sft.adapter,
        train=config.sft.train,
        base=config.base,
        init=init,
        init_mode="copy",
        allow_base_mismatch=config.allow_base_mismatch,
        resume=bool(checkpoint.steps(folder / "sft")),
    )
