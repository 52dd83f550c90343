"""Many adapters of any kind on one frozen base.

Which adapters are active (`use`) and which are trained (`train_only`) are two separate things.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn

from lowalign.errors import UserError
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters import lora, soft
from lowalign.model.adapters.flat import FlatWeights
from lowalign.model.base.base import Base


class Adapters:
    """Adapters by name on one base. Make it with a Base; add, load, save and delete adapters; use them in any mix.

    LoRAs stack (their updates add up); at most one soft prompt (prompt or prefix tuning) is active at a time.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.configs: dict[str, PeftConfig] = {}
        self._encoders: dict[str, nn.Module] = {}
        self._heads: dict[str, nn.Parameter] = {}
        self._flat: dict[str, FlatWeights] = {}
        self._parked: set[str] = set()
        self._carriers = lora.layers(base.model)  # an earlier host's, if there was one
        self._all_linear = lora.linear_names(base.model)
        self._activate(())

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, config: PeftConfig) -> None:
        """Add a fresh adapter: peft's LoraConfig (rsLoRA and DoRA too), PromptTuningConfig or PrefixTuningConfig.

        A LoRA starts as the identity. Raises UserError when the name is taken or the config does not fit.
        """
        if name in self.configs or name in getattr(self.base.model, "peft_config", {}):
            raise UserError(f'there is an adapter "{name}" already; delete it first')
        if not name or not name.replace("-", "_").isidentifier() or name in self._all_linear:
            raise UserError(
                f'"{name}" cannot be the name of an adapter; use letters, digits, - and _, and no layer\'s name'
            )
        if isinstance(config, LoraConfig):
            self.configs[name] = lora.inject(self.base.model, name, config, self._all_linear)
            self._carriers = lora.layers(self.base.model)
            self.base.model.train(self.base.model.training)  # new layers come in train mode, with their dropout on
        elif isinstance(config, PromptTuningConfig | PrefixTuningConfig):
            self._encoders[name], self.configs[name] = soft.encoder(name, config, self.base.model, self.base.tokenizer)
        else:
            kind = getattr(config, "peft_type", type(config).__name__)
            raise UserError(f"{kind} is not supported; use LoraConfig, PromptTuningConfig or PrefixTuningConfig")
        # peft activates and unfreezes what it injects.
        self._activate(self.active)
        self.train_only(*self.trained)

    def add_head(self, name: str, zero: bool = False) -> None:
        """Give the adapter a scalar head, (1, hidden) in fp32, that is trained and saved with it.

        It starts with a spread of 1/(hidden + 1) (arXiv 2009.01325, appendix), or at zero.
        """
        self._check((name,))
        width = self.base.model.config.get_text_config().hidden_size
        start = torch.zeros(1, width) if zero else torch.randn(1, width) / (width + 1)
        self._heads[name] = nn.Parameter(start.to(self.base.device), requires_grad=name in self.trained)
        self._flat.pop(name, None)

    def has_head(self, name: str) -> bool:
        """Whether the adapter has a scalar head."""
        return name in self._heads

    def load(self, name: str, folder_or_hub_id: str | Path, allow_base_mismatch: bool = False) -> dict:
        """Load an adapter folder (ours or stock peft's, a run's folder, or a Hub id). Returns its lowalign.json.

        Raises UserError when it was trained on another base, misses weights, has weights too many, or is not safetensors.
        """
        folder = adapter_files.locate(folder_or_hub_id)
        adapter, meta = adapter_files.read(folder)
        config, tensors = adapter.config, adapter.tensors
        if isinstance(config, LoraConfig):
            config.lora_dropout = 0.0  # noise of another training; policy and reference would differ by it
        if not allow_base_mismatch:
            adapter_files.check_base(folder, meta, self.base.identity)
        if isinstance(config, PrefixTuningConfig):
            config.prefix_projection = False  # the file holds the prefix itself
        if isinstance(config, PromptTuningConfig):
            config.prompt_tuning_init = "RANDOM"
        self.add(name, config)
        if any(key.endswith(adapter_files.HEAD) for key in tensors):
            self.add_head(name, zero=True)
        try:
            named = self._file_names(name)
            shapes = {k: tuple(p.shape) for k, p in named.items()}
            adapter_files.check_keys(folder, shapes, {k: tuple(t.shape) for k, t in tensors.items()})
        except UserError:
            self.delete(name)
            raise
        with torch.no_grad():
            for key, parameter in named.items():
                parameter.copy_(tensors[key])
        return meta

    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        parents: Sequence[str] = (),
        files: dict[str, str] | None = None,
        head: bool = True,
        **meta: object,
    ) -> None:
        """Write the adapter as a folder that stock peft loads bit for bit.

        parents: adapters it was trained on top of; they are written inside. files: texts to write beside it. head: False
        leaves its scalar head out. meta: more entries of its lowalign.json.
        """
        wanted = [self._as_file(name, head), *map(self._as_file, parents)]
        adapter_files.write(Path(folder), wanted[0], self.base.identity, wanted[1:], files or {}, meta)

    def delete(self, name: str) -> None:
        """Remove an adapter; the others and the base keep every bit."""
        self._check((name,))
        if name in self.active:
            raise UserError(f'adapter "{name}" is active; leave `use` before deleting it')
        if self._encoders.pop(name, None) is None:
            lora.remove(self.base.model, name)
        self._heads.pop(name, None)
        self._flat.pop(name, None)
        self._parked.discard(name)
        del self.configs[name]
        self.trained = tuple(n for n in self.trained if n != name)

    # -- what is active, what is trained ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(self, *names: str) -> Iterator[Self]:
        """Within it exactly these adapters act; without a name, the bare base. What is trained does not change."""
        self._check(names)
        prompts = [n for n in names if n in self._encoders]
        if len(prompts) > 1:
            raise UserError(f"{' and '.join(prompts)} are both soft prompts; at most one can be active")
        for name in self._parked.intersection(names):
            self._move(name, self.base.device)
        before = self.active
        self._activate(names)
        try:
            yield self
        finally:
            self._activate(before)

    def train_only(self, *names: str) -> None:
        """Exactly these adapters learn; what is active does not change."""
        self._check(names)
        self.trained = names
        for name in self.configs:
            for p in self.parameters(name):
                p.requires_grad_(name in names)

    def park(self, name: str) -> None:
        """Move an idle adapter and its gradients to CPU memory; `use` brings it back. No bit changes."""
        self._check((name,))
        if name in self.active:
            raise UserError(f'adapter "{name}" is active; leave `use` before parking it')
        self._move(name, torch.device("cpu"))
        self._parked.add(name)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's weights as the model uses them."""
        return list(self._named(name).values())

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights by name, in the precision they are trained in."""
        return self._flat[name].tensors() if name in self._flat else dict(self._named(name))

    def flat(self, name: str) -> FlatWeights:
        """The adapter's weights as one fp32 buffer for an optimizer; made at the first call.

        A LoRA on a 16-bit base computes with a 16-bit copy of it, which is faster and takes half the activations.
        """
        self._check((name,))
        if name not in self._flat:
            low = self.base.dtype if name not in self._encoders and self.base.dtype != torch.float32 else None
            self._flat[name] = FlatWeights(self._named(name), low, exact=(adapter_files.HEAD,))
        return self._flat[name]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _move(self, name: str, device: torch.device) -> None:
        if name in self._flat:
            self._flat[name].move(device)
        else:
            for p in self.parameters(name):
                p.data = p.data.to(device)
        self._parked.discard(name)

    def _activate(self, names: tuple[str, ...]) -> None:
        lora.activate(self._carriers, [n for n in names if n not in self._encoders])
        self.active = tuple(names)

    def _named(self, name: str) -> dict[str, nn.Parameter]:
        self._check((name,))
        head = {adapter_files.HEAD: self._heads[name]} if name in self._heads else {}
        if name in self._encoders:
            return dict(self._encoders[name].named_parameters()) | head
        return lora.weights(self.base.model, name) | head

    def _as_file(self, name: str, head: bool = True) -> adapter_files.Adapter:
        self._check((name,))
        if name in self._encoders:
            tensors = {"prompt_embeddings": soft.flattened(self._encoders[name], self.configs[name])}
            if name in self._heads:
                tensors[adapter_files.SOFT_PREFIX + adapter_files.HEAD] = self.weights(name)[adapter_files.HEAD]
        else:
            tensors = {adapter_files.PREFIX + key: t for key, t in self.weights(name).items()}
        if not head:
            tensors = {key: t for key, t in tensors.items() if not key.endswith(adapter_files.HEAD)}
        return adapter_files.Adapter(self.configs[name], tensors)

    def _file_names(self, name: str) -> dict[str, nn.Parameter]:
        if name in self._encoders:
            named = {"prompt_embeddings": self._encoders[name].embedding.weight}
            if name in self._heads:
                named[adapter_files.SOFT_PREFIX + adapter_files.HEAD] = self._heads[name]
            return named
        return {adapter_files.PREFIX + key: p for key, p in self._named(name).items()}

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.configs:
                there = ", ".join(self.configs) or "none yet"
                raise UserError(f'there is no adapter "{name}"; there are: {there}')
