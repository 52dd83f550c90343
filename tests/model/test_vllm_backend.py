"""The vLLM backend against a stub of vLLM's documented API, which computes with stock transformers and stock peft."""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM

from lowalign import Base, Host, Sampling
from lowalign.errors import UserError
from lowalign.model import vllm_backend
from tests.tiny import tiny_folder

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [16, 17, 18]]
GREEDY = Sampling(temperature=0, max_new_tokens=12, backend="vllm", batch_tokens=64, max_rows=4)


@dataclass
class SamplingParams:
    """The fields that the backend may set."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    made: ClassVar[list["LLM"]] = []
    refuses = ""

    def __init__(
        self, model: str, *, dtype, max_model_len, max_num_seqs, gpu_memory_utilization, enable_lora, max_loras,
        max_lora_rank, enable_sleep_mode, trust_remote_code, generation_config, logprobs_mode, quantization=None,
    ):  # fmt: skip
        if self.refuses:
            raise ValueError(self.refuses)
        assert enable_lora and enable_sleep_mode and not trust_remote_code and generation_config == "vllm"
        assert max_lora_rank in vllm_backend.RANKS and logprobs_mode == "processed_logprobs"
        self.options = {
            "rank": max_lora_rank,
            "length": max_model_len,
            "rows": max_num_seqs,
            "quantization": quantization,
        }
        self.folder, self.dtype, self.asleep, self.requests, self.params = model, dtype, False, [], []
        LLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert level == 1 and not self.asleep
        self.asleep = True

    def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert not self.asleep
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, trust_remote_code=False)
        if lora_request:
            assert lora_request.lora_int_id not in [r.lora_int_id for r in self.requests]
            self.requests.append(lora_request)
            config = LoraConfig.from_pretrained(lora_request.lora_path)
            assert config.r <= self.options["rank"]
            model = PeftModel.from_pretrained(model, lora_request.lora_path)
        self.params += sampling_params
        pairs = zip(prompts, sampling_params, strict=True)
        return [self._request(model.eval(), prompt["prompt_token_ids"], p) for prompt, p in pairs]

    def _request(self, model, prompt, p):
        assert len(prompt) + p.max_tokens <= self.options["length"]
        outputs = [self._sample(model, prompt, p, j) for j in range(p.n)]
        return types.SimpleNamespace(prompt_token_ids=prompt, outputs=outputs[::-1])

    @torch.no_grad()
    def _sample(self, model, prompt, p, j):
        ids, logprobs, random = [], [], torch.Generator().manual_seed(p.seed + j)
        while len(ids) < p.max_tokens and not (ids and ids[-1] in p.stop_token_ids):
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            if len(ids) < p.min_tokens:
                logits[p.stop_token_ids] = -torch.inf
            logp = (logits / (p.temperature or 1)).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=random) if p.temperature else logp.argmax())
            ids.append(token)
            logprobs.append({token: types.SimpleNamespace(logprob=float(logp[token]))})
        reason = "stop" if ids[-1] in p.stop_token_ids else "length"
        return types.SimpleNamespace(index=j, token_ids=tuple(ids), logprobs=logprobs, finish_reason=reason)


@pytest.fixture
def vllm(monkeypatch):
    stub, lora, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    stub.LLM, stub.SamplingParams, stub.__version__, request.LoRARequest = LLM, SamplingParams, "0.99", LoRARequest
    for module in (stub, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    LLM.made.clear()
    vllm_backend._running.clear()
    yield LLM
    vllm_backend._running.clear()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Two LoRAs with different ranks, scales and layers, and a soft prompt."""
    folder = tiny_folder(tmp_path_factory.mktemp("base"), "llama")
    host = Host(Base.load(folder, "none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("a", LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False))
    host.add("b", LoraConfig(r=8, use_rslora=True, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    host.add("soft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return host


@pytest.mark.parametrize("names,rank", [((), 8), (("a",), 8), (("a", "b"), 16)])
def test_greedy_equals_our_own_sampler(names, rank, host, vllm):
    """The stack reaches stock peft as one folder, and ends where ours ends."""
    own = Sampling(temperature=0, max_new_tokens=12)
    with host.use(*names):
        want = host.generate(PROMPTS, 2, own)
        got = host.generate(PROMPTS, 2, GREEDY)
    assert [[c.ids for c in cs] for cs in got] == [[c.ids for c in cs] for cs in want]
    for a, b in zip(got, want, strict=True):
        assert [c.stopped for c in a] == [c.stopped for c in b]
        assert all((x.logprobs - y.logprobs).abs().max() <= 1e-4 for x, y in zip(a, b, strict=True))
    assert vllm.made[0].options == {"rank": rank, "length": 64, "rows": 4, "quantization": None}
    assert len(vllm.made[0].requests) == bool(names) and all(
        not Path(r.lora_path).exists() for r in vllm.made[0].requests
    )


def test_one_engine_that_gets_the_weights_of_each_round(host, vllm):
    """It sleeps between two rounds. Changed weights come with another id, under which vLLM keeps them."""
    drawn = Sampling(max_new_tokens=12, backend="vllm", batch_tokens=64, seed=3)
    with host.use("a"):
        first, again = host.generate(PROMPTS, 2, drawn, [7, 8]), host.generate(PROMPTS, 2, drawn, [7, 8])
        with torch.no_grad():
            for p in host.parameters("a"):
                p.mul_(3)
        later = host.generate(PROMPTS, 2, drawn, [7, 8])
        with torch.no_grad():
            for p in host.parameters("a"):
                p.div_(3)
    ids = lambda groups: [[c.ids for c in group] for group in groups]  # noqa: E731
    assert ids(first) == ids(again) != ids(later)
    assert first[0][0].ids != first[0][1].ids
    (engine,) = vllm.made
    assert engine.asleep and len(engine.requests) == 3
    assert len({p.seed for p in engine.params}) == 2


def test_ends_and_least_lengths(host, vllm):
    (free,) = host.generate(PROMPTS[:1], 1, GREEDY)[0]
    eos, before = free.ids[3], host.base.eos_ids
    host.base.eos_ids = (eos,)
    try:
        (ended,) = host.generate(PROMPTS[:1], 1, GREEDY)[0]
        (longer,) = host.generate(PROMPTS[:1], 1, Sampling(**{**vars(GREEDY), "min_new_tokens": 6}))[0]
    finally:
        host.base.eos_ids = before
    assert ended.ids == free.ids[: free.ids.index(eos) + 1] and ended.stopped
    assert eos not in longer.ids[:6]


def test_refusals(host, vllm, monkeypatch):
    run = lambda **options: host.generate(PROMPTS, 1, Sampling(**{**vars(GREEDY), **options}))  # noqa: E731
    with host.use("soft"), pytest.raises(UserError, match='"soft" is a soft prompt, which vLLM cannot be given'):
        run()
    with pytest.raises(
        UserError, match=r"prompt 0 takes 17 tokens with its completion.*--sampling.batch-tokens \(16\)"
    ):
        run(max_new_tokens=10, batch_tokens=16)
    with pytest.raises(UserError, match="vllm-memory is 0"):
        run(vllm_memory=0.0)
    with pytest.raises(UserError, match="takes no `stop`"):
        host.generate(PROMPTS, 1, GREEDY, stop=lambda ids: True)
    monkeypatch.setattr(LLM, "refuses", "Model architectures ['TinyForCausalLM'] are not supported\nfor now")
    with pytest.raises(
        UserError, match=r"vLLM 0.99 cannot load .*: Model architectures \['TinyForCausalLM'\] are not supported\. Use"
    ):
        run()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r'needs vLLM .*: pip install "lowalign\[vllm\]"'):
        run()


def test_loras_that_vllm_does_not_have(host, vllm, monkeypatch):
    host.add("dora", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    host.add("wide", LoraConfig(r=600, target_modules=["q_proj"]))
    try:
        with host.use("dora"), pytest.raises(UserError, match="plain LoRAs of linear layers"):
            host.generate(PROMPTS, 1, GREEDY)
        with host.use("wide"), pytest.raises(UserError, match="rank 600 together, and vLLM takes at most 512"):
            host.generate(PROMPTS, 1, GREEDY)
    finally:
        host.delete("dora")
        host.delete("wide")
