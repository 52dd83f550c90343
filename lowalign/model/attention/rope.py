"""Rotary embeddings whose factors change with the longest position of a forward; what such a forward may hold together."""

from transformers import PretrainedConfig


def rope_scaling(config: PretrainedConfig) -> tuple[str | None, int]:
    """-> the kind, and the length from which on it changes. (None, 0) for a model whose RoPE is fixed.

    "longrope" switches its factors when a forward passes the original length; "dynamic" stretches with the very length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # A model may have one for each type of layer.
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)} & {"longrope", "dynamic"}
    if not kinds:
        return None, 0
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return ("dynamic" if "dynamic" in kinds else "longrope"), original
