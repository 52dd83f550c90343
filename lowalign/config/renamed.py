"""Options that had another name in an earlier release. The old names work, with a notice, for one release."""

import sys

RENAMED = {  # since 0.2; to be deleted in 0.3
    "ppo.lam": "ppo.gae_lambda",
    "ppo.stop_at_kl": "ppo.target_kl",
    "rollout.show": "rollout.log_samples",
    "prompts": "data.files",
    "prompt_format": "data.prompt_format",
    "limit": "data.limit",
    "max_prompt": "data.max_length",
    "max_length": "data.max_length",
    "on_error": "data.on_error",
    "revision": "base.revision",
    "max_new_tokens": "sampling.max_new_tokens",
    "min_new_tokens": "sampling.min_new_tokens",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "seed": "sampling.seed",
    "max_rows": "sampling.max_rows",
    "batch_tokens": "sampling.batch_tokens",
}


def warn(old: str, new: str) -> None:
    """Tell the user, on stderr, of the new name of an option."""
    print(f"{old} is now {new}; the old name will stop working in the next release", file=sys.stderr)
