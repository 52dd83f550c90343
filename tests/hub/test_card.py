"""The model card: metadata that the Hub's own library reads, code that runs, nothing of this machine."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lowalign import Base, Host
from lowalign.cli import main
from lowalign.errors import UserError
from lowalign.hub.artefact import open_artefact
from lowalign.hub.card import GENERATED, CardFacts, make_card
from lowalign.hub.push import push
from lowalign.model.policy import load_policy
from lowalign.report.plot import metrics_plot
from lowalign.report.recipe_summary import changed_options
from tests.hub.conftest import BASE, TEMPLATE
from tests.hub_stub import Repo

REPO = "me/thing"
IDS = torch.randint(5, 300, (1, 24), generator=torch.Generator().manual_seed(1))


def card_of(hub) -> ModelCard:
    return ModelCard(hub.files(REPO)["README.md"].decode())


def code_of(hub, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)


EXPECTED = {
    "run": ("peft", "adapter", "text-generation", ["lowalign", "sft", "lora"]),
    "second": ("peft", "adapter", "text-generation", ["lowalign", "dpo", "lora"]),
    "prefix": ("peft", "adapter", "text-generation", ["lowalign", "sft", "prefix-tuning"]),
    "reward": ("peft", "adapter", "text-classification", ["lowalign", "reward", "lora", "reward-model"]),
    "merged": ("transformers", "finetune", "text-generation", ["lowalign", "sft"]),
    "classifier": ("transformers", "finetune", "text-classification", ["lowalign", "reward", "reward-model"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_metadata(base_hub, artefacts, name):
    push(artefacts.folder / name, REPO)
    data = card_of(base_hub).data
    library, relation, task, tags = EXPECTED[name]
    assert (data.library_name, data.base_model_relation, data.pipeline_tag, data.tags) == (
        library,
        relation,
        task,
        tags,
    )
    assert data.base_model == BASE
    assert (data.license, data.license_name) == ("other", "tiny")
    assert data.license_link == f"https://huggingface.co/{BASE}/blob/main/LICENSE"
    assert data.datasets == (["them/rows"] if name == "run" else None)
    assert artefacts.commit in base_hub.files(REPO)["README.md"].decode()


def test_training_metrics_and_plot(base_hub, artefacts):
    push(artefacts.run, REPO)
    text = base_hub.files(REPO)["README.md"].decode()
    training = yaml.safe_load(code_of(base_hub, "yaml")[0])
    assert training == {"model": BASE, "data": {"files": ["rows.jsonl", "them/rows:train"]}, "adapter": {"r": 4}}
    assert (
        "| loss | 1.25 |" in text
        and "| training steps | 3 |" in text
        and "![Metrics by training step](metrics.svg)" in text
    )
    picture = ET.fromstring(base_hub.files(REPO)["metrics.svg"])
    (line,) = picture.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 1  # the evaluation
    heights = [float(point.split(",")[1]) for point in line.get("points").split()]
    assert len(heights) == 3 and heights == sorted(heights)  # the loss falls, y grows downward


def test_one_panel_a_metric_and_none_for_nothing(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert metrics_plot(file) is None
    file.write_text('{"step": 1, "loss": 2.0}\n')
    assert metrics_plot(file) is None
    lines = [{"step": i, "reward": i / 7, "kl": None if i == 2 else 0.5, "eval/reward": 0.1} for i in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[]\nnot json\n")
    picture = ET.fromstring(metrics_plot(file))
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}g"))) == 2
    counts = [len(p.get("points").split()) for p in picture.iter("{http://www.w3.org/2000/svg}polyline")]
    assert sorted(counts) == [4, 5, 5]


def expected_logits(adapters):
    host = Host(Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True))
    stack = load_policy(host, adapters)
    with torch.no_grad(), host.use(*stack):
        return host.base.model(IDS).logits


@pytest.mark.parametrize("name", ["run", "second", "merged"])
def test_the_code_of_the_card_loads_what_was_trained(base_hub, artefacts, name):
    """Stock peft and transformers by Hub id; logits against the Host's."""
    push(artefacts.folder / name, REPO)
    expected = expected_logits([str(artefacts.run if name == "merged" else artefacts.folder / name)])
    blocks = code_of(base_hub, "python")
    assert len(blocks) == (2 if name == "run" else 1)
    for code in blocks:
        scope: dict = {}
        exec(code, scope)
        with torch.no_grad():
            logits = scope["model"].float().eval()(IDS).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # seen: below 1e-5
        if "tokenizer" in scope:
            assert scope["tokenizer"].chat_template == TEMPLATE
    assert not torch.allclose(expected, expected_logits([]), atol=0.1)


@pytest.mark.parametrize("name", ["reward", "classifier"])
def test_a_reward_model_by_its_card(base_hub, artefacts, name):
    push(artefacts.folder / name, REPO)
    host = Host(Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True))
    (stack,) = load_policy(host, [str(artefacts.reward)])
    with torch.no_grad(), host.use(stack):
        hidden = host.base.model.model(IDS).last_hidden_state[:, -1]
    expected = hidden @ load_file(artefacts.reward / "adapter_model.safetensors")["base_model.model.score.weight"].T
    scope: dict = {}
    exec(code_of(base_hub, "python")[0], scope)
    with torch.no_grad():
        score = scope["model"].float().eval()(IDS).logits
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_lowalign_loads_by_id(base_hub, artefacts, capsys, tmp_path):
    push(artefacts.second, REPO)
    (command,) = code_of(base_hub, "bash")
    assert command.startswith(f"lowalign generate --model {BASE} --adapter {REPO} --base.revision {artefacts.commit}")
    words = [word.strip('"') for word in command.split()[1:]]
    options = ["--sampling.max-new-tokens", "2", "--base.quantization", "none", "--base.device", "cpu"]
    assert main([*words, *options]) == 0
    assert "completion" in json.loads(capsys.readouterr().out.splitlines()[-1])
    torch.testing.assert_close(expected_logits([REPO]), expected_logits([str(artefacts.second)]), rtol=0, atol=0)


