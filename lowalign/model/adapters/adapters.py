"""Many adapters of any kind on one frozen base.

Which adapters are active (`use`) and which are trained (`train_only`) are two separate things.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Self

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lowalign.errors import UserError
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.adapter import SCALAR_HEAD, Adapter
from lowalign.model.adapters.flat import FlatWeights
from lowalign.model.adapters.kinds import KINDS, kind_of
from lowalign.model.adapters.lora import linear_names
from lowalign.model.base.base import Base


class Adapters:
    """Adapters by name on one base. Make it with a Base; add, load, save and delete adapters; use them in any mix.

    LoRAs and deltas stack (their updates add up); at most one soft prompt (prompt or prefix tuning) is active at a time.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.active: tuple[str, ...] = ()
        self.trained: tuple[str, ...] = ()
        self.adapters: dict[str, Adapter] = {}
        self._find_layers()
        self._activate(())

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, config: PeftConfig) -> None:
        """Add a fresh adapter: peft's LoraConfig (rsLoRA and DoRA too), PromptTuningConfig or PrefixTuningConfig.

        A LoRA starts as the identity. Raises UserError when the name is taken or the config does not fit the base.
        """
        if name in self.adapters or name in getattr(self.base.model, "peft_config", {}):
            raise UserError(f'there is an adapter "{name}" already; delete it first')
        if not name or not name.replace("-", "_").isidentifier() or name in linear_names(self.base.model):
            raise UserError(
                f'"{name}" cannot be the name of an adapter; use letters, digits, - and _, and no layer\'s name'
            )
        self.adapters[name] = kind_of(config)(self.base, name, config)
        self._find_layers()
        # peft activates and unfreezes what it injects.
        self._activate(self.active)
        self.train_only(*self.trained)

    def add_scalar_head(self, name: str, zero: bool = False) -> None:
        """Give the adapter a scalar head, (1, hidden) in fp32, that is trained and saved with it.

        It starts with a variance of 1/(hidden + 1) (arXiv 2009.01325, appendix B.1), or at zero.
        """
        adapter = self._adapter(name)
        width = self.base.model.config.get_text_config().hidden_size
        start = torch.zeros(1, width) if zero else torch.randn(1, width) / (width + 1) ** 0.5
        adapter.compute_in_full_precision()  # a flat buffer, if there is one, has no place for the head
        adapter.scalar_head = nn.Parameter(start.to(self.base.device), requires_grad=name in self.trained)

    def has_scalar_head(self, name: str) -> bool:
        """Whether the adapter has a scalar head."""
        return name in self.adapters and self.adapters[name].scalar_head is not None

    def scalar_head(self, name: str) -> nn.Parameter:
        """The scalar head of an adapter, (1, hidden). Raises UserError when it has none."""
        head = self._adapter(name).scalar_head
        if head is None:
            raise UserError(f'adapter "{name}" has no scalar head; give one that `lowalign reward` trained')
        return head

    def load(self, name: str, folder_or_hub_id: str | Path, allow_base_mismatch: bool = False) -> dict:
        """Load an adapter folder (ours or stock peft's, a run's folder, or a Hub id). Returns its lowalign.json.

        On a 16-bit base a LoRA computes with a 16-bit copy, as when it was trained; `weights` and `save` have its fp32
        weights. Raises UserError when it was trained on another base, has weights missing or too many, or is not safetensors.
        """
        folder = adapter_files.locate(folder_or_hub_id)
        stored, meta = adapter_files.read(folder)
        if not allow_base_mismatch:
            adapter_files.check_base(folder, meta, self.base.identity)
        stored.kind.prepare_loaded(stored.config)
        self.add(name, stored.config)
        if any(key.endswith(SCALAR_HEAD) for key in stored.tensors):
            self.add_scalar_head(name, zero=True)
        try:
            parameters = self.adapters[name].file_parameters()
            shapes = {k: tuple(p.shape) for k, p in parameters.items()}
            adapter_files.check_keys(folder, shapes, {k: tuple(t.shape) for k, t in stored.tensors.items()})
        except UserError:
            self.delete(name)
            raise
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(stored.tensors[key])
        self.adapters[name].compute_as_trained()
        return meta

    def save(
        self,
        name: str,
        folder: str | Path,
        *,
        parents: Sequence[str] = (),
        files: dict[str, str] | None = None,
        scalar_head: bool = True,
        **meta: object,
    ) -> None:
        """Write the adapter as a folder that stock peft loads bit for bit.

        parents: adapters it was trained on top of; they are written inside. files: texts to write beside it.
        scalar_head: False leaves it out. meta: more entries of its lowalign.json.
        """
        stored = [self._stored(name, scalar_head), *map(self._stored, parents)]
        adapter_files.write(Path(folder), stored[0], self.base, stored[1:], files or {}, meta)

    def delete(self, name: str) -> None:
        """Remove an adapter; the others and the base keep every bit."""
        adapter = self._adapter(name)
        if name in self.active:
            raise UserError(f'adapter "{name}" is active; leave `use` before deleting it')
        adapter.remove()
        del self.adapters[name]
        self.trained = tuple(n for n in self.trained if n != name)

    def delete_all(self) -> None:
        """Leave the base without adapters, for a caller that goes on with it."""
        for name in tuple(self.adapters):
            self.delete(name)

    # -- what is active, what is trained ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def use(self, *names: str) -> Iterator[Self]:
        """Within it exactly these adapters act; without a name, the bare base. What is trained does not change."""
        adapters = [self._adapter(name) for name in names]
        soft = [adapter.name for adapter in adapters if adapter.soft]
        if len(soft) > 1:
            raise UserError(f"{' and '.join(soft)} are both soft prompts; at most one can be active")
        for one, other in combinations(adapters, 2):
            if both := one.replaces() & other.replaces():
                raise UserError(
                    f"{one.name} and {other.name} cannot be active together: both replace {min(both)} of the base"
                )
        for adapter in adapters:
            if adapter.parked:
                adapter.move(self.base.device)
                adapter.parked = False
        before = self.active
        self._activate(names)
        try:
            yield self
        finally:
            self._activate(before)

    def train_only(self, *names: str) -> None:
        """Train exactly these adapters; what is active does not change."""
        for name in names:
            self._adapter(name)
        self.trained = names
        for name in self.adapters:
            for p in self.parameters(name):
                p.requires_grad_(name in names)

    def park(self, name: str) -> None:
        """Move an idle adapter and its gradients to CPU memory; `use` brings it back. No bit changes."""
        adapter = self._adapter(name)
        if name in self.active:
            raise UserError(f'adapter "{name}" is active; leave `use` before parking it')
        adapter.move(torch.device("cpu"))
        adapter.parked = True

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's weights as the model uses them."""
        return list(self._adapter(name).named_parameters().values())

    def weights(self, name: str) -> dict[str, Tensor]:
        """The adapter's weights by name, in the precision they are trained in."""
        return self._adapter(name).weights()

    def flat(self, name: str) -> FlatWeights:
        """The adapter's weights as one fp32 buffer for an optimizer; made at the first call.

        A LoRA on a 16-bit base computes with a 16-bit copy of it, which is faster and halves the activations' memory.
        """
        adapter = self._adapter(name)
        if adapter.flat is None:
            adapter.compute_in_full_precision()
            dtype = self.base.dtype if adapter.working_copy else torch.float32
            adapter.flat = FlatWeights(adapter.named_parameters(), dtype, keep_fp32=(SCALAR_HEAD,))
        return adapter.flat

    # -- inside -------------------------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            there = ", ".join(self.adapters) or "none yet"
            raise UserError(f'there is no adapter "{name}"; there are: {there}')
        return self.adapters[name]

    def _find_layers(self) -> None:
        """The layers that carry adapters, by kind; those of another host on the same base too."""
        self._layers = {kind: kind.layers(self.base.model) for kind in KINDS}

    def _activate(self, names: tuple[str, ...]) -> None:
        for kind, layers in self._layers.items():
            kind.activate(layers, [name for name in names if isinstance(self.adapters[name], kind)])
        self.active = tuple(names)

    def _stored(self, name: str, scalar_head: bool = True) -> adapter_files.StoredAdapter:
        adapter = self._adapter(name)
        tensors = {k: t for k, t in adapter.file_tensors().items() if scalar_head or not k.endswith(SCALAR_HEAD)}
        return adapter_files.StoredAdapter(type(adapter), adapter.file_config(), tensors)
