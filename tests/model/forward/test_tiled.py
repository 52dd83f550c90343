"""Layers in tiles, with offloaded or recomputed inputs, against stock layers: hidden states and all gradients in fp32."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn

from lowalign import Base, Example, Host
from lowalign.data.pack import pack
from lowalign.model.attention.interface import no_mask
from lowalign.model.attention.packed import Layout
from lowalign.model.base import tile_probe as probing
from lowalign.model.base.tile_probe import tile_probe
from lowalign.model.forward.checkpointed import CheckpointedLayers, Checkpointing
from lowalign.model.forward.packed import TokenRequest
from tests.tiny import _SHAPE, CONFIGS, tiny_folder, tiny_model

OTHERS = {
    "granite": lambda: hf.GraniteConfig(**_SHAPE, residual_multiplier=0.3, attention_multiplier=0.2),
    "olmo2": lambda: hf.Olmo2Config(**_SHAPE),
    "cohere": lambda: hf.CohereConfig(**_SHAPE),  # attention and MLP in parallel
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SHAPE),
    "phi": lambda: hf.PhiConfig(**_SHAPE),
    "mixtral": lambda: hf.MixtralConfig(**_SHAPE, num_local_experts=4),
}
PACKED = [*(kind for kind in CONFIGS if kind != "bloom"), *OTHERS]


@pytest.mark.parametrize("kind", PACKED)
def test_every_architecture_that_packs(kind, monkeypatch):
    """Packed rows with a shared prompt; windows, soft caps, experts, norms of queries and keys, scaled residuals."""
    monkeypatch.setattr(probing, "TOLERANCE", 2e-6)  # sums of several tiles, in fp32
    assert tile_probe((CONFIGS | OTHERS)[kind]()) == ""


def test_what_is_not_of_the_form_is_found():
    """A layer whose output needs the projection of the queries besides the attention, as an output gate does."""

    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
    stock = layer.self_attn.o_proj
    gate = {}
    layer.self_attn.q_proj.register_forward_hook(lambda m, i, out: gate.update(q=out))
    layer.self_attn.o_proj = nn.Sequential(stock)
    layer.self_attn.o_proj.register_forward_pre_hook(lambda m, inputs: (inputs[0] * gate["q"].sigmoid(),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "small_model", lambda config: model)
        assert "differ in tiles by" in tile_probe(model.config)


def test_a_layer_that_fails_in_tiles_is_told(monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("no layer_part\nhere")

    monkeypatch.setattr("lowalign.model.forward.tiled.Layer.before", broken)
    assert tile_probe(CONFIGS["llama"]()) == "the probe model failed: TypeError: no layer_part"


# -- through the host: adapters of all kinds ---------------------------------------------------------------------------

LORA = {"target_modules": "all-linear", "init_lora_weights": False}
SETTINGS = {
    "on": ("on", {"tile": 8}),
    "offload": ("offload", {"tile": 8}),
    "every second": ("offload", {"tile": 8, "every": 2}),
    "every third, one tile": ("on", {"tile": 0, "every": 3}),
    "one layer kept": ("on", {"tile": 8, "keep_layers": 1}),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("gemma2"), "gemma2", num_hidden_layers=4)
    host = Host(Base.load(folder, "nf4", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("below", LoraConfig(r=4, **LORA))
    host.add("policy", LoraConfig(r=8, lora_dropout=0.1, **LORA))
    host.add("behind", LoraConfig(r=4, **LORA | {"target_modules": ["down_proj"]}))
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=4))
    host.add("prefix", PrefixTuningConfig(num_virtual_tokens=4))
    host.add_scalar_head("below")
    return host


def batch():
    g = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(4, 300, (n,), generator=g).tolist()  # noqa: E731
    return [Example(draw(11), [draw(9), draw(7)]), Example(draw(5), [draw(8)])]


def run(host, active, trained, checkpointing, between=lambda host: None, **memory):
    """Log-probs, values and gradients."""
    host.train_only(*trained)
    host.training(checkpointing, **memory)
    for name in trained:
        for p in host.parameters(name):
            p.grad = None
    torch.manual_seed(5)  # for the dropout
    with host.use(*active):
        head = host.scalar_head("below") if "below" in trained else None
        out = host.tokens(batch(), TokenRequest(scalar_head=head))
    flat = torch.cat([t for part in (out.logps, out.values) if part for row in part for t in row])
    loss = flat.sin().sum()
    torch.manual_seed(6)
    between(host)
    loss.backward()
    host.training(None, tile=0)
    return [flat.detach(), *(p.grad for name in trained for p in host.parameters(name))]


def under_another(host):
    """Another adapter acts when the backward begins."""
    host._activate(("prompt",))


@pytest.mark.parametrize(
    ("active", "trained", "setting"),
    [
        *((("below", "policy"), ("policy",), setting) for setting in SETTINGS),  # frozen and trained
        *((("policy", "prefix"), ("prefix", "policy"), setting) for setting in ("on", "every second")),
        (("below",), ("below",), "offload"),  # with a scalar head
        (("behind",), ("behind",), "on"),  # behind the attention alone
        (("below", "prompt"), ("prompt",), "offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_all_adapters_get_the_gradients_of_stock_layers(host, active, trained, setting):
    mode, memory = SETTINGS[setting]
    if "policy" in active and memory["tile"]:  # dropout draws by tile: compare without
        for layer in host.adapters["policy"].layers(host.base.model):
            layer.lora_dropout["policy"].p = 0.0
    wanted = run(host, active, trained, "off")
    assert all(g.any() for g in wanted)
    results = [run(host, active, trained, mode, **memory)]
    try:
        results.append(run(host, active, trained, mode, under_another, **memory))
    finally:
        host._activate(())
    for found in results:
        for a, b in zip(wanted, found, strict=True):
            assert (a - b).norm() <= 2e-6 * a.norm()


def test_dropout_draws_the_same_in_the_recomputation(host):
    """Bit for bit, whether a layer's input is kept or computed again from the layer before, with its dropout."""
    for layer in host.adapters["policy"].layers(host.base.model):
        layer.lora_dropout["policy"].p = 0.3
    kept = run(host, ("policy",), ("policy",), "on", tile=8)
    again = run(host, ("policy",), ("policy",), "on", tile=8, every=2)
    for layer in host.adapters["policy"].layers(host.base.model):
        layer.lora_dropout["policy"].p = 0.0
    without = run(host, ("policy",), ("policy",), "on", tile=8)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert (kept[0] - without[0]).norm() > 1e-3 * kept[0].norm()


