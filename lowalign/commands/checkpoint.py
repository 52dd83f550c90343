"""`lowalign checkpoint`: an adapter folder from a checkpoint of a run, finished or not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowalign.config import recipe
from lowalign.config.export import CheckpointConfig
from lowalign.config.training import RunConfig
from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import verb_in
from lowalign.data.chat import load_chat
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.adapter import SCALAR_HEAD
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import POLICY, start_policy
from lowalign.train import checkpoint as checkpoints
from lowalign.train.metrics import metrics_at
from lowalign.train.result import Chosen
from lowalign.train.run_folder import META, content_hashes, input_hashes, save_adapter


def checkpoint(config: CheckpointConfig) -> int:
    """Run the command. Returns the exit code."""
    if config.out.exists():
        raise UserError(f"{config.out} exists and is not overwritten; name another folder with --out")
    run, at = _split(config.run)
    settings, meta = _settings(run)
    step, weights = _weights(run, at)
    _refuse_changed_init(run, settings)
    device = {} if config.device is None else {"device": config.device}
    base = Base.load(config.model or settings.model, **vars(replace(settings.base, **device)))
    host = Host(base)
    policy, _ = start_policy(
        host, settings.adapter, settings.init, settings.init_mode, settings.train.seed, settings.allow_base_mismatch
    )
    if SCALAR_HEAD in weights and not host.has_scalar_head(policy[-1]):
        host.add_scalar_head(policy[-1], zero=True)
    host.flat(policy[-1]).load(weights)
    chosen, chat = Chosen(step, metrics_at(run, step), ""), load_chat(base.tokenizer, settings.data)
    save_adapter(host, policy, chat, settings, chosen, meta, config.out)
    log(f"the adapter in {config.out} has the weights of step {step}")
    return 0


def _split(source: str) -> tuple[Path, str | None]:
    """RUN@STEP or RUN@best -> the folder, and what follows the @. Raises UserError for a folder without checkpoints."""
    name, _, at = source.rpartition("@")
    run, at = (Path(name), at) if name and not Path(source).expanduser().is_dir() else (Path(source), None)
    run = run.expanduser()
    if at and at != "best" and not at.isdecimal():
        raise UserError(f"{source}: after @ comes a step or best, such as {name}@40")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} is not the folder of a run with checkpoints")
    return run, at


def _settings(run: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration of a run, and what its adapter's lowalign.json says besides the weights' own entries."""
    file = run / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{file} is missing, which says how the run was started")
    named = verb_in(file)
    config = next((verb.config for verb in verbs() if named and verb.name == named[0]), None)
    if config is None:
        raise UserError(f"{file} names no verb that trains an adapter")
    meta = {"method": named[0].split()[0]}
    if (run / META).is_file():  # runs of earlier versions have none
        meta |= json.loads((run / META).read_text())
    return recipe.parse(config, [], file), meta


def _weights(run: Path, at: str | None) -> tuple[int, dict[str, Tensor]]:
    """-> the step, and the policy's weights by name. at: a step or "best"; None: the newest checkpoint."""
    if at == "best":
        best = checkpoints.read_best(run)
        if best is None:
            raise UserError(f"{run} has no best weights: without held-out rows none are kept")
        step, weights = best
    else:
        found = checkpoints.at_step(run, int(at)) if at else checkpoints.newest_valid(run)
        if found is None:
            raise UserError(f"{run} has no checkpoint yet; go on with it: its own command and --resume")
        step, weights = found.step, found.read("weights")
    return step, checkpoints.by_adapter(weights)[POLICY]


def _refuse_changed_init(run: Path, settings: RunConfig) -> None:
    """The weights belong on the adapters that the run started from, as they were then."""
    file = run / "inputs.json"
    if settings.init and file.is_file():
        before = json.loads(file.read_text())
        for name, value in content_hashes(input_hashes((), (settings.init,))).items():
            if before.get(name) != value:
                raise UserError(f"{name}, which the run started from, has changed since: its checkpoints do not fit it")
