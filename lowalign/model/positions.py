"""How many tokens a row may have: the base's positions, less the virtual tokens before each prompt."""

from collections.abc import Sequence
from pathlib import Path

from lowalign.config.sections import AdapterConfig
from lowalign.model.adapters import files
from lowalign.model.adapters.kinds import BY_OPTION
from lowalign.model.attention.rope import last_position
from lowalign.model.base.hub import TOKENIZER_FILES, load_config, resolve


def usable_positions(
    base: str | Path, revision: str | None = None, adapters: Sequence[str] = (), fresh: AdapterConfig | None = None
) -> int | None:
    """Tokens of a row, prompt and completion, on this base under each of these adapters; None where there is no limit.

    base: folder or Hub id, of which config.json is read. fresh: an adapter that is added. Raises UserError.
    """
    folder, _ = resolve(str(base), revision, TOKENIZER_FILES)
    positions = last_position(load_config(folder).get_text_config())
    if positions is None:
        return None
    stored = [files.read(files.locate(adapter))[0] for adapter in adapters]
    virtual = [adapter.config.num_virtual_tokens for adapter in stored if adapter.kind.soft]
    if fresh and BY_OPTION[fresh.kind].soft:
        virtual.append(fresh.virtual_tokens)
    return positions - max(virtual, default=0)
