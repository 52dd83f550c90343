"""The command line: read the flags, then import and call the function of the verb (lowalign/config/verbs.py).

Until then neither torch nor transformers is imported, so --help and errors in flags appear at once.
Exit codes: 0 done, 1 a mistake of the user, 2 a bug in lowalign, 130 or 143 stopped by a signal.
"""

import difflib
import os
import re
import sys
import traceback
from importlib import import_module

from lowalign import __version__, processes
from lowalign.allocator import keep_freed_memory
from lowalign.config import recipe
from lowalign.config.plan import PlanOptions, plan_config
from lowalign.config.verbs import RECIPE, VERBS, Verb, verbs
from lowalign.errors import UserError

COLUMN = 51  # where the help texts begin
SHARED = ("sft", "reward", "dpo", "ppo")  # the verbs that several processes share


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        if argv is None:  # a process of its own
            keep_freed_memory()
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        _print_error(f"lowalign: {error}")
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        _print_error("lowalign: stopped by SIGINT")
        return 130
    except BrokenPipeError:  # `lowalign … | head`: point stdout elsewhere, or Python prints an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # torch's, by name: importing torch for them would slow every start. The driver's own is an AcceleratorError.
        kind = type(error).__name__
        if kind == "OutOfMemoryError" or (kind == "AcceleratorError" and "out of memory" in str(error).lower()):
            _print_error(
                f"lowalign: out of memory: {str(error).splitlines()[0].rstrip('.')}. Close other programs that use the card, or take a "
                "smaller --model, --adapter.r or --train.token-budget"
            )
            return 1
        _print_error(f"{traceback.format_exc()}\nlowalign: this is a bug in lowalign. Please report the lines above.")
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0
    if words == ["--version"]:
        print(f"lowalign {__version__}")
        return 0
    known = {tuple(verb.name.split()): verb for verb in verbs()}
    for length in (2, 1):
        if verb := known.get(tuple(words[:length])):
            return _run(verb, words[length:])
    first = words[0]
    if family := [verb for verb in verbs() if verb.name.startswith(f"{first} ")]:
        return _usage(family, words)
    near = difflib.get_close_matches(first, [name[0] for name in known], n=1)
    _print_error(_help())
    raise UserError(f"there is no verb {first}{f'; did you mean {near[0]}?' if near else ''}")


def _run(verb: Verb, words: list[str]) -> int:
    if processes.count() > 1 and verb.name not in SHARED:
        raise UserError(
            f"{verb.name} runs in one process; start it without a launcher (several share {', '.join(SHARED)})"
        )
    if verb.config is None:
        if words:
            return _usage([verb], words)
        arguments = []
    else:
        arguments = [_parse(verb, words)]
    module, _, function = verb.function.partition(":")
    return getattr(import_module(f"lowalign.{module}"), function)(*arguments) or 0


def _parse(verb: Verb, words: list[str]) -> object:
    """The configuration of a verb, from the words after its name."""
    prog = f"lowalign {verb.name}"
    if not verb.takes_recipe:
        return recipe.parse(verb.config, words, prog=prog)
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, flags = words[:first_flag], words[first_flag:]
    if len(names) > 1:
        raise UserError(f"{verb.name} takes one RECIPE, found {' '.join(names)} (data files are given as --data FILE…)")
    path = recipe.find(names[0]) if names else None
    config = plan_config(path) if verb.config is PlanOptions else verb.config
    return recipe.parse(config, flags, path, f"{prog} {RECIPE}")


def _help() -> str:
    text = "usage: lowalign VERB …\n"
    for group, members in VERBS.items():
        text += f"\n{group}\n"
        for verb in members:
            left = f"  {verb.name} {verb.usage}".rstrip()
            gap = "\n".ljust(COLUMN + 1) if len(left) > COLUMN - 2 else " " * (COLUMN - len(left))
            text += f"{left}{gap}{verb.help}\n"
    return text + (
        "\nRECIPE is a YAML file or the name of a recipe that comes with lowalign, such as lora/sft.\n"
        "`lowalign VERB --help` lists the options of a verb. --version prints the version.\n"
    )


def _usage(members: list[Verb], words: list[str]) -> int:
    """Answer --help; any other words are a mistake."""
    text = "\n".join(f"usage: lowalign {verb.name} {verb.usage}".rstrip() for verb in members)
    if not {"-h", "--help"} & set(words):
        _print_error(text)
        names = ", ".join(verb.name for verb in members)
        raise UserError(
            f"there is no `lowalign {' '.join(words)}`" if len(members) > 1 else f"{names} takes no {words[0]}"
        )
    print(text)
    return 0


def _print_error(text: str) -> None:
    """Print to stderr, without access tokens that the message may contain."""
    token = os.environ.get("HF_TOKEN")
    text = text.replace(token, "hf_…") if token else text
    process = "" if processes.is_main() else f"process {processes.rank()}: "
    print(process + re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_…", text), file=sys.stderr)
