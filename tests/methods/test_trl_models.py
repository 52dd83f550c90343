"""Whole models: loss and gradients against trl's trainers, on the same rows in fp32.

Skipped where trl is not installed (pip install lowalign[bench]).
"""

from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lowalign import Base, Example, Host
from lowalign.config.sections import TrainConfig
from lowalign.config.training import DPOLossConfig, RewardLossConfig
from lowalign.methods.dpo import DPO
from lowalign.methods.kto import KTO
from lowalign.methods.reward_model import RewardModel
from tests.tiny import tiny_folder

pytest.importorskip("trl", minversion="1.16")

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardTrainer
from trl import RewardConfig as TRLRewardConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
ROWS = [
    {"prompt": "What is the capital?", "chosen": " Paris is the capital.", "rejected": " The lazy dog."},
    {"prompt": "The quick", "chosen": " brown fox jumps over the lazy dog.", "rejected": " dog is lazy."},
    {"prompt": "France? What is the", "chosen": " capital", "rejected": " quick brown fox jumps over Paris"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def host(folder) -> Host:
    """A LoRA with an update of its own, and a head, on a base in fp32."""
    host = Host(Base.load(folder, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("policy", LORA)
    with torch.no_grad():
        for p in host.parameters("policy"):
            p.add_(torch.randn_like(p) * 0.1)
    host.train_only("policy")
    return host


def trainer_of(kind: type, model, folder: Path, config, rows: list[dict], lora_config):
    """trl's trainer, in fp32 on the CPU, with all rows in one batch."""
    always = {"bf16": False, "use_cpu": True, "report_to": "none", "train_sampling_strategy": "sequential"}
    arguments = config(per_device_train_batch_size=len(rows), activation_checkpointing=False, **always)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(rows)
    return kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora_config)


def trl_loss(trainer, host: Host) -> tuple[Tensor, dict[str, Tensor]]:
    """Its loss on the only batch, and the gradients, with the weights of the host's adapter, under the names they have there."""
    named = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    weights = host.weights("policy")
    assert named.keys() == weights.keys()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(weights[name])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in named.items()}


def assert_same(method, examples: list[Example], trainer) -> None:
    """Loss and every gradient to 1e-5."""
    want, gradients = trl_loss(trainer, method.host)
    method.host.training("on")
    loss, _ = method.loss(examples, method.normalizers(examples))
    loss.backward()
    assert abs(loss - want) <= 1e-5 * want
    for name, p in method.host.weights("policy").items():
        norm = gradients[name].norm()
        assert norm > 0 and (p.grad - gradients[name]).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize(
    "kind, options, ours",
    [
        ("sigmoid", {}, {}),
        ("hinge", {}, {}),
        ("ipo", {}, {}),
        ("robust", {"label_smoothing": 0.1}, {"loss": "sigmoid", "label_smoothing": 0.1, "robust": True}),
    ],
)
def test_dpo_of_a_whole_model(folder, host, tmp_path, kind, options, ours):
    config = partial(DPOConfig, tmp_path, loss_type=[kind], beta=0.3, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trainer_of(DPOTrainer, model, folder, config, ROWS, LORA)
    examples = [
        Example(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]], rank=[0.0, 1.0])
        for row in trainer.train_dataset
    ]
    config = DPOLossConfig(**{"loss": kind, "beta": 0.3} | ours)
    assert_same(DPO(host, examples, ("policy",), (), config, TrainConfig(batch_size=len(ROWS))), examples, trainer)


def test_kto_of_a_whole_model(folder, host, tmp_path):
    """With two rows; of more, trl pairs each prompt with the completion before it, where here it is the one after it."""
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i == 0} for i, r in enumerate(ROWS[:2])]
    config = partial(KTOConfig, tmp_path, beta=0.3, desirable_weight=1.5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trainer_of(KTOTrainer, model, folder, config, rows, LORA)
    examples = [
        Example(row["prompt_ids"], [row["completion_ids"]], label=row["label"]) for row in trainer.train_dataset
    ]
    config = DPOLossConfig(loss="kto", beta=0.3, desirable=1.5)
    method = KTO(host, examples, ("policy",), (), config, TrainConfig(batch_size=len(rows), token_budget=1000))
    assert_same(method, examples, trainer)


def reward_trainer(folder, out, rows, **options) -> RewardTrainer:
    config = partial(TRLRewardConfig, out, **options)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    lora_config = replace(LORA, task_type="SEQ_CLS", modules_to_save=["score"])
    return trainer_of(RewardTrainer, model, folder, config, rows, lora_config)


def give_head(host: Host) -> None:
    """A head that gives scores of the size of trained ones."""
    host.add_scalar_head("policy")
    with torch.no_grad():
        host.weights("policy")["score.weight"].mul_(20)


@pytest.mark.parametrize("margins, centring", [(None, 0.0), ((0.0, 0.5, 1.5), 0.0), (None, 0.05)])
def test_reward_model_of_a_whole_model(folder, host, tmp_path, margins, centring):
    give_head(host)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, examples = [], []
    for row, margin in zip(ROWS, margins or (0.0,) * len(ROWS), strict=True):
        prompt, chosen, rejected = (tokenizer(row[key])["input_ids"] for key in ("prompt", "chosen", "rejected"))
        rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected})
        if margins:
            rows[-1]["margin"] = margin
        examples.append(Example(prompt, [chosen, rejected], rank=[0.0, 1.0], margin=margin))
    trainer = reward_trainer(folder, tmp_path, rows, center_rewards_coefficient=centring or None)
    config = RewardLossConfig(centring=centring)
    assert_same(
        RewardModel(host, examples, ("policy",), config, TrainConfig(batch_size=len(examples))), examples, trainer
    )


def test_a_ranking_is_its_pairs(folder, host, tmp_path):
    """Two rankings of four are what trl makes of their twelve pairs, each a row."""
    give_head(host)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, examples = [], []
    for first in (0, 2):
        prompt = tokenizer(ROWS[first]["prompt"])["input_ids"]
        texts = [row[side] for row in (ROWS[first], ROWS[1]) for side in ("chosen", "rejected")]
        answers = tokenizer(texts)["input_ids"]
        rows += [{"chosen_ids": prompt + a, "rejected_ids": prompt + b} for a, b in combinations(answers, 2)]
        examples.append(Example(prompt, answers, rank=[0.0, 1.0, 2.0, 3.0]))
    trainer = reward_trainer(folder, tmp_path, rows)
    assert_same(
        RewardModel(host, examples, ("policy",), RewardLossConfig(), TrainConfig(batch_size=2)), examples, trainer
    )
