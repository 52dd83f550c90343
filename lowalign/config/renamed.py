"""Options that had another name in an earlier release. The old names work, with a notice, for one release."""

import sys

RENAMED = {  # since 0.2; to be deleted in 0.3
    "ppo.lam": "ppo.gae_lambda",
    "ppo.stop_at_kl": "ppo.target_kl",
    "rollout.show": "rollout.log_samples",
}


def warn(old: str, new: str) -> None:
    """Tell the user, on stderr, of the new name of an option."""
    print(f"{old} is now {new}; the old name will stop working in the next release", file=sys.stderr)
