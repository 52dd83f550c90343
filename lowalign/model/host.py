"""The host: many adapters of any kind on one frozen base.

Which adapters are active (`use`) and which are trained (`train_only`) are two separate things. A forward remembers the
adapters it ran under, so a backward taken while others are active recomputes what it should.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor, nn

from lowalign.config import Sampling
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model import adapter_files, lora, rows, soft
from lowalign.model.base import Base
from lowalign.model.flat import FlatWeights
from lowalign.model.forward import packed_logprobs
from lowalign.model.sampling import Completion, sample


class Host:
    """Adapters by name on one base. Make it with a Base; add, load, save and delete adapters; use them in any mix.

    LoRAs stack (their updates add up); at most one soft prompt (prompt or prefix tuning) is active at a time.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.configs: dict[str, PeftConfig] = {}
        self._encoders: dict[str, nn.Module] = {}
        self._flat: dict[str, FlatWeights] = {}
        self._parked: set[str] = set()
        self._carriers = lora.layers(base.model)  # an earlier host's, if there was one
        self._all_linear = lora.linear_names(base.model)
        self._offload = False
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

    def load(self, name: str, folder_or_hub_id: str | Path, allow_base_mismatch: bool = False) -> dict:
        """Load an adapter folder (ours or stock peft's, a run's folder, or a Hub id). Returns its lowalign.json.

        Raises UserError when it was trained on another base, misses weights, has weights too many, or is not safetensors.
        """
        folder = adapter_files.locate(folder_or_hub_id)
        adapter, meta = adapter_files.read(folder)
        config, tensors = adapter.config, adapter.tensors
        if not allow_base_mismatch:
            adapter_files.check_base(folder, meta, self.base.identity)
        if isinstance(config, PrefixTuningConfig):
            config.prefix_projection = False  # the file holds the prefix itself
        if isinstance(config, PromptTuningConfig):
            config.prompt_tuning_init = "RANDOM"
        self.add(name, config)
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
        **meta: object,
    ) -> None:
        """Write the adapter as a folder that stock peft loads bit for bit.

        parents: adapters it was trained on top of; they are written inside. files: texts to write beside it. meta: more
        entries of its lowalign.json.
        """
        wanted = [self._as_file(n) for n in (name, *parents)]
        adapter_files.write(Path(folder), wanted[0], self.base.identity, wanted[1:], files or {}, meta)

    def delete(self, name: str) -> None:
        """Remove an adapter; the others and the base keep every bit."""
        self._check((name,))
        if name in self.active:
            raise UserError(f'adapter "{name}" is active; leave `use` before deleting it')
        if self._encoders.pop(name, None) is None:
            lora.remove(self.base.model, name)
        self._flat.pop(name, None)
        self._parked.discard(name)
        del self.configs[name]
        self.trained = tuple(n for n in self.trained if n != name)

    # -- what is active, what is trained ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(self, *names: str) -> Iterator["Host"]:
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
            self._flat[name] = FlatWeights(self._named(name), low)
        return self._flat[name]

    def training(self, checkpointing: str | None) -> None:
        """Train mode with activations recomputed ("on"), kept ("off") or recomputed from CPU memory ("offload").

        None: evaluation mode.
        """
        model = self.base.model
        self._offload = checkpointing == "offload"
        model.train(checkpointing is not None)
        if checkpointing in ("on", "offload"):
            restore = lambda: (contextlib.nullcontext(), self.use(*self.active))  # noqa: E731
            _checkpoint(model, {"use_reentrant": False, "context_fn": restore})
        else:
            _checkpoint(model, None)

    # -- computing ----------------------------------------------------------------------------------------------------

    def logprobs(
        self, examples: Sequence[Example], supervised_only: bool = False, temperature: float = 1.0
    ) -> list[list[Tensor]]:
        """Log-probabilities under the active adapters: for each example, for each completion, (its length,) in fp32.

        0.0 for a first token without a prompt; with supervised_only, 0.0 for unsupervised tokens too, whose logits are
        then never computed.
        """
        virtual, prefix = self.soft_states()
        compute = packed_logprobs if self.base.packed else rows.row_logprobs
        pinned = self.base.device.type == "cuda"
        offload = torch.autograd.graph.save_on_cpu(pin_memory=pinned) if self._offload else contextlib.nullcontext()
        with offload:
            return compute(self.base.model, examples, virtual, prefix, supervised_only, temperature)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """n completions of each prompt (token ids) under the active adapters; a prompt is computed once for its n.

        seeds: one per prompt; a sample depends on (sampling.seed, its prompt's seed, its number) and on nothing else in
        the batch.
        """
        virtual, prefix = self.soft_states()
        run = sample if self.base.packed else rows.row_sample
        was_training = self.base.model.training
        self.base.model.eval()
        try:
            return run(
                self.base.model, prompts, n, sampling or Sampling(),
                eos_ids=self.base.eos_ids, virtual=virtual, prefix=prefix, seeds=seeds,
            )  # fmt: skip
        finally:
            self.base.model.train(was_training)

    def soft_states(self) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None]:
        """The active soft prompt as (virtual embeddings, None) or (None, prefix per layer); (None, None) without one."""
        for name in self.active:
            if name in self._encoders:
                module, config = self._encoders[name], self.configs[name]
                if isinstance(config, PrefixTuningConfig):
                    return None, soft.prefix_states(module, config)
                return soft.virtual_embeddings(module, config), None
        return None, None

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
        if name in self._encoders:
            return dict(self._encoders[name].named_parameters())
        return lora.weights(self.base.model, name)

    def _as_file(self, name: str) -> adapter_files.Adapter:
        self._check((name,))
        if name in self._encoders:
            tensors = {"prompt_embeddings": soft.flattened(self._encoders[name], self.configs[name])}
        else:
            tensors = {adapter_files.PREFIX + key: t for key, t in self.weights(name).items()}
        return adapter_files.Adapter(self.configs[name], tensors)

    def _file_names(self, name: str) -> dict[str, nn.Parameter]:
        if name in self._encoders:
            return {"prompt_embeddings": self._encoders[name].embedding.weight}
        return {adapter_files.PREFIX + key: p for key, p in self._named(name).items()}

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.configs:
                there = ", ".join(self.configs) or "none yet"
                raise UserError(f'there is no adapter "{name}"; there are: {there}')


def _checkpoint(model: nn.Module, options: dict | None) -> None:
    """Switch the recomputation of activations on, or off; transformers renamed it on its way through version 5."""
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if options is None:
        getattr(model, f"{prefix}_checkpointing_disable")()
    elif not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} cannot recompute activations; use --train.checkpointing off")
    else:
        getattr(model, f"{prefix}_checkpointing_enable")(**{f"{prefix}_checkpointing_kwargs": options})
