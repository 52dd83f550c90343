"""Puts the functions of fused_ops into the modules of a base, where their code is known.

A module is known when its forward is, instruction by instruction, that of one of the classes below; most decoders of
transformers copy them. All others stay as they are. Only instances change: other models of the process do not.
"""

from collections.abc import Callable
from types import CodeType, FunctionType, MethodType

from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb, rotate_half
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lowalign.model.base.fused_ops import Compile, RMSNorm, Rotary, SwiGLU

PARTS = ("norm", "rotary", "mlp")
# Class of a norm -> the attribute of its epsilon, and what is added to its weight.
NORMS = {LlamaRMSNorm: ("variance_epsilon", 0.0), Olmo2RMSNorm: ("variance_epsilon", 0.0), Gemma2RMSNorm: ("eps", 1.0)}
ROTARY = "apply_rotary_pos_emb"


def fuse(model: nn.Module, compile: Compile = "auto", parts: tuple[str, ...] = PARTS) -> None:
    """Fuse these parts of a frozen model wherever they are known."""
    for module in model.modules():
        forward = type(module).forward
        if "norm" in parts and (norm := _known_norm(type(module))):
            eps, offset = getattr(module, norm[0]), norm[1]
            module.forward = MethodType(_norm(eps, offset, compile), module)
        elif "mlp" in parts and _same(forward, LlamaMLP.forward) and _is_silu(module.act_fn):
            module.forward = MethodType(_mlp(compile), module)
        elif "rotary" in parts and _calls_rotary(forward):
            module.forward = MethodType(_with_rotary(forward, compile), module)


def _norm(eps: float, offset: float, compile: Compile) -> Callable:
    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return RMSNorm.apply(hidden_states, self.weight, eps, offset, compile)

    return forward


def _mlp(compile: Compile) -> Callable:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x), compile))

    return forward


def _with_rotary(forward: FunctionType, compile: Compile) -> FunctionType:
    """The same function, whose name for the rotary embedding means the fused one."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return Rotary.apply(q, cos, sin, compile), Rotary.apply(k, cos, sin, compile)

    names = {**forward.__globals__, ROTARY: rotary}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def _known_norm(kind: type[nn.Module]) -> tuple[str, float] | None:
    for known, figures in NORMS.items():
        inner = "_norm" not in vars(known) or _same(getattr(kind, "_norm", None), known._norm)
        if inner and _same(kind.forward, known.forward):
            return figures
    return None


def _calls_rotary(forward: Callable) -> bool:
    """Whether it calls Llama's rotary embedding, with the four arguments that `rotary` takes."""
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return False
    names = forward.__globals__.get(ROTARY)
    same = _same(names, apply_rotary_pos_emb) and _same(
        getattr(names, "__globals__", {}).get("rotate_half"), rotate_half
    )
    return same and "unsqueeze_dim" not in str(forward.__code__.co_consts)


def _is_silu(activation: nn.Module) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _same(one: object, other: FunctionType) -> bool:
    """Whether two functions are the same instructions on the same names; their docstrings may differ."""
    return isinstance(one, FunctionType) and _code(one.__code__) == _code(other.__code__)


def _code(code: CodeType) -> tuple:
    constants = tuple(c for c in code.co_consts if not isinstance(c, str))
    return code.co_code, code.co_names, code.co_varnames, constants
