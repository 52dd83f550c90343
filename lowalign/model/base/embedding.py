"""The embedding of the base in CPU memory: 1 to 1.5 GiB less of the card, for one lookup on the CPU a micro-batch."""

import torch
from torch import Tensor, nn

from lowalign.errors import UserError
from lowalign.model.attention.device import compute_device


def move_to_cpu(model: nn.Module) -> None:
    """Move the embedding to CPU memory; its rows go to the device of the model.

    Raises UserError when the LM head has the same weights, which the device needs.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        raise UserError(
            "--base.embedding cpu: the LM head of this model has the weights of the embedding, so they stay on the device; "
            "leave the option out"
        )
    look_up_on_cpu(model)
    embedding.to("cpu")
    if head.weight.is_cuda:
        torch.cuda.empty_cache()


def look_up_on_cpu(model: nn.Module) -> None:
    """Have token ids go to CPU memory before the embedding, and its rows to the device of the model after it."""

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].to("cpu"), *args[1:]

    def after(_: nn.Module, args: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        return rows.to(compute_device(model))

    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)
