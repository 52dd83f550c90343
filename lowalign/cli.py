"""One thin command per verb: read the flags, then import and call what does the work.

Until then neither torch nor transformers is imported, so --help and every complaint about a flag come at once.
Exit codes: 0 done, 1 a mistake of the user, 2 a bug of lowalign, 130 or 143 stopped by a signal.
"""

import difflib
import os
import re
import sys
import traceback
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from lowalign import __version__
from lowalign.config import recipe
from lowalign.config.commands import BestOfNConfig, DataCheckConfig, GenerateConfig, JudgeConfig, ScoreConfig
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lowalign.errors import UserError

HELP = """\
usage: lowalign VERB …

train
  sft [RECIPE] --model M --data FILE… --out DIR    supervised fine-tuning; RECIPE is a YAML file or a name: lora/sft
  reward [RECIPE] --model M --data FILE… --out DIR reward model: a scalar head learns from preferences
  dpo [RECIPE] --model M --data FILE… --out DIR    DPO, IPO, KTO, SimPO, ORPO …: the policy learns from preferences
  ppo [RECIPE] --model M --reward SPEC … --data FILE… --out DIR
                                                   PPO: sample, score, learn; four roles on one base
  best-of-n [RECIPE] --model M --reward SPEC … --data FILE… --out DIR
                                                   sample, score, keep the best; --rounds R --train learns from them

look
  data check FILE… --model M                       what is recognised in the rows, and what is supervised in them
  generate --model M [--adapter A …] --prompt TEXT prompts in, completions out, as JSONL
  score --model M --adapter RUN --data FILE…       what a reward run gives each completion
  judge --model M --data FILE… --out DIR           which of two answers is better: preference pairs out of completions
  doctor                                           what this machine can do

recipes
  recipes list                                     the recipes that come with lowalign
  recipes show NAME                                print one
  recipes copy NAME [DEST]                         copy one, to change it

demo                                               a whole run in a tiny world, without any download

`lowalign VERB --help` lists the options of a verb. --version prints the version.
"""
RECIPES_USAGE = "usage: lowalign recipes list | show NAME | copy NAME [DEST]"
RUNS = {
    "sft": ("lowalign.commands.sft", "sft", SFTConfig),
    "reward": ("lowalign.commands.reward", "reward", RewardConfig),
    "dpo": ("lowalign.commands.dpo", "dpo", DPOConfig),
    "ppo": ("lowalign.commands.ppo", "ppo", PPOConfig),
    "best-of-n": ("lowalign.commands.best_of_n", "best_of_n", BestOfNConfig),
}
"""Verbs that take a recipe: the module and the function that does the work, and its options."""
OTHERS = ("data", "recipes", "generate", "score", "judge", "demo", "doctor")
DATA_USAGE = "usage: lowalign data check FILE… --model M"


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(f"lowalign: {error}")
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lowalign … | head`: point stdout elsewhere, or the interpreter complains as it leaves
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; importing torch for its name would slow every start
            _complain(
                f"lowalign: out of memory: {str(error).splitlines()[0].rstrip('.')}. Close other programs that use the card, or take a "
                "smaller --model, --adapter.r or --train.token-budget"
            )
            return 1
        _complain(
            f"{traceback.format_exc()}\nlowalign: this is a bug, and not your doing. Please report the lines above."
        )
        return 2


def _dispatch(argv: list[str]) -> int:
    match argv:
        case [] | ["-h" | "--help" | "help", *_]:
            print(HELP, end="")
        case ["--version"]:
            print(f"lowalign {__version__}")
        case [verb, *rest] if verb in RUNS:
            return _run(verb, rest)
        case ["data", "check", *rest]:
            return _data_check(rest)
        case ["data", *_]:
            return _usage(DATA_USAGE, argv)
        case ["recipes", *rest]:
            return _recipes(rest)
        case ["generate", *rest]:
            return _generate(rest)
        case ["score", *rest]:
            return _score(rest)
        case ["judge", *rest]:
            return _judge(rest)
        case ["demo"]:
            from lowalign.demo.run import main as demo

            return demo() or 0
        case ["doctor"]:
            from lowalign.commands.doctor import doctor

            return doctor()
        case ["demo" | "doctor" as verb, *_]:
            return _usage(f"usage: lowalign {verb}", argv)
        case [word, *_]:
            near = difflib.get_close_matches(word, [*RUNS, *OTHERS], n=1)
            raise UserError(f"there is no verb {word}{f'; did you mean {near[0]}?' if near else ''}\n\n{HELP}")
    return 0


def _run(verb: str, rest: list[str]) -> int:
    """A verb that takes a recipe."""
    module, function, kind = RUNS[verb]
    words, flags = _split(rest)
    if len(words) > 1:
        raise UserError(f"{verb} takes one RECIPE, found {' '.join(words)} (data files are given as --data FILE…)")
    path = recipe.find(words[0]) if words else None
    config = recipe.parse(kind, flags, path, prog=f"lowalign {verb} [RECIPE]")
    return getattr(import_module(module), function)(config)


def _data_check(rest: list[str]) -> int:
    words, flags = _split(rest)
    config = recipe.parse(DataCheckConfig, flags, prog="lowalign data check FILE…")
    files = (*words, *config.data.files)
    if not files:
        raise UserError(f"no FILE to check\n{DATA_USAGE}")
    from lowalign.commands.data_check import check

    bad_rows = check(replace(config.data, files=files), config.model, config.revision, config.rows)
    return 1 if bad_rows else 0


def _recipes(rest: list[str]) -> int:
    from lowalign.commands import recipes

    match rest:
        case ["list"]:
            print(recipes.table())
        case ["show", name]:
            print(recipe.find(name).read_text(), end="")
        case ["copy", name, *dest] if len(dest) <= 1:
            print(recipes.copy(name, Path(dest[0]) if dest else None))
        case _:
            return _usage(RECIPES_USAGE, rest)
    return 0


def _generate(flags: list[str]) -> int:
    config = recipe.parse(GenerateConfig, flags, prog="lowalign generate")
    if (config.prompt is None) == (config.prompts is None):
        raise UserError("generate takes either --prompt TEXT or --prompts FILE")
    from lowalign.commands.generate import generate

    return generate(config)


def _score(flags: list[str]) -> int:
    config = recipe.parse(ScoreConfig, flags, prog="lowalign score")
    from lowalign.commands.score import score

    return score(config)


def _judge(flags: list[str]) -> int:
    config = recipe.parse(JudgeConfig, flags, prog="lowalign judge")
    from lowalign.commands.judge import judge

    return judge(config)


def _split(rest: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return rest[:first], rest[first:]


def _usage(text: str, argv: list[str]) -> int:
    """Answer --help; anything else that led here is a mistake."""
    if not {"-h", "--help"} & set(argv):
        raise UserError(text)
    print(text)
    return 0


def _complain(text: str) -> None:
    """Print to stderr, without any access token that the message may have caught."""
    token = os.environ.get("HF_TOKEN")
    text = text.replace(token, "hf_…") if token else text
    print(re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_…", text), file=sys.stderr)