def test_only_the_inputs_stay(monkeypatch):
    """Between forward and backward nothing of a layer is alive but its input; with every=2, half of the inputs."""
    model = tiny_model("llama", num_hidden_layers=4).requires_grad_(False)
    model.set_attn_implementation("lowalign")
    layers = CheckpointedLayers(model, lambda: True)
    row = pack(batch())
    words = model.get_input_embeddings()(row.ids[None]).requires_grad_()
    sizes = {}
    saved: list[torch.Tensor] = []
    for every in (1, 2):
        saved.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            no_mask(),
            layers.computing(Checkpointing("on", 8, every=every), torch.enable_grad),
        ):
            model.train()
            out = model.base_model(inputs_embeds=words, position_ids=row.positions[None], use_cache=False, layout=Layout(row.segments))  # fmt: skip
        node, inputs = out.last_hidden_state.grad_fn, set()
        while node is not None:
            kept = getattr(node, "kept", None)
            if kept is not None and kept._x is not None:
                inputs.add(kept._x.data_ptr())
            node = next((n for n, _ in node.next_functions if n is not None and "Accumulate" not in n.name()), None)
        sizes[every] = len(inputs), len(saved)
    assert sizes == {1: (4, 1), 2: (2, 1)}  # 1: the input of the last norm


def test_a_second_backward_is_refused(host):
    host.train_only("below")
    host.training("on", tile=8)
    with host.use("below"):
        loss = torch.cat([t for row in host.logprobs(batch()) for t in row]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inputs are freed in the first"):
        loss.backward()
    host.training(None, tile=0)


def test_a_model_without_packed_attention_says_so(tmp_path, capsys):
    base = Base.load(tiny_folder(tmp_path, "bloom"), "none", dtype="float32", device="cpu", quiet=True)
    host = Host(base)
    host.add("policy", LoraConfig(r=4, **LORA))
    host.train_only("policy")
    for checkpointing in ("off", "offload"):
        host.training(checkpointing, tile=8)
        with host.use("policy"):
            torch.cat([t for row in host.logprobs(batch()) for t in row]).sum().backward()
    assert (
        capsys.readouterr().err.count("not computed in tiles (it needs packed attention): ordinary checkpointing") == 1
    )


def test_a_norm_with_a_forward_of_its_own_keeps_it():
    """Fused norms are such: the context uses it, and leaves it where it was."""
    model, called = tiny_model("llama").requires_grad_(False), []
    model.set_attn_implementation("lowalign")
    norm = model.model.norm
    stock = norm.forward
    norm.forward = own = lambda x: called.append(x.shape[1]) or stock(x)
    row = pack(batch())
    with (
        no_mask(),
        torch.no_grad(),
        CheckpointedLayers(model, lambda: True).computing(Checkpointing(tile=16), torch.enable_grad),
    ):
        model.base_model(
            input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False, layout=Layout(row.segments)
        )
    assert called == [16, 16, 8] and norm.forward is own
