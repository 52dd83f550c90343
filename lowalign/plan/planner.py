"""The plan of a verb: what it needs as configured, and the largest setting that fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from lowalign.config.commands import BestOfNConfig
from lowalign.config.training import PPOConfig
from lowalign.plan.dry_run import DryRun
from lowalign.plan.figures import Figures
from lowalign.plan.meta_base import meta_base
from lowalign.plan.search import largest
from lowalign.plan.verbs import Config, run_phases

GRAIN = 128  # tokens
RANKS = 8  # grain of --adapter.r
MOST_RANK = 512
MOST_TOKENS = 2**15  # of a micro-batch; a larger one is no faster


class Setting(NamedTuple):
    """What a search changes. length: of an example, as --data.max-length counts it."""

    length: int
    token_budget: int


class Planner:
    """Dry runs of one verb on one architecture. device: the type of device that is planned for."""

    def __init__(self, architecture: PretrainedConfig, config: Config, device: str = "cuda") -> None:
        self.architecture, self.config, self.device = architecture, config, device
        self._known: dict[tuple, Figures] = {}

    def setting(self, length: int | None) -> Setting:
        """The configured setting; with a length, a micro-batch of one example of that length."""
        c = self.config
        if length is not None:
            return Setting(length, 0)
        return Setting(c.data.max_length, c.token_budget if isinstance(c, BestOfNConfig) else c.train.token_budget)

    def figures(self, setting: Setting, **changes: Any) -> Figures:
        """Run the phases of one step. changes: r, and options of train."""
        key = (setting, *sorted(changes.items()))
        if key not in self._known:
            config = self._changed(**changes)
            base = meta_base(self.architecture, config.base)
            run = DryRun(base, config.sft.train if isinstance(config, BestOfNConfig) else config.train, self.device)
            tokens = run_phases(run, config, *setting)
            self._known[key] = Figures.of(run, *setting, tokens, config.base.leave_free)
        return self._known[key]

    @property
    def trains(self) -> bool:
        """Whether the verb has a backward pass, in which activations can be kept elsewhere."""
        return not isinstance(self.config, BestOfNConfig)

    @property
    def positions(self) -> int:
        """The longest example that the model has positions for."""
        most = getattr(self.architecture.get_text_config(), "max_position_embeddings", None) or 2**20
        config = self.config
        return most - config.sampling.max_new_tokens if isinstance(config, PPOConfig | BestOfNConfig) else most

    def longest(self, vram: int, **changes: Any) -> int | None:
        """The longest example that fits alone in a micro-batch; None when none does."""
        return self._largest(lambda n: Setting(n, 0), vram, (GRAIN, self.positions, GRAIN), **changes)

    def token_budget(self, vram: int, length: int, **changes: Any) -> int | None:
        """The largest token budget that fits with examples of this length, as a multiple of it."""
        return self._largest(lambda n: Setting(length, n), vram, (length, max(MOST_TOKENS, length), length), **changes)

    def rank(self, vram: int, setting: Setting, **changes: Any) -> int | None:
        """The largest --adapter.r that fits at this setting."""
        memory = lambda r: self.figures(setting, r=r, **changes).needed  # noqa: E731
        return largest(memory, vram, RANKS, MOST_RANK, RANKS)

    def _largest(self, setting: Callable[[int], Setting], vram: int, bounds: tuple[int, int, int], **changes: Any):
        return largest(lambda n: self.figures(setting(n), **changes).needed, vram, *bounds)

    def keep_layers(self, vram: int, setting: Setting, **changes: Any) -> int | None:
        """The most layers that can keep their activations at this setting; None when it does not fit at all."""
        layers = self.architecture.get_text_config().num_hidden_layers
        memory = lambda n: self.figures(setting, **changes | {"keep_layers": n}).needed  # noqa: E731
        return largest(memory, vram, 0, layers, 1)

    def _changed(self, r: int | None = None, **train: Any) -> Config:
        config = self.config
        if train:
            config = replace(config, train=replace(config.train, **train))
        return replace(config, adapter=replace(config.adapter, r=r)) if r else config
