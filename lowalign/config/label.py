"""Options of `lowalign label`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.ranges import Checked, PositiveInt, Range
from lowalign.config.rows import JudgedRowsConfig
from lowalign.config.sections import BaseConfig, Sampling
from lowalign.errors import UserError


@dataclass(frozen=True)
class LabelConfig(Checked):
    """People judge answers on a local web page; the judgements are rows for reward and dpo.

    The answers are those in the data, or are sampled from policies: with --adapter (repeated), with --model, or both. They are
    shown without their origin and in random order. The same command goes on where it stopped.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FILE.jsonl")]
    """The rows. A judgement is in it, and on the disk, before the next prompt is shown."""
    data: JudgedRowsConfig = field(default_factory=JudgedRowsConfig)
    adapter: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="POLICY")] = ()
    """A policy that answers: a run, an adapter folder or a Hub id, or `base` (also `off`). Repeat the flag for several."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one that the first run names."""
    n: PositiveInt | None = None
    """Answers of each policy to each prompt. Default: 1 with several policies, 2 with one."""
    by: Literal["pick", "rank", "rate"] | None = None
    """pick: choose the best answer. rank: put all in order. rate: give each 1 to 5. Default: pick for two answers, rank for more."""
    annotator: str = ""
    """The name that the page proposes. Several people open the same address and give their own."""
    port: Annotated[int, Range(0, 65_535)] = 0
    """Port of the page on 127.0.0.1. 0: one that is free."""
    open: bool = True
    """Open the page in the browser."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512))
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.files:
            raise UserError("no data: give --data FILE…")
        if self.n is not None and not self.samples:
            raise UserError("--n is the number of answers of a policy: give --adapter POLICY or --model M")
        if self.samples and self.answers < 2:
            raise UserError("a judgement needs two answers: give another --adapter, or --n 2 or more")
        if self.samples and self.sampling.temperature == 0 and self.answers > len(self.policies):
            raise UserError(
                "with --sampling.temperature 0 all answers of a policy are the same: raise it, or give --n 1"
            )

    @property
    def samples(self) -> bool:
        """Whether policies answer."""
        return bool(self.adapter or self.model)

    @property
    def policies(self) -> tuple[str, ...]:
        """Those that answer, each once."""
        return tuple(dict.fromkeys(self.adapter)) or ("base",)

    @property
    def answers(self) -> int:
        """The number of answers to each prompt."""
        return len(self.policies) * (self.n or (1 if len(self.policies) > 1 else 2))
