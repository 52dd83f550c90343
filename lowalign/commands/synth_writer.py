"""The rounds of `lowalign synth`: prompts, answers to them, and the best answer of each."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from lowalign.config.synth import SynthConfig
from lowalign.data.chat import Chat
from lowalign.data.cleaning.overlap import Known
from lowalign.data.prompt_template import PromptTemplate
from lowalign.data.prompts import PromptRow, prompt_ids
from lowalign.data.rows.answers import Answers
from lowalign.data.rows.turns import as_messages
from lowalign.data.seeds import Seed
from lowalign.errors import UserError
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_policy
from lowalign.rewards.judge_prompt import JudgePrompt
from lowalign.rewards.pairwise import ModelJudge, Pair, RewardJudge
from lowalign.rewards.rewards import RewardOptions, load_rewards

MARK = "###"  # begins the next part in text: what stands before it is the answer
MARK_TOKENS = 8  # tokens at the end of a completion in which the mark is looked for
SEED, ROW = "a seed", "an earlier row"  # what a new prompt may be like


class Writer:
    """Samples rounds. A round depends on the seeds, the rows of the rounds before, and its number alone."""

    def __init__(self, config: SynthConfig, seeds: Sequence[Seed], chat: Chat) -> None:
        self.config, self.seeds, self.chat = config, seeds, chat
        here = Path(__file__)
        prompt_file = config.prompt_template or here.with_name("synth_prompt.jinja")
        answer_file = config.answer_template or here.with_name("synth_answer.jinja")
        names = ("guidelines", "examples", "chat")
        self.ask_prompt = PromptTemplate(prompt_file, "template of --prompt-template", names, trim=True)
        self.ask_answer = PromptTemplate(answer_file, "template of --answer-template", ("prompt", *names), trim=True)
        self.guidelines = _read(config.guidelines)
        if "probe" not in self.ask_answer.render(prompt="probe", **self._values(seeds[:1])):
            raise UserError(
                f"{answer_file}: the model never sees the prompt; write {{{{ prompt }}}} at the place for it"
            )
        self.ask_prompt.render(**self._values(seeds[:1]))
        self.known = Known()
        self.known.add((seed.prompt for seed in seeds), SEED)
        self.rows: list[dict[str, Any]] = []
        self.host: Host | None = None
        self.texts = [self.guidelines, self.ask_prompt.text, self.ask_answer.text]
        self._recipe = {
            "model": config.model,
            "adapter": list(config.adapter),
            **dict(zip(("guidelines", "prompt_template", "answer_template"), map(_hash, self.texts), strict=True)),
            "temperature": config.sampling.temperature,
            "top_p": config.sampling.top_p,
            "seed": config.sampling.seed,
            "answers": config.answers,
        }

    def load(self, base: Base) -> None:
        """Put the adapters and the rewards onto the base."""
        config, self.host = self.config, Host(base)
        base.end_at(self.chat.end_of_turn)
        self.stack = load_policy(self.host, config.adapter, config.allow_base_mismatch)
        options = RewardOptions(config.allow_base_mismatch, config.allow_training_spread, config.token_budget)
        if config.reward:
            self.judge = RewardJudge(load_rewards(config.reward, self.host, self.chat, options), self.chat, config)
        else:
            question = JudgePrompt(Path(__file__).with_name("judge.jinja"))
            self.judge = ModelJudge(self.host, self.chat, self.stack, question, config)

    def close(self) -> None:
        """Leave the base without adapters."""
        if self.host:
            self.host.delete_all()

    def learn(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows of a round that is on the disk: later ones must differ from them."""
        self.rows += rows
        self.known.add((row["prompt"] for row in rows), ROW)

    def round(self, number: int) -> dict[str, Any]:
        """-> a line of rounds.jsonl."""
        dropped: Counter[str] = Counter()
        new, prompts = Known(), []
        batch = self.config.batch
        examples = [self._examples(f"{self.config.sampling.seed} {number} {k}") for k in range(batch)]
        asked = [self.ask_prompt.render(**self._values(own)) for own in examples]
        sampled = self._sample(asked, 1, range(number * batch, (number + 1) * batch), 0)
        for own, [(text, finished)] in zip(examples, sampled, strict=True):
            kind = "" if finished else "unfinished"
            kind = kind or ("" if text else "empty")
            for known in (self.known, new):
                kind = kind or known.nearest(text, self.config.max_similarity)[1]
            if kind:
                dropped[kind] += 1
                continue
            new.add([text], ROW)
            prompts.append((text, own))
        rows = self._answered(prompts, number, dropped) if prompts else []
        return {"round": number, "rows": rows, "dropped": dict(dropped)}

    def _answered(
        self, prompts: Sequence[tuple[str, list[Seed]]], number: int, dropped: Counter[str]
    ) -> list[dict[str, Any]]:
        asked = [self.ask_answer.render(prompt=prompt, **self._values(own)) for prompt, own in prompts]
        start = number * self.config.batch
        sampled = self._sample(asked, self.config.answers, range(start, start + len(asked)), 1)
        rows = []
        for (prompt, own), answers in zip(prompts, sampled, strict=True):
            texts = list(dict.fromkeys(text for text, finished in answers if finished and text))
            if not texts:
                dropped["unanswered"] += 1
                continue
            best, score = self._best(prompt, texts)
            recipe = self._recipe | {"round": number, "examples": [seed.source for seed in own]}
            row = {"prompt": prompt, "completion": texts[best], "source": f"synth:{self.config.guidelines.name}"}
            rows.append(row | ({} if score is None else {"reward": score}) | {"recipe": recipe})
        return rows

    def _best(self, prompt: str, texts: list[str]) -> tuple[int, float | None]:
        """-> the answer that wins most comparisons with the others, the first of equals; and its reward, where it has one."""
        if len(texts) == 1:
            return 0, None
        chat = self.config.ask == "chat"
        answers = [as_messages(text, "assistant") for text in texts] if chat else texts
        row = Answers(as_messages(prompt) if chat else prompt, answers, "a sampled prompt")
        pairs = [Pair(row, i, j) for i, j in combinations(range(len(texts)), 2)]
        wins, scores = [0.0] * len(texts), {}
        for pair, line in zip(pairs, self.judge(pairs), strict=True):
            outcome = {"a": 1.0, "b": 0.0}.get(line["verdict"], 0.5)
            wins[pair.i] += outcome
            wins[pair.j] += 1 - outcome
            scores |= dict(zip((pair.i, pair.j), line.get("scores", ()), strict=False))
        best = max(range(len(texts)), key=lambda k: (wins[k], -k))
        return best, scores.get(best)

    def _examples(self, seed: str) -> list[Seed]:
        """Of a prompt: up to a quarter rows of earlier rounds, the rest seeds, in random order; without seeds rows alone."""
        rng, shown = random.Random(seed), self.config.shown
        own = shown if not self.seeds else max(shown // 4, shown - len(self.seeds))
        rows = rng.sample(self.rows, min(own, len(self.rows)))
        made = [Seed(row["prompt"], row["completion"], "synth") for row in rows]
        chosen = [*rng.sample(list(self.seeds), min(shown - len(made), len(self.seeds))), *made]
        rng.shuffle(chosen)
        return chosen

    def _values(self, examples: Sequence[Seed]) -> dict[str, Any]:
        shown = [{"prompt": seed.prompt, "completion": seed.completion} for seed in examples]
        return {"guidelines": self.guidelines, "examples": shown, "chat": self.config.ask == "chat"}

    def _sample(self, texts: Sequence[str], n: int, seeds: Sequence[int], part: int) -> list[list[tuple[str, bool]]]:
        """n completions of each text: (what was written up to the mark, whether it ended by itself). part: 0 for prompts, 1 for
        answers, which get other random numbers."""
        chat = self.config.ask == "chat"
        rows = [PromptRow(as_messages(text) if chat else text, "a prompt of synth") for text in texts]
        decode = partial(self.host.base.tokenizer.decode, skip_special_tokens=True)
        stop = (lambda ids: False) if chat else (lambda ids: f"\n{MARK}" in decode(ids[-MARK_TOKENS:]))
        ids = [prompt_ids(self.chat, row) for row in rows]
        longest, positions = max(map(len, ids)), self.chat.positions
        if positions is not None and longest >= positions:
            raise UserError(
                f"guidelines and examples take {longest:,} tokens, and the base has positions for {positions:,}: give a lower "
                "--shown, or shorter seeds"
            )
        with self.host.use(*self.stack):
            groups = self.host.generate(ids, n, self.config.sampling, [2 * s + part for s in seeds], stop=stop)
        return [[(_cut(decode(c.ids), chat), c.stopped) for c in group] for group in groups]


def _cut(text: str, chat: bool) -> str:
    """A completion up to the mark of the next part."""
    return text.strip() if chat else f"\n{text}".partition(f"\n{MARK}")[0].strip()


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--guidelines {file} cannot be read ({error}); give a text file") from error
    if not text:
        raise UserError(f"--guidelines {file} is empty: write what the rows are about, and what a good answer is")
    return text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
