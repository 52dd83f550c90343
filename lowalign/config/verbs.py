"""The verbs of the command line. A new verb is one line of VERBS; `lowalign --help` is printed from it."""

from typing import NamedTuple

from lowalign.config.bitdelta import CompressConfig, DistilConfig
from lowalign.config.commands import (
    BestOfNConfig,
    ChatConfig,
    CopyRecipeConfig,
    DataCheckConfig,
    DataConvertConfig,
    DataPresetsConfig,
    GenerateConfig,
    PipelineConfig,
    ShowRecipeConfig,
)
from lowalign.config.evaluation import CompareConfig, EvalConfig, JudgeConfig, ScoreConfig
from lowalign.config.export import CheckpointConfig, MergeConfig, PullConfig, PushConfig
from lowalign.config.label import LabelConfig
from lowalign.config.plan import PlanOptions
from lowalign.config.report import ReportConfig
from lowalign.config.synth import SynthConfig
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig


class Verb(NamedTuple):
    """One command."""

    name: str
    """One word, or two: "data check"."""
    function: str
    """module:function below `lowalign`. Called with the configuration, if there is one; returns the exit code or None."""
    config: type | None
    """The dataclass of its options. None: it takes none."""
    usage: str
    """The words and flags after the name, for --help. A verb whose usage begins with RECIPE takes a recipe."""
    help: str

    @property
    def takes_recipe(self) -> bool:
        """Whether the first word after the name may be a recipe."""
        return self.usage.startswith(RECIPE)


RECIPE = "[RECIPE]"
TRAIN = f"{RECIPE} --model M --data FILE… --out DIR"
REWARDED = f"{RECIPE} --model M --reward SPEC… --data FILE… --out DIR"
GENERATE = "--model M [--adapter A…] --prompt TEXT"
CHAT = "[RUN_OR_ADAPTER…] [--model M]"
CHECK = "FILE… --model M"
CONVERT = "FILE… --out FILE.jsonl [--data.preset NAME]"
SCORE = "--model M --adapter RUN --data FILE…"
JUDGE = "--model M --data FILE… --out DIR"
COMPARE = "--a A --b B --data FILE… --out DIR [--judge JUDGE]"
EVAL = "--data FILE… [--adapter A…] [--model M]"
LABEL = "--data FILE… --out FILE [--adapter POLICY…]"
SYNTH = "--model M --guidelines FILE --n N --out FILE [--data SEEDS…]"
COMPRESS = "--base B --finetuned F --out DIR"
DISTIL = f"{RECIPE} --model M --delta DELTA --finetuned F --data FILE… --out DIR"
CHECKPOINT = "RUN[@STEP|@best] --out DIR"
REPORT = "RUN… --out FILE.html [--live]"
PIPELINE = "PIPELINE --out DIR [--model M] [--set NAME=VALUE…]"
MERGE = "RUN_OR_ADAPTER… --out DIR [--model M]"
PUSH = "DIR REPO [--private] [--revision R]"
PULL = "REPO DIR [--revision R]"
SHOW = "NAME [--full]"
COPY = "NAME [DEST] [--full]"
PLAN = f"{RECIPE} --model M [--vram 24GB]"

VERBS = {
    "train": (
        Verb("sft", "commands.sft:sft", SFTConfig, TRAIN, "supervised fine-tuning"),
        Verb("reward", "commands.reward:reward", RewardConfig, TRAIN, "reward model: a scalar head, from preferences"),
        Verb("dpo", "commands.dpo:dpo", DPOConfig, TRAIN, "DPO, IPO, KTO, SimPO, ORPO …: a policy, from preferences"),
        Verb("ppo", "commands.ppo:ppo", PPOConfig, REWARDED, "PPO, GRPO, RLOO: sample, score, update"),
        Verb("best-of-n", "commands.best_of_n:best_of_n", BestOfNConfig, REWARDED, "sample, score, keep the best"),
    ),
    "pipelines": (
        Verb("run", "commands.run:run", PipelineConfig, PIPELINE, "stages from a file, on one load of the base"),
    ),
    "make data": (
        Verb("label", "commands.label:label", LabelConfig, LABEL, "people judge answers on a local web page"),
        Verb("synth", "commands.synth:synth", SynthConfig, SYNTH, "rows written by a model, from guidelines and seeds"),
    ),
    "inspect": (
        Verb("data check", "commands.data_check:data_check", DataCheckConfig, CHECK, "format, lengths, loss mask"),
        Verb(
            "data convert",
            "commands.data_convert:data_convert",
            DataConvertConfig,
            CONVERT,
            "rows of any source as JSONL",
        ),
        Verb(
            "data presets",
            "commands.data_presets:data_presets",
            DataPresetsConfig,
            "[NAME]",
            "columns of known data sets",
        ),
        Verb("chat", "commands.chat:chat", ChatConfig, CHAT, "talk to adapters on one base, switch and compare them"),
        Verb("generate", "commands.generate:generate", GenerateConfig, GENERATE, "completions of prompts, as JSONL"),
        Verb("score", "commands.score:score", ScoreConfig, SCORE, "what a reward run gives each completion"),
        Verb("report", "commands.report:report", ReportConfig, REPORT, "a page about runs: curves, data, samples"),
        Verb("judge", "commands.judge:judge", JudgeConfig, JUDGE, "which answer is better, as preference pairs"),
        Verb("compare", "commands.compare:compare", CompareConfig, COMPARE, "win rate of one policy against another"),
        Verb("eval", "commands.eval:evaluate", EvalConfig, EVAL, "held-out loss and accuracy, or lm-eval tasks"),
    ),
    "export": (
        Verb(
            "checkpoint", "commands.checkpoint:checkpoint", CheckpointConfig, CHECKPOINT, "an adapter from a checkpoint"
        ),
        Verb("merge", "commands.merge:merge", MergeConfig, MERGE, "base + adapters to plain weights, verified"),
        Verb("push", "commands.push:push", PushConfig, PUSH, "publish an adapter or a model on the Hub"),
        Verb("pull", "commands.pull:pull", PullConfig, PULL, "download one from the Hub, verified"),
        Verb(
            "bitdelta compress",
            "commands.bitdelta:compress",
            CompressConfig,
            COMPRESS,
            "a fine-tune at one bit a weight",
        ),
        Verb("bitdelta distil", "commands.bitdelta:distil", DistilConfig, DISTIL, "train the scales of such a delta"),
    ),
    "recipes": (
        Verb("recipes list", "commands.recipes:list_recipes", None, "", "the recipes that come with lowalign"),
        Verb("recipes show", "commands.recipes:show", ShowRecipeConfig, SHOW, "print one; --full: every key"),
        Verb("recipes copy", "commands.recipes:copy", CopyRecipeConfig, COPY, "copy one, to edit it"),
    ),
    "this machine": (
        Verb("plan", "commands.plan:plan", PlanOptions, PLAN, "memory and speed of a run, predicted without a GPU"),
        Verb("doctor", "commands.doctor:doctor", None, "", "versions, device, and what works here"),
        Verb("demo", "demo.run:main", None, "", "every training stage on a tiny base; no download, no GPU"),
    ),
}
"""By the heading under which --help lists them."""


def verbs() -> list[Verb]:
    """All of them, in order."""
    return [verb for group in VERBS.values() for verb in group]


def verb_of(config: type) -> str | None:
    """The name of the verb whose options are this dataclass; None for any other class."""
    return next((verb.name for verb in verbs() if verb.config is config), None)
