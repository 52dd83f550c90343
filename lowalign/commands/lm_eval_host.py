"""The Host as a model of lm-eval, so that `lowalign eval --tasks` runs its benchmarks on adapters of the loaded base.

lm-eval asks for the log-probabilities of continuations, and whether each is the greedy one. Continuations of one context,
such as the answers of a multiple-choice question, are one Example: the context is computed once. What is computed equals
lm-eval's own backend for transformers, `lm_eval.models.huggingface.HFLM`: the same tokens, the same cuts.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lowalign.config.evaluation import EvalConfig
from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.micro_batches import in_micro_batches
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import progress
from lowalign.model.forward.logprob import LOGIT_ROWS, LMHead
from lowalign.model.host import Host
from lowalign.model.policy import Stack

MAX_NEW_TOKENS = 256  # where a task does not say, as in HFLM
Scored = tuple[float, bool]  # log-probability, and whether it is the greedy continuation


class TaskRunner:
    """The tasks of one command."""

    def __init__(self, config: EvalConfig) -> None:
        """Raises UserError for tasks that lm-eval does not know."""
        self.config = config
        self.names = [name.strip() for name in config.tasks.split(",") if name.strip()]
        if not self.names:
            raise UserError("--tasks names no task: give --tasks NAME,NAME…")
        if config.task_folder and not config.task_folder.is_dir():
            raise UserError(f"--task-folder {config.task_folder} is not a folder")
        self.manager = TaskManager(include_path=config.task_folder and str(config.task_folder))
        if unknown := [name for name in self.names if not self.manager.match_tasks([name])]:
            raise UserError(f"lm-eval has no task {', '.join(unknown)} (`lm-eval ls tasks` lists them)")

    def __call__(self, host: Host, stack: Stack, chat: Chat) -> dict[str, Any]:
        """The metrics under the adapters of the stack, by task."""
        c = self.config
        with host.use(*stack):
            results = simple_evaluate(
                HostLM(host, chat, c.token_budget),
                tasks=self.names,
                task_manager=self.manager,
                num_fewshot=c.fewshot,
                limit=c.limit,
                apply_chat_template=c.chat_template,
                log_samples=False,
            )
        return {task: {k: v for k, v in m.items() if k != "alias"} for task, m in results["results"].items()}


class HostLM(TemplateLM):
    """What lm-eval asks of a model, under the adapters that are active in the host. chat: its template."""

    def __init__(self, host: Host, chat: Chat, token_budget: int) -> None:
        super().__init__()
        self.host, self.token_budget = host, token_budget
        self.tokenizer = copy.copy(host.base.tokenizer)
        self.tokenizer.chat_template = chat.template
        self.max_length = resolve_max_length(host.base.model.config, self.tokenizer) - host.soft_prompt().length
        self._device = host.base.device

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of the cache of requests."""
        return self.host.base.identity.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; with the tokenizer's own bos unless the text begins with it."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length tokens."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logp
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Of requests (text, context ids, continuation ids). Each context is computed once."""
        grouped: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation):,} tokens; the model has {self.max_length:,} positions"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, and needs no position
            owners = grouped.setdefault(tuple(context[-room:]), {})
            owners.setdefault(tuple(continuation), []).append(i)
        examples = {id(e): (e, owners) for e, owners in map(_example, grouped.items())}
        results: list[Scored] = [(0.0, True)] * len(requests)
        with progress(not disable_tqdm, total=len(requests), unit="request") as bar:

            def compute(batch: list[Example]) -> None:
                for example, scores in zip(batch, self._scored(batch), strict=True):
                    for owners, score in zip(examples[id(example)][1], scores, strict=True):
                        for i in owners:
                            results[i] = score
                        bar.update(len(owners))

            in_micro_batches([e for e, _ in examples.values()], self.token_budget, compute)
        return results

    def _scored(self, batch: Sequence[Example]) -> Iterable[list[Scored]]:
        """For each Example, for each completion."""
        head = LMHead.of(self.host.base.model)
        for example, states in zip(batch, self.host.states(batch), strict=True):
            labels = torch.tensor([t for c in example.completions for t in c], device=states.device)
            logps, greedy = [], []
            for hidden, label in zip(states.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True):
                logits = head.logits(hidden)
                logps.append(logits.log_softmax(-1).gather(1, label[:, None])[:, 0])
                greedy.append(logits.argmax(-1) == label)
            lengths = [len(c) for c in example.completions]
            parts = zip(torch.cat(logps).split(lengths), torch.cat(greedy).split(lengths), strict=True)
            yield [(logp.sum().item(), bool(same.all())) for logp, same in parts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, greedy unless the task samples."""
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(i)
        texts = [""] * len(requests)
        for own in by_options.values():
            contexts = [requests[i].args[0] for i in own]
            for i, text in zip(own, self._generated(contexts, dict(requests[own[0]].args[1])), strict=True):
                texts[i] = text
        return texts

    def _generated(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Of contexts with the same options of the task."""
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        stops = handle_stop_sequences(options.get("until"), eos=self.tokenizer.decode(self.eot_token_id))
        new_tokens = options["max_gen_toks"]
        if new_tokens >= self.max_length:
            raise UserError(
                f"the task generates up to {new_tokens:,} tokens; the model has {self.max_length:,} positions"
            )
        prompts = [self.tok_encode(context)[-(self.max_length - new_tokens) :] for context in contexts]
        known = {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
        sampling = Sampling(max_new_tokens=new_tokens, temperature=options.get("temperature") or 0.0, **known)
        decode = self.tokenizer.decode
        longest = 16 + 4 * max(map(len, stops))  # tokens: a character of a byte-level vocabulary may have four

        def ended(ids: Sequence[int]) -> bool:
            tail = decode(ids[-longest:])
            # Cut off from what stands before it, a tail may read differently.
            return any(s in tail for s in stops) and any(s in decode(ids) for s in stops)

        completions = self.host.generate(prompts, 1, sampling, stop=ended)
        texts = [decode(c.ids, skip_special_tokens=True) for (c,) in completions]
        return [postprocess_generated_text(text, stops, None) for text in texts]


def _example(group: tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]) -> tuple[Example, list[list[int]]]:
    """A context and its continuations -> the Example, and the requests that ask for each completion."""
    context, owners = group
    return Example(list(context), [list(c) for c in owners]), list(owners.values())
