"""Remakes the small base that `lowalign demo` aligns: `python -m lowalign.demo.make_base --out DIR`.

A Llama of 1.9 million parameters and its tokenizer, both trained from nothing on `grammar.pretraining_text`. It can
write postcards and the other pages; the chat format is in its vocabulary, but not in its training text.
This takes about ten minutes on one core. The same arguments, machine and library versions give a folder with the same
bits.
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
    """A byte-level BPE tokenizer trained on `pages`; like Llama's, it starts every text with bos."""
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
    """Concatenate pages into rows, the last page of a row truncated: ids and positions, both `(rows, CONTEXT)`.

    Positions restart at 0 with every page; from this transformers sees the pages and keeps attention within each.
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
    """Initialise the chat tokens, which are in no page: both inputs from a blank line, the output of end-of-turn from eos.

    Pretraining leaves unseen tokens as noise in the input embedding and all alike in the output. A little noise keeps
    end-of-turn and eos apart.
    """
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    blank_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids([TURN, END_OF_TURN])
    with torch.no_grad():
        for row in (start, end):
            inputs[row] = inputs[blank_line].mean(0) + 0.1 * inputs.std() * torch.randn_like(inputs[row])
        eos = outputs[tokenizer.eos_token_id]
        outputs[end] = eos + 0.1 * eos.std() * torch.randn_like(eos)


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
                held_out_loss = next_token_loss(model, *held_out)
            seconds = time.monotonic() - started
            print(
                f"step {step}/{len(batches)}  loss {loss:.3f}  held-out {held_out_loss:.3f}  {seconds:.0f} s",
                flush=True,
            )


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
