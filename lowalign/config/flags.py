"""The flags of a command line, checked before the parser sees them, so that a mistake is one line: what was wrong, and what to write.

Also here: old names, lists that are given twice, and the names that other libraries give to an option.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_origin, get_type_hints

import tyro

from lowalign.config.renamed import RENAMED, warn
from lowalign.config.yaml_flags import flag_of, flag_problem, options, suggest
from lowalign.errors import UserError

FLAG = re.compile(r"--?[A-Za-z]")  # -1 and "- a text" are values
# By name in transformers, trl, peft, axolotl and LLaMA-Factory.
ELSEWHERE = {
    "lr": "train.learning_rate",
    "bs": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.token_budget",
    "gradient_accumulation_steps": "train.batch_size",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "max_grad_norm": "train.clip",
    "gradient_checkpointing": "train.checkpointing",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "report_to": "train.track",
    "optim": "train.optimizer",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "rank": "adapter.r",
    "num_virtual_tokens": "adapter.virtual_tokens",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_prompt_length": "data.max_length",
    "max_samples": "data.limit",
    "dataset": "data.files",
    "datasets": "data.files",
    "dataset_name": "data.files",
    "val_set_size": "data.eval_rows",
    "eval_dataset": "data.eval",
    "model_name_or_path": "model",
    "base_model": "model",
    "model_name": "model",
    "output_dir": "out",
    "output": "out",
    "resume_from_checkpoint": "resume",
    "load_in_4bit": "base.quantization",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "cliprange": "ppo.clip",
    "kl_coef": "ppo.kl",
    "init_kl_coef": "ppo.kl",
    "vf_coef": "ppo.value_coef",
    "lam": "ppo.gae_lambda",
    "num_ppo_epochs": "ppo.epochs",
    "num_generations": "rollout.samples",
    "num_return_sequences": "n",
    "max_completion_length": "sampling.max_new_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "reward_model": "reward",
    "loss_type": "dpo.loss",
    "rpo_alpha": "dpo.sft",
}


def checked(words: Sequence[str], config: type, prog: str) -> list[str]:
    """The flags for the parser. config: their dataclass. prog: "lowalign sft", for messages.

    Raises UserError for an option that there is not, and for a value that it does not take.
    """
    if {"-h", "--help"} & set(words):
        return list(words)
    first = next((i for i, word in enumerate(words) if FLAG.match(word)), len(words))
    hints, marks = dict(options(config)), get_type_hints(config, include_extras=True)
    positional = list(words[:first])
    takes_positional = any(tyro.conf.Positional in getattr(hint, "__metadata__", ()) for hint in marks.values())
    values: dict[str, list[str]] = {}  # by flag
    for written, texts in _groups(words[first:]):
        name = _name(written, hints)
        key = _key(name, hints)
        if key is None:
            verb = prog.removeprefix("lowalign ")
            raise UserError(f"{verb} has no option {written}{near(name, hints)} (`{prog} --help` lists them)")
        if takes_positional and get_origin(hints[key]) is not tuple:  # --live RUN
            own = 0 if hints[key] is bool else 1
            positional += texts[own:]
            texts = texts[:own]
        if problem := flag_problem(hints[key], texts):
            raise UserError(f"{name}: {problem}")
        appends = _appends(key, marks)
        if name in values and not appends and get_origin(hints[key]) is tuple and values[name] != texts:
            ignored, used = " ".join(values[name]), " ".join(texts)
            print(f"{name} is given twice: {ignored} is left out. For both: {name} {ignored} {used}", file=sys.stderr)
        values[name] = [*values.get(name, ()), *texts] if appends else texts
    return [*positional, *_written(values, hints, marks)]


def near(name: str, keys: Mapping[str, Any]) -> str:
    """A question to append to a message: the option meant by a flag, in any section, also by its name elsewhere."""
    word = name.lstrip("-").replace("-", "_")
    elsewhere = ELSEWHERE.get(word) or ELSEWHERE.get(word.rpartition(".")[2])
    if elsewhere in keys:
        return f"; did you mean {flag_of(elsewhere)}?"
    same = [key for key in keys if key.rpartition(".")[2] == word.rpartition(".")[2]]
    if same:
        return f"; did you mean {' or '.join(map(flag_of, same[:3]))}?"
    last: dict[str, str] = {}
    for key in keys:
        last.setdefault(key.rpartition(".")[2], key)
    question = suggest(word, [*keys, *last])
    meant = re.sub(r"^; did you mean (.*)\?$", r"\1", question)
    return f"; did you mean {flag_of(last.get(meant, meant))}?" if question else ""


def _groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag as written, its values) of words that begin with a flag."""
    group: list[str] = []
    for word in words:
        if FLAG.match(word) and group:
            yield group[0], group[1:]
            group = []
        flag, equals, value = word.partition("=") if FLAG.match(word) else (word, "", "")
        group += [flag, value] if equals else [flag]
    if group:
        yield group[0], group[1:]


def _name(written: str, hints: Mapping[str, Any]) -> str:
    """The flag by its name today, with a notice for an old one."""
    name = written.replace("_", "-")
    for key in hints:
        if name == f"--{key}".replace("_", "-"):  # --data.files is --data
            return flag_of(key)
    old = name.removeprefix("--").replace("-", "_")
    new = RENAMED.get(old)
    if new in hints and old not in hints:
        warn(name, flag_of(new))
        return flag_of(new)
    return name


def _key(name: str, hints: Mapping[str, Any]) -> str | None:
    """The option of a flag, also of --section.no-OPTION."""
    keys = {flag_of(key): key for key in hints}
    key = keys.get(re.sub(r"(^--|\.)no-", r"\1", name))
    return keys.get(name) or (key if hints.get(key) is bool else None)


def _appends(key: str, marks: Mapping[str, Any]) -> bool:
    """Whether a flag is repeated for several values, as --adapter A --adapter B."""
    return tyro.conf.UseAppendAction in getattr(marks.get(key), "__metadata__", ())


def _written(values: Mapping[str, list[str]], hints: Mapping[str, Any], marks: Mapping[str, Any]) -> Iterator[str]:
    for flag, texts in values.items():
        key = _key(flag, hints)
        if get_origin(hints[key]) is not tuple:
            yield f"{flag}={texts[0]}" if texts else flag
        elif _appends(key, marks):
            yield from (word for text in texts for word in (flag, text))
        else:
            yield from (flag, *texts)
