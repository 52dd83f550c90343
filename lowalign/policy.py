"""The policy that a command samples from: adapters that act together, and the chat template they were trained with."""

from collections.abc import Sequence

from lowalign.model.adapter_files import locate
from lowalign.model.host import Host
from lowalign.model.start import load_stack


def load_policy(host: Host, adapters: Sequence[str], allow_base_mismatch: bool = False) -> tuple[str, ...]:
    """Load runs, adapter folders or Hub ids, each with what it was trained on top of -> their names, as they stack."""
    return tuple(
        name
        for i, adapter in enumerate(adapters)
        for name in load_stack(host, f"adapter{i}", adapter, allow_base_mismatch)
    )


def adapter_template(adapters: Sequence[str]) -> str | None:
    """The chat template that was written with the last adapter that has one."""
    for adapter in reversed(adapters):
        file = locate(adapter) / "chat_template.jinja"
        if file.exists():
            return file.read_text(encoding="utf-8")
    return None
