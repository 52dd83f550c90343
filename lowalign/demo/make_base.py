"""Remakes the small base that `lowalign demo` aligns: `python -m lowalign.demo.make_base --out DIR`.

A Llama of 1.9 million parameters and its tokenizer, both trained from nothing on `grammar.pretraining_text`. It knows
postcards and the other pages of the little language; of the chat format it knows only that the tokens exist.
It takes about ten minutes on one core. With the same arguments, on the same machine and library versions, the
folder comes out bit for bit.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowalign.demo.grammar import pretraining_text

PAD, BOS, EOS, TURN, END_OF_TURN = SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 768
CONTEXT = 128
ROWS_PER_STEP = 16
LEARNING_RATE = 2e-3
WARM_UP = 100

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(pages: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `pages`; like Llama's it begins every text with bos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(pages, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model; every linear dimension is a multiple of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
    )
    return model


def make_rows(tokenizer: PreTrainedTokenizerFast, pages: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages end to end in rows of CONTEXT tokens, the last of a row cut: ids and positions, both `(rows, CONTEXT)`.

    Positions begin at 0 with every page, by which transformers knows to keep its attention within the page.
    """
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    row: list[int] = []
    position: list[int] = []
    for ids in tokenizer(pages)["input_ids"]:
        row += [*ids, tokenizer.eos_token_id]
        position += range(len(ids) + 1)
        if len(row) >= CONTEXT:
            rows.append(row[:CONTEXT])
            positions.append(position[:CONTEXT])
            row, position = [], []
    return torch.tensor(rows), torch.tensor(positions)


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens of `rows`, `(rows, CONTEXT)`, in bf16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=rows, position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def prepare_chat_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the chat tokens, which no page holds, a start: both read like a blank line, end-of-turn is written like eos.

    Left as pretraining leaves them, tokens never seen are noise as input and all alike as output. A little noise
    keeps end-of-turn and eos apart.
    """
    read, written = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blank_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids([TURN, END_OF_TURN])
    with torch.no_grad():
        for row in (start, end):
            read[row] = read[blank_line].mean(0) + 0.1 * read.std() * torch.randn_like(read[row])
        eos = written[tokenizer.eos_token_id]
        written[end] = eos + 0.1 * eos.std() * torch.randn_like(eos)


def pretrain(model: LlamaForCausalLM, rows: tuple[torch.Tensor, torch.Tensor], held_out: tuple) -> None:
    """One pass with AdamW over the rows, a short warm-up and a cosine to zero; prints losses every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    batches = list(zip(*(part.split(ROWS_PER_STEP) for part in rows), strict=True))
    started = time.monotonic()
    for step, (ids, positions) in enumerate(batches, start=1):
        factor = min(step / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
        loss = next_token_loss(model, ids, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == len(batches):
            with torch.no_grad():
                new = next_token_loss(model, *held_out)
            seconds = time.monotonic() - started
            print(f"step {step}/{len(batches)}  loss {loss:.3f}  held-out {new:.3f}  {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pages", type=int, default=30_000, help="pages of text to train on, each once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # sums in one order, so that the same seed gives the same bits
    pages = pretraining_text(arguments.pages, arguments.seed)
    tokenizer = make_tokenizer(pages[:10_000])
    rows = make_rows(tokenizer, pages)
    held_out = make_rows(tokenizer, pretraining_text(300, arguments.seed + 1))
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {rows[0].numel():,} tokens of text", flush=True)

    pretrain(model, rows, held_out)
    prepare_chat_tokens(model, tokenizer)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