def test_an_adapter_that_only_lowalign_stacks(base_hub, artefacts, tmp_path):
    shutil.copytree(artefacts.prefix, tmp_path / "prefix")
    shutil.copytree(artefacts.run / "adapter", tmp_path / "prefix" / "parents" / "0")
    meta = json.loads((tmp_path / "prefix" / "lowalign.json").read_text()) | {"parents": 1}
    (tmp_path / "prefix" / "lowalign.json").write_text(json.dumps(meta))
    push(tmp_path / "prefix", REPO)
    assert code_of(base_hub, "python") == [] and "only lowalign loads the whole" in card_of(base_hub).text


def test_an_adapter_that_only_lowalign_knows(artefacts):
    artefact = replace(
        open_artefact(artefacts.second), config={"peft_type": "BITDELTA"}, files=("adapter_config.json",)
    )
    card = make_card(artefact, CardFacts(REPO, {}, False), None)
    assert "library_name: lowalign" in card and "base_model_relation: adapter" in card and "- bitdelta" in card
    assert "```python" not in card and f"lowalign generate --model {BASE} --adapter {REPO}" in card


def test_a_base_that_was_a_folder(hub, artefacts, tmp_path):
    shutil.copytree(artefacts.run / "adapter", tmp_path / "adapter")
    meta = json.loads((tmp_path / "adapter" / "lowalign.json").read_text())
    meta["base"] |= {"name": "my-llama", "revision": None}
    (tmp_path / "adapter" / "lowalign.json").write_text(json.dumps(meta))
    push(tmp_path / "adapter", REPO)
    data = card_of(hub).data
    assert data.base_model is None and data.license is None  # the Hub would look for a model of that name
    assert "`my-llama` stands for the folder or the Hub id of the base." in card_of(hub).text


def test_a_license_that_cannot_be_read(hub, artefacts, capsys):
    push(artefacts.run, REPO)  # the base is not on this Hub
    assert f"the license of {BASE} is not known (there is no such repository" in capsys.readouterr().err
    assert card_of(hub).data.license is None


def test_the_users_card_is_kept(base_hub, artefacts, tmp_path):
    shutil.copytree(artefacts.run / "adapter", tmp_path / "adapter")
    own = "---\nlicense: mit\ntags:\n- mine\n- base_model:adapter:/home/somebody/llama\nbase_model: /home/somebody/llama\n---\n# Mine\n\nText.  \n"
    (tmp_path / "adapter" / "README.md").write_text(own)
    push(tmp_path / "adapter", REPO)
    card = card_of(base_hub)
    assert card.text == "# Mine\n\nText.  \n" and card.data.license == "mit"
    assert card.data.tags == ["mine", "lowalign", "sft", "lora"]
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    assert b"somebody" not in base_hub.files(REPO)["README.md"]
    (tmp_path / "adapter" / "README.md").write_bytes(base_hub.files(REPO)["README.md"])
    sent = base_hub.files(REPO)["README.md"]
    base_hub.repos["me/again"] = Repo()
    push(tmp_path / "adapter", "me/again")
    assert base_hub.files("me/again")["README.md"] == sent  # nothing is missing any more
    (tmp_path / "adapter" / "README.md").write_text("# No metadata\n")
    push(tmp_path / "adapter", REPO)
    assert card_of(base_hub).text == "# No metadata\n" and card_of(base_hub).data.base_model == BASE
    (tmp_path / "adapter" / "README.md").write_text("---\n[: \n---\n")
    with pytest.raises(UserError, match=r"the metadata of README\.md cannot be read"):
        push(tmp_path / "adapter", REPO)


def test_a_card_that_was_edited_on_the_hub(base_hub, artefacts):
    push(artefacts.run, REPO)
    generated = base_hub.files(REPO)["README.md"]
    base_hub.repos[REPO].add(**{"README.md": generated.replace(b"1.25", b"9.99")})
    push(artefacts.run, REPO)
    assert base_hub.files(REPO)["README.md"] == generated
    base_hub.repos[REPO].add(**{"README.md": generated.replace(GENERATED.encode(), b"My own words.")})
    push(artefacts.run, REPO)
    assert base_hub.files(REPO)["README.md"] == generated.replace(GENERATED.encode(), b"My own words.")
    base_hub.repos[REPO].add(**{"README.md": b"Newer words."})
    base_hub.fail("(HEAD|GET) .*/resolve/.*/README.md", 503, times=1000)  # what cannot be read might be the user's
    with pytest.raises(UserError, match="the Hub answered 503"):
        push(artefacts.run, REPO)
    base_hub.faults.clear()
    assert base_hub.files(REPO)["README.md"] == b"Newer words."
    base_hub.repos[REPO].add(
        **{"README.md": b"---\nlicense: mit\n---\n"}
    )  # as the Hub's form for a new repository makes it
    push(artefacts.run, REPO)
    assert card_of(base_hub).data.license == "mit" and card_of(base_hub).text.lstrip().startswith("# thing")


def test_recipes_that_are_none():
    assert changed_options(None) == changed_options("[") == changed_options("text") == {}
    assert changed_options("data: 3") == {"data": 3}
    assert changed_options("verb: gone\nout: x\nr: 4") == {"r": 4}
    assert changed_options("verb: sft\ndata:\n  eval_rows: 0\n  limit: 3\n  new: 1") == {"data": {"limit": 3, "new": 1}}
