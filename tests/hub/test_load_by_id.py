"""What was pushed, used by its Hub id in lowalign: base, adapter, reward run, merge, BitDelta. (Stock libraries: test_card.py.)"""

import json

import torch
from safetensors.torch import load_file

from lowalign import Base, Example, Host, merge
from lowalign.cli import main
from lowalign.export.bitdelta import compress
from lowalign.hub.pull import pull
from lowalign.hub.push import push
from lowalign.model.policy import load_policy
from tests.hub.conftest import BASE
from tests.hub.test_card import IDS, code_of, expected_logits

REPO = "me/thing"


def load(name):
    return Base.load(name, quantization="none", dtype="float32", device="cpu", quiet=True)


def test_a_merged_model_as_base(base_hub, artefacts):
    commit = push(artefacts.merged, REPO)
    base = load(REPO)
    assert (base.identity.name, base.identity.revision) == (REPO, commit)
    with torch.no_grad():
        logits = base.model(IDS).logits
    torch.testing.assert_close(logits, expected_logits([str(artefacts.run)]), rtol=1e-4, atol=1e-4)


def test_a_reward_run(base_hub, artefacts, tmp_path, monkeypatch, capsys):
    push(artefacts.reward, REPO)
    host = Host(load(BASE))
    examples = [Example([5, 6, 7], [[8, 9], [10, 11, 12]])]
    scores = []
    for adapter in (REPO, str(artefacts.reward)):
        (name,) = load_policy(host, [adapter])
        with torch.no_grad(), host.use(name):
            scores.append(host.scores(examples, name)[0])
        host.delete(name)
    assert torch.equal(*scores) and scores[0].abs().min() > 0
    monkeypatch.chdir(tmp_path)
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (command,) = code_of(base_hub, "bash")
    assert command.startswith(f"lowalign score --model {BASE} --adapter {REPO}")
    assert main([*command.split()[1:], "--base.quantization", "none", "--base.device", "cpu"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out.splitlines()[0])["score"], float)


def test_merge_takes_the_base_at_the_commit_of_the_training(base_hub, artefacts, tmp_path):
    push(artefacts.run, REPO)
    weights = (artefacts.merged / "model.safetensors").read_bytes()
    base_hub.repos[BASE].add(**{"model.safetensors": weights})  # its main has moved on
    report = merge([REPO], tmp_path / "out", dtype="float32", onto="original", verify=False)
    assert report["base"] == {
        "name": BASE,
        "revision": artefacts.commit,
        "weights": json.loads((artefacts.run / "adapter" / "lowalign.json").read_text())["base"]["weights"],
    }
    ours, local = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", artefacts.merged))
    assert ours.keys() == local.keys() and all(torch.equal(ours[key], local[key]) for key in ours)


def test_a_merge_in_four_bits(base_hub, artefacts, tmp_path):
    merge([str(artefacts.run)], tmp_path / "nf4", model=BASE, quantize="nf4", onto="original", verify=False)
    push(tmp_path / "nf4", REPO)
    assert "| weights | 4 bit (NF4), quantized after the merge |" in base_hub.files(REPO)["README.md"].decode()
    sent = base_hub.files(REPO)["model.safetensors"]
    assert sent == (tmp_path / "nf4" / "model.safetensors").read_bytes()


def test_a_bitdelta(base_hub, artefacts, tmp_path):
    compress(BASE, str(artefacts.merged), tmp_path / "delta", onto="original")
    commit = push(tmp_path / "delta", REPO)
    card = base_hub.files(REPO)["README.md"].decode()
    assert "A BitDelta for [them/tiny-llama]" in card and "library_name: lowalign" in card and "```python" not in card
    assert pull(REPO, tmp_path / "back") == commit
    by_id, pulled, bare = (expected_logits(adapters) for adapters in ([REPO], [str(tmp_path / "back")], []))
    assert torch.equal(by_id, pulled) and torch.equal(by_id, expected_logits([str(tmp_path / "delta")]))
    assert not torch.allclose(by_id, bare, atol=1e-3)
