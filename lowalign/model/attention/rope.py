"""Rotary embeddings (RoPE) whose frequencies change with the longest position of a forward."""

from transformers import PretrainedConfig


def rope_scaling(config: PretrainedConfig) -> tuple[str | None, int]:
    """-> (kind, the length from which on the frequencies change); (None, 0) for a model with fixed frequencies.

    "longrope" switches its factors once a forward passes that length; "dynamic" rescales with every longer length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # A model may have one set of parameters for each type of layer.
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)} & {"longrope", "dynamic"}
    if not kinds:
        return None, 0
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return ("dynamic" if "dynamic" in kinds else "longrope"), original


def last_position(config: PretrainedConfig) -> int | None:
    """How many positions a model has; None for one without that limit. config: of the text model."""
    # Dynamic RoPE continues beyond the positions in the config.
    return None if rope_scaling(config)[0] == "dynamic" else getattr(config, "max_position_embeddings", None) or None
