"""How an artefact is loaded, as the code blocks of its card."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from lowalign.hub.artefact import Artefact, read_object
from lowalign.hub.publishable import published_base

TEMPLATE = "chat_template.jinja"


def loading(artefact: Artefact, repo: str) -> Iterator[str]:
    """Paragraphs of Markdown: in transformers, in peft and in lowalign, where each can."""
    if not artefact.is_adapter:
        yield _model_code(artefact, repo)
        if not artefact.reward:
            yield _shell("lowalign", f'lowalign generate --model {repo} --prompt "…"')
        return
    base, commit = published_base(artefact)
    base, arguments = base or "BASE", f', revision="{commit}"' if commit else ""
    if commit is None:
        yield f"`{base}` stands for the folder or the Hub id of the base."
    if artefact.loads_in_peft and (code := _peft_code(artefact, repo, base)):
        yield _python("peft", code, arguments)
        if artefact.config["peft_type"] == "LORA" and commit and not artefact.reward and not _parents(artefact):
            lines = [
                "from transformers import AutoModelForCausalLM",
                "",
                f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
            ]
            yield _python("transformers, where peft is installed", lines)
    elif artefact.loads_in_peft:
        yield "It stands on adapters that peft cannot stack with it, so only lowalign loads the whole."
    flags = f"--model {base} --adapter {repo}" + (f" --base.revision {commit}" if commit else "")
    verb = f"lowalign score {flags} --data rows.jsonl" if artefact.reward else f'lowalign generate {flags} --prompt "…"'
    yield _shell("lowalign", verb)


def _peft_code(artefact: Artefact, repo: str, base: str) -> list[str]:
    """Lines of Python that load base and adapter; REVISION stands for the arguments that pin the base. [] if peft cannot."""
    parents = _parents(artefact)
    if parents and (artefact.reward or {*parents, artefact.config["peft_type"]} != {"LORA"}):
        return []
    auto = "AutoModelForSequenceClassification" if artefact.reward else "AutoModelForCausalLM"
    labels = ", num_labels=1" if artefact.reward else ""
    code = ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", ""]
    code += [f'base = "{base}"', f"model = {auto}.from_pretrained(base{labels}REVISION)"]
    if parents:
        names = [f"parent{i}" for i in range(len(parents))]
        first, *others = (f'"{repo}", subfolder="parents/{i}", adapter_name="{name}"' for i, name in enumerate(names))
        code += [f"model = PeftModel.from_pretrained(model, {first})"]
        code += [f"model.load_adapter({rest})" for rest in (*others, f'"{repo}", adapter_name="trained"')]
        code += [f"model.base_model.set_adapter({[*names, 'trained']!r})  # they act together"]
    else:
        code += [f'model = PeftModel.from_pretrained(model, "{repo}")']
    code += ["tokenizer = AutoTokenizer.from_pretrained(baseREVISION)"]
    if TEMPLATE in artefact.files:
        code.insert(0, "from huggingface_hub import hf_hub_download")
        code += [f'template = hf_hub_download("{repo}", "{TEMPLATE}")']
        code += ['tokenizer.chat_template = open(template, encoding="utf-8").read()  # the one it was trained with']
    if artefact.reward:
        code += ["# The score of a conversation that ends with the answer: model(**inputs).logits[0, 0]"]
    return code


def _model_code(artefact: Artefact, repo: str) -> str:
    auto = "AutoModelForSequenceClassification" if artefact.reward else "AutoModelForCausalLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    lines += [f'model = {auto}.from_pretrained("{repo}")', f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
    if artefact.reward:
        lines += ["# The score of a conversation that ends with the answer: model(**inputs).logits[0, 0]"]
    return _python("transformers", lines)


def _parents(artefact: Artefact) -> list[str]:
    """The peft type of each adapter that this one was trained on top of."""
    folders = sorted({PurePosixPath(name).parent.as_posix() for name in artefact.files if name.startswith("parents/")})
    return [read_object(artefact.folder / folder / "adapter_config.json").get("peft_type", "") for folder in folders]


def _python(title: str, lines: list[str], arguments: str = "") -> str:
    code = "\n".join(lines).replace("REVISION", arguments)
    return f"{title}:\n\n```python\n{code}\n```"


def _shell(title: str, command: str) -> str:
    return f"{title}:\n\n```bash\n{command}\n```"
