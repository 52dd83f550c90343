"""What a user publishes: a run, a stack, a reward run, their merges. All on a base that the stub of the Hub has."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PrefixTuningConfig

from lowalign import Base, Host, merge
from lowalign.config.dump import dump
from lowalign.config.sections import AdapterConfig, DataConfig
from lowalign.config.training import SFTConfig
from tests.hub_stub import HUB, HubStub, Repo
from tests.tiny import tiny_folder

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
BASE = "them/tiny-llama"
BASE_CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n"


@dataclass(frozen=True)
class Artefacts:
    """Folders by name: `run`, `second` (on top of the run's adapter), `prefix`, `reward`, `merged`, `classifier`. commit: of
    the base on the Hub, whose folder is `base`."""

    folder: Path
    commit: str
    repo: Repo

    def __getattr__(self, name: str) -> Path:
        return self.folder / name


def add_folder(hub: HubStub, repo: str, folder: Path) -> str:
    """Put a folder on the Hub, as small files. Returns the commit."""
    hub.repos.setdefault(repo, Repo())
    return hub.repos[repo].add(**{p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artefacts]:
    folder = tmp_path_factory.mktemp("artefacts")
    tiny_folder(folder / "base", "llama")
    (folder / "base" / "README.md").write_text(BASE_CARD)
    HUB.clear()
    commit = add_folder(HUB, BASE, folder / "base")
    with pytest.MonkeyPatch.context() as patch, HUB:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        host = Host(Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True))
        made = Artefacts(folder, commit, HUB.repos[BASE])
        _make_adapters(made, host)
        merge([str(folder / "run")], folder / "merged", dtype="float32", onto="original", verify=False)
        merge([str(folder / "reward")], folder / "classifier", dtype="float32", onto="original", verify=False)
    yield made


def _make_adapters(made: Artefacts, host: Host) -> None:
    data = made.folder / "private" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text("")
    config = SFTConfig(
        BASE, made.folder / "run", data=DataConfig((data.name, "them/rows:train")), adapter=AdapterConfig(r=4)
    )
    files = {"chat_template.jinja": TEMPLATE}
    torch.manual_seed(0)
    for name in ("adapter", "second", "reward"):
        host.add(name, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for key, tensor in host.weights(name).items():
            if "lora_B" in key:
                tensor.data.normal_(0, 0.05)
    host.add_scalar_head("reward")
    meta = {"method": "sft", "step": 3, "metrics": {"loss": 1.25}, "recipe": dump(config)}
    host.save("adapter", made.folder / "run" / "adapter", files=files, **meta)
    host.save("second", made.folder / "second", parents=["adapter"], files=files, method="dpo", step=5)
    host.save("reward", made.folder / "reward", files=files, method="reward", reward={"mean": 0.0, "std": 1.0})
    host.add("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("prefix", made.folder / "prefix", files=files, method="sft")
    lines = [{"step": i, "loss": 3 - i / 4, "lr": 1e-4} for i in range(1, 4)] + [{"step": 3, "eval/loss": 2.5}]
    run = made.folder / "run"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (run / "recipe.yaml").write_text(dump(config))
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "state.json").write_text(str(made.folder))


@pytest.fixture
def base_hub(hub: HubStub, artefacts: Artefacts) -> HubStub:
    """The Hub with the base on it."""
    hub.repos[BASE] = copy.deepcopy(artefacts.repo)
    return hub
