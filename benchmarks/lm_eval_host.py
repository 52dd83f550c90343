"""CPU seconds of lm-eval's multiple-choice requests: the Host of lowalign, and lm-eval's own backend for transformers.

    python -m benchmarks.lm_eval_host [QUESTIONS]

The demo's base in fp32, one thread. A question has five solved ones before it, as with `--fewshot 5`, and four answers.
Prints the seconds of both, and the largest difference between two log-probabilities.
"""

import sys
import time

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lowalign import Base, Host
from lowalign.commands.lm_eval_host import HostLM
from lowalign.data.chat import Chat
from lowalign.demo.configs import BASE
from lowalign.demo.world import PLACES

BATCH = 16


def requests(questions: int) -> list[Instance]:
    """Four continuations of each context."""
    made = []
    for i in range(questions):
        names = [PLACES[(i * 7 + k) % len(PLACES)] for k in range(9)]
        context = "".join(f"Question {i}: Which card was sent from the harbour of {n}?\nAnswer: The card from {n}.\n\n" for n in names[:5])  # fmt: skip
        context += f"Question {i}: Which card was sent from the harbour of {names[5]}?\nAnswer:"
        made += [Instance("loglikelihood", {}, (context, f" The card from {n}."), k) for k, n in enumerate(names[5:])]
    return made


def main(questions: int) -> None:
    """Run both and print."""
    torch.set_num_threads(1)
    made = requests(questions)
    base = Base.load(BASE, quantization="none", dtype="float32", device="cpu", quiet=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, trust_remote_code=False).eval()
    backends = {
        "lowalign": HostLM(Host(base), Chat(base.tokenizer), 8192),
        "HFLM": HFLM(
            pretrained=model,
            tokenizer=transformers.AutoTokenizer.from_pretrained(BASE, trust_remote_code=False),
            batch_size=BATCH,
        ),
    }
    answers = {}
    for name, backend in backends.items():
        backend.loglikelihood(made[:8], disable_tqdm=True)
        start = time.process_time()
        answers[name] = backend.loglikelihood(made, disable_tqdm=True)
        print(f"{name:10}{time.process_time() - start:8.2f} CPU s for {questions} questions with four answers")
    worst = max(abs(a[0] - b[0]) for a, b in zip(*answers.values(), strict=True))
    print(f"largest difference of two log-probabilities: {worst:.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
