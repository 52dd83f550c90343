"""A soft prompt baked into the embedding: plain transformers computes what peft computes, and no text gets it twice."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from lowalign import Base, Example, Host, merge
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def base_folder(path, kind="llama", dtype=torch.float32):
    """A model whose tokenizer adds bos, as Llama's does."""
    tiny_model(kind).to(dtype).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def peft_prompt(base, folder, v=3, dtype=torch.float32):
    """A stock peft prompt tuning with random vectors, saved; the PeftModel."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = PromptTuningConfig(num_virtual_tokens=v, task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    peft = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    peft.prompt_encoder["default"].embedding.weight.data.normal_(0, 1)
    peft.save_pretrained(folder)
    return peft


@pytest.mark.parametrize("v", [3, 100], ids=["in spare rows", "in new rows"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_the_logits_are_pefts(kind, v, tmp_path):
    base = base_folder(tmp_path / "base", kind)
    peft = peft_prompt(base, tmp_path / "prompt", v)
    report = merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), dtype="float32")
    assert report["verified"] and report["kl"] < 1e-5  # seen: 1e-9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = len(tiny_tokenizer())
    assert model.config.vocab_size == max(VOCABULARY, words + v) and not model.config.tie_word_embeddings
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    plain = Chat(tiny_tokenizer(), TEMPLATE).prompt_ids(QUESTION)
    assert ids[0].tolist() == [*range(words, words + v), *plain]
    with torch.no_grad():
        expected = peft(torch.tensor([plain])).logits[..., :words]
        logits = model(ids).logits[..., :words]
    # The same vectors go in, and through layers of the same shapes; only the head may have more rows. Gemma's embedding
    # multiplies its rows by sqrt(hidden), so theirs were divided by it: one rounding.
    exact = v == 3 and kind != "gemma2"
    torch.testing.assert_close(logits, expected, atol=0 if exact else 1e-4, rtol=0)  # seen: 5e-6
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    options["suppress_tokens"] = [*range(words, model.config.vocab_size)]  # a random base likes rows without a token
    with torch.no_grad():  # peft's generate puts the prompt first by itself
        expected = peft.generate(
            input_ids=torch.tensor([plain]), **options | {"suppress_tokens": [*range(words, VOCABULARY)]}
        )
        found = model.generate(ids, **options)
    assert found[0, ids.shape[1] :].tolist() == expected[0, len(plain) :].tolist()


def test_loaded_in_nf4_it_is_the_adapter_on_the_nf4_base(tmp_path):
    """In bf16: stock transformers and bitsandbytes load the baked folder, and the base for peft."""
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    peft_prompt(base, tmp_path / "prompt")
    merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.bfloat16)  # noqa: E731
    peft = PeftModel.from_pretrained(load(base), tmp_path / "prompt")
    first = len(tiny_tokenizer())
    with torch.no_grad():
        expected = peft(torch.tensor([[5, 6, 7, 8]])).logits[..., :first]
        found = load(tmp_path / "out")(torch.tensor([[first, first + 1, first + 2, 5, 6, 7, 8]])).logits[..., :first]
    assert torch.equal(found, expected)


def test_no_virtual_token_is_sampled(tmp_path):
    base = base_folder(tmp_path / "base", "qwen3")  # tied: without its own head the virtual tokens would be likely
    peft_prompt(base, tmp_path / "prompt", 40)
    merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), dtype="float32", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = len(tiny_tokenizer())
    assert model.generation_config.suppress_tokens == [*range(words, words + 40)]
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    torch.manual_seed(0)
    samples = model.generate(
        ids.repeat(100, 1), max_new_tokens=100, min_new_tokens=100, do_sample=True, temperature=1.0, top_k=0
    )
    sampled = samples[:, ids.shape[1] :]
    assert sampled.numel() == 10_000 and not ((sampled >= words) & (sampled < words + 40)).any()
    assert "virtual" not in tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_rendered_text_tokenized_again_has_the_virtual_tokens_once(tmp_path):
    base = base_folder(tmp_path / "base")
    peft_prompt(base, tmp_path / "prompt")
    merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), verify=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(QUESTION, return_dict=False)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    assert tokenizer(text).input_ids == tokenizer(text, add_special_tokens=False).input_ids == ids
    assert ids[:5] == [*range(len(tiny_tokenizer()), len(tiny_tokenizer()) + 3), 1, *ids[4:5]]


def test_for_plain_text_the_tokenizer_puts_them_first(tmp_path):
    base = base_folder(tmp_path / "base")
    peft_prompt(base, tmp_path / "prompt")
    merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), verify=False, prompt_in="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    virtual = [*range(len(tiny_tokenizer()), len(tiny_tokenizer()) + 3)]
    plain = AutoTokenizer.from_pretrained(base)
    assert tokenizer("The fox.").input_ids == virtual + plain("The fox.").input_ids
    assert tokenizer("The", "fox").input_ids == virtual + plain("The", "fox").input_ids
    assert tokenizer.chat_template is None  # it would be the second place


def test_lora_and_prompt_merge_and_bake(tmp_path):
    """The prompt was trained on top of the LoRA. Against the host in fp32, by plain transformers."""
    base = base_folder(tmp_path / "base")
    host = Host(Base.load(base, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("lora", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.save("prompt", tmp_path / "prompt", parents=["lora"], files={"chat_template.jinja": TEMPLATE})
    report = merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), dtype="float32")
    assert report["kl"] < 1e-5 and len(report["adapters"]) == 2  # seen: 1e-9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    first = len(tiny_tokenizer())
    with host.use("lora", "prompt"), torch.no_grad():
        expected = host.logprobs([Example([5, 6, 7], [[8, 9, 10, 2]])])[0][0]
    with torch.no_grad():
        logits = model(torch.tensor([[first, first + 1, first + 2, 5, 6, 7, 8, 9, 10, 2]])).logits[0, 5:-1]
    # Differences of log-probs: the spare rows of the head are zero now, which moves all log-probs of a token alike.
    words = slice(0, first)
    with host.use("lora", "prompt"), torch.no_grad():
        others = host.logprobs([Example([5, 6, 7], [[11, 9, 10, 2]])])[0][0]
    log_odds = logits[0, words].log_softmax(-1)
    torch.testing.assert_close(log_odds[8] - log_odds[11], expected[0] - others[0], atol=1e-4, rtol=0)  # seen: 1e-6


def test_a_reward_prompt_becomes_a_sequence_classifier(tmp_path):
    base = base_folder(tmp_path / "base")
    host = Host(Base.load(base, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(0)
    host.add("reward", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    host.add_scalar_head("reward")
    host.save("reward", tmp_path / "reward", files={"chat_template.jinja": TEMPLATE}, method="reward")
    report = merge([str(tmp_path / "reward")], tmp_path / "out", model=str(base), dtype="float32")
    assert report["verified"] and report["error"] < 1e-4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    first = len(tiny_tokenizer())
    with torch.no_grad(), host.use("reward"):
        expected = host.scores([Example([7, 8], [[40, 41, 42, 2]])], "reward")[0]
    with torch.no_grad():
        found = model(torch.tensor([[first, first + 1, first + 2, 7, 8, 40, 41, 42, 2]])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # seen: 4e-7


def test_two_prompts_are_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    peft_prompt(base, tmp_path / "prompt")
    both = [str(tmp_path / "prompt"), str(tmp_path / "prompt")]
    with pytest.raises(UserError, match="are both soft prompts; at most one can be active"):
        merge(both, tmp_path / "out", model=str(base), verify=False)
    merge(both[:1], tmp_path / "once", model=str(base), verify=False)
    with pytest.raises(UserError, match=r"has a token <\|virtual_0\|>: a soft prompt was baked into it before"):
        merge(both[:1], tmp_path / "out", model=str(tmp_path / "once"), verify=False)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_would_not_put_them_first_is_refused(tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base")
    peft_prompt(base, tmp_path / "prompt")
    monkeypatch.setattr("lowalign.export.bake._without_special_tokens", lambda processor: processor)
    with pytest.raises(UserError, match="a soft prompt cannot be baked into this tokenizer"):
        merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), verify=False)
    assert not (tmp_path / "out").exists()


def test_the_files_of_llama_cpps_converter(tmp_path):
    """It reads ids and flags of new tokens from tokenizer_config.json where the vocabulary is sentencepiece's."""
    base = base_folder(tmp_path / "base")
    options = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(options | {"added_tokens_decoder": {}}))
    peft_prompt(base, tmp_path / "prompt")
    merge([str(tmp_path / "prompt")], tmp_path / "out", model=str(base), verify=False)
    options = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert options["add_bos_token"] is False  # the template writes bos, behind the virtual tokens
    added = options["added_tokens_decoder"]
    first = len(tiny_tokenizer())
    assert added[str(first)]["content"] == "<|virtual_0|>" and added[str(first)]["special"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|virtual_2|>") == first + 2
    assert AutoModel.from_pretrained(tmp_path / "out").config.vocab_size == VOCABULARY


def test_the_form_of_the_training_decides_who_puts_them_first(tmp_path):
    base = base_folder(tmp_path / "base")
    host = Host(Base.load(base, quantization="none", dtype="float32", device="cpu", quiet=True))
    host.add("prompt", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    for form in ("text", "chat"):
        host.save("prompt", tmp_path / form, files={"chat_template.jinja": TEMPLATE}, prompt_format=form)
        merge([str(tmp_path / form)], tmp_path / f"{form}-out", model=str(base), verify=False)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"{form}-out")
        assert (tokenizer.chat_template is None) == (form == "text")
        assert (tokenizer("The fox.").input_ids[0] == len(tiny_tokenizer())) == (form == "text")
