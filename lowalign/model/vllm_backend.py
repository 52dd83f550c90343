"""Sampling by vLLM (`--sampling.backend vllm`), written to its documented API and tested against a stub of it; not run on a card.

vLLM loads the base a second time, in 4 bit where ours is, and gets the active LoRAs as one folder. What it draws differs from
our sampler's draws, as its kernels and its random numbers do; training recomputes all log-probs.
https://docs.vllm.ai/en/latest/features/lora/ and …/features/sleep_mode/
"""

import hashlib
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lowalign.config.sections import Sampling
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.adapter import Adapter
from lowalign.model.adapters.lora import Lora
from lowalign.model.base.base import Base
from lowalign.model.sampling.batcher import Completion, PromptTask, SampledModel
from lowalign.model.sampling.sample import prompt_tasks

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for; a LoRA takes the next larger one
_lora_ids = count(1)  # vLLM keeps adapters by id: changed weights need another one


def vllm_sample(
    base: Base,
    adapters: Sequence[Adapter],
    sampled: SampledModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """As `sample_batched`, under these adapters, by vLLM. It sleeps between two calls, with its weights in CPU memory.

    Completion.logprobs are vLLM's, after temperature, top-k and top-p. Raises UserError without vLLM, for a base that it cannot
    load, for adapters other than LoRAs, and for a prompt that does not fit in --sampling.batch-tokens with its completion.
    """
    names = _lora_names(adapters)
    tasks = prompt_tasks(sampled, prompts, n, sampling, seeds)
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or sampling.batch_tokens
    longest = min(sampling.batch_tokens, positions)
    for task in tasks:
        if task.length + task.limit > longest:
            raise UserError(
                f"prompt {task.index} takes {task.length + task.limit:,} tokens with its completion, more than vLLM is given room "
                f"for; raise --sampling.batch-tokens ({sampling.batch_tokens:,}) or shorten it"
            )
    config, tensors = stacked_lora(base.model, names) if names else (None, {})
    options = {
        "model": str(base.folder), "dtype": str(base.dtype).removeprefix("torch."), "max_model_len": longest,
        "max_num_seqs": sampling.max_rows, "gpu_memory_utilization": sampling.vllm_memory,
    }  # fmt: skip
    if base.identity.quantization == "nf4":
        options["quantization"] = "bitsandbytes"
    engine = _engine(options, _rank(config.r) if config else RANKS[0])
    sampled.check()
    with tempfile.TemporaryDirectory() as folder:
        if config:
            config.save_pretrained(folder)
            save_file(tensors, Path(folder, "adapter_model.safetensors"))
        outputs = engine.generate(tasks, n, sampling, sampled.eos_ids, folder if config else None)
    sampled.check()
    return outputs


def stacked_lora(model: nn.Module, names: Sequence[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Several LoRAs as one with scale 1, which stock peft loads: Σ_i s_i B_i A_i = [s_1 B_1 …] [A_1; …].

    -> its config and its weights by their names in a file, fp32. Raises UserError for DoRA and for LoRAs on embeddings.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        if any(name in layer.lora_variant or name in layer.lora_embedding_A for name in names):
            raise UserError(
                f"vLLM takes plain LoRAs of linear layers; {path} has another kind: use --sampling.backend lowalign"
            )
        own = [name for name in names if name in layer.lora_A]
        if own:
            a = torch.cat([layer.lora_A[name].weight.detach().float() for name in own])
            b = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.detach().float() for name in own], 1)
            pairs[path] = a, b
    rank = max(len(a) for a, _ in pairs.values())
    tensors = {}
    for path, (a, b) in pairs.items():
        missing = rank - len(a)  # layers that fewer of them adapt: vLLM wants one rank
        tensors[f"base_model.model.{path}.lora_A.weight"] = F.pad(a, (0, 0, 0, missing)).cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = F.pad(b, (0, missing)).cpu().contiguous()
    targets = sorted({path.rpartition(".")[2] for path in pairs})
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM"), tensors


def _lora_names(adapters: Sequence[Adapter]) -> list[str]:
    for adapter in adapters:
        if not isinstance(adapter, Lora):
            kind = "a soft prompt" if adapter.soft else f"a {adapter.peft_type} adapter"
            raise UserError(f'"{adapter.name}" is {kind}, which vLLM cannot be given; use --sampling.backend lowalign')
    return [adapter.name for adapter in adapters]


def _rank(rank: int) -> int:
    """The size of vLLM's LoRA buffers."""
    fitting = [r for r in RANKS if r >= rank]
    if not fitting:
        raise UserError(f"the active LoRAs have rank {rank} together, and vLLM takes at most {RANKS[-1]}; use --sampling.backend lowalign")  # fmt: skip
    return fitting[0]


class _Engine:
    """One vLLM engine; asleep between calls. options: that it was made with. rank: of the LoRAs that it has room for."""

    def __init__(self, vllm: Any, request: Any, llm: Any, options: dict[str, Any], rank: int) -> None:
        self.vllm, self.request, self.llm, self.asleep = vllm, request, llm, False
        self.options, self.rank = options, rank

    def generate(
        self, tasks: Sequence[PromptTask], n: int, sampling: Sampling, eos_ids: Sequence[int], folder: str | None
    ) -> list[list[Completion]]:
        """n completions of each prompt, under the LoRA in this folder."""
        if self.asleep:
            self.llm.wake_up()
        number = next(_lora_ids)
        lora = self.request(f"lowalign-{number}", number, folder) if folder else None
        try:
            outputs = self.llm.generate(
                [{"prompt_token_ids": task.ids} for task in tasks],
                [self._params(task, n, sampling, eos_ids) for task in tasks],
                use_tqdm=False,
                lora_request=lora,
            )
        finally:
            self.llm.sleep(level=1)
            self.asleep = True
        ordered = [sorted(output.outputs, key=lambda o: o.index) for output in outputs]
        return [[_completion(o) for o in group] for group in ordered]

    def _params(self, task: PromptTask, n: int, sampling: Sampling, eos_ids: Sequence[int]) -> Any:
        # vLLM gives sample j of a prompt the seed plus j.
        digest = hashlib.sha256(f"{sampling.seed} {task.seed}".encode()).digest()
        return self.vllm.SamplingParams(
            n=n, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, max_tokens=task.limit,
            min_tokens=min(sampling.min_new_tokens, task.limit), stop_token_ids=list(eos_ids), ignore_eos=True,
            seed=int.from_bytes(digest[:4], "big") >> 1, logprobs=0, detokenize=False,
        )  # fmt: skip


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, torch.tensor(logprobs), output.finish_reason == "stop")


_running: list[_Engine] = []  # at most one, for all hosts on the base


def _engine(options: dict[str, Any], rank: int) -> _Engine:
    """The running engine if it was made with these options. Raises UserError when vLLM is missing, or does not load the base."""
    if _running and _running[0].options == options and _running[0].rank >= rank:
        return _running[0]
    _running.clear()
    try:
        import vllm
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(f'--sampling.backend vllm needs vLLM ({error}): pip install "lowalign[vllm]"') from error
    folder = options["model"]
    log(f"vLLM loads {folder} with {options['gpu_memory_utilization']:.0%} of the card (--sampling.vllm-memory)")
    try:
        llm = vllm.LLM(
            enable_lora=True, max_loras=1, max_lora_rank=rank, enable_sleep_mode=True, trust_remote_code=False,
            generation_config="vllm", logprobs_mode="processed_logprobs", **options,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"vLLM {getattr(vllm, '__version__', '')} cannot load {folder}: {reason}. Use --sampling.backend lowalign, or another "
            "--sampling.vllm-memory if it ran out of memory"
        ) from error
    _running.append(_Engine(vllm, LoRARequest, llm, options, rank))
    return _running[0]
