"""Trains a small base on real text, to try things on: `python examples/small_base.py --data DIR --out DIR`.

A Llama of about 3.7 million parameters and its byte-level BPE tokenizer, both trained from nothing on the texts of
`DIR/c4_demo.jsonl` and the answers (`output`) of `DIR/alpaca_en_demo.json`, demonstration data of LLaMA-Factory. It
writes no sense, but unlike random weights it has something to lose, and adapters have something to work with.
The tokenizer has no chat template. With `--steps` the result is the same every time on the same machine.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
VOCABULARY = 2048
CONTEXT = 128
ROWS_PER_STEP = 8
LEARNING_RATE = 3e-3
HELD_OUT_EVERY = 20  # each 20th text is held out


def read_texts(folder: Path) -> list[str]:
    """The texts of both files, shuffled with a fixed seed."""
    c4 = [json.loads(line)["text"] for line in (folder / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    alpaca = json.loads((folder / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = c4 + [row["output"] for row in alpaca if row["output"]]
    random.Random(0).shuffle(texts)
    return texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, which puts bos before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def make_model() -> LlamaForCausalLM:
    """The untrained model; every linear dimension is a multiple of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
    )
    return LlamaForCausalLM(config)


def make_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All `texts`, each ended by eos, laid end to end and cut into rows: `(rows, CONTEXT)`."""
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (*text, tokenizer.eos_token_id)]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of `rows`, in nats."""
    logits = model(input_ids=rows).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def train(model: LlamaForCausalLM, rows: torch.Tensor, held_out: torch.Tensor, steps: int, minutes: float) -> None:
    """AdamW for `steps` steps, or if that is 0 for `minutes`; the learning rate follows a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.Generator().manual_seed(0)
    started = time.monotonic()
    step, done = 0, 0.0
    while done < 1.0:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * done))
        batch = torch.randint(len(rows), (ROWS_PER_STEP,), generator=order)
        loss = next_token_loss(model, rows[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds = time.monotonic() - started
        done = step / steps if steps else seconds / (60 * minutes)
        if step % 50 == 0 or done >= 1.0:
            with torch.no_grad():
                measured = torch.stack([next_token_loss(model, part) for part in held_out.split(64)]).mean()
            print(f"step {step}  loss {loss:.3f}  held-out {measured:.3f}  {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of c4_demo.jsonl and alpaca_en_demo.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=1.5, help="train for this long (default: 1.5)")
    length.add_argument("--steps", type=int, default=0, help="train for exactly this many steps instead")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in one order, so that the same steps give the same bits
    texts = read_texts(arguments.data)
    tokenizer = make_tokenizer(texts)
    rows = make_rows(tokenizer, [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY])
    held_out = make_rows(tokenizer, texts[::HELD_OUT_EVERY])
    model = make_model()
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens of text, {held_out.numel():,} held out")

    train(model, rows, held_out, arguments.steps, arguments.minutes)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
