"""Published data sets, in their own columns, give the rows that they mean. One or two made rows of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowalign.config.recipe import data_presets, packaged
from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.rows.formats import RowFormats
from lowalign.data.rows.mapping import Mapping, SkippedRow, mappings_of
from lowalign.data.rows.normalised import normalised
from lowalign.data.rows.preference_rows import PREFERENCE_ROWS
from lowalign.data.rows.sft_rows import SFT_ROWS
from lowalign.data.sources.row import BadRow
from lowalign.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function, "id": "call00001"}],
    }


HH = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: and?\n\nAssistant:"
WEATHER = {"name": "weather", "description": "…", "parameters": {"type": "object", "properties": {}}}
GLAIVE = (
    'USER: Rome?\n\n\nASSISTANT: <functioncall> {"name": "weather", "arguments": \'{"city": "Rome"}\'} <|endoftext|>\n\n\n'
    'FUNCTION RESPONSE: {"sun": true}\n\n\nASSISTANT: It is sunny. <|endoftext|>\n\n\n'
)
GLAIVE_TURNS = [
    user("Rome?"),
    call("weather", city="Rome"),
    {"role": "tool", "content": '{"sun": true}', "tool_call_id": "call00001", "name": "weather"},
    bot("It is sunny."),
]
TOOLS = [{"type": "function", "function": WEATHER}]
# By preset: rows as published, and what they mean (a text: why a row is left out).
SFT: dict[str, list[tuple[dict[str, Any], dict[str, Any] | str]]] = {
    "dolly": [
        (
            {"instruction": "Q", "context": "", "response": "A", "category": "open_qa"},
            {"messages": [user("Q"), bot("A")]},
        ),
        (
            {"instruction": "Q", "context": "C", "response": "A", "category": "closed_qa"},
            {"messages": [user("Q\nC"), bot("A")]},
        ),
    ],
    "openorca": [
        (
            {"id": "niv.1", "system_prompt": "S", "question": "Q", "response": "A"},
            {"messages": [system("S"), user("Q"), bot("A")]},
        ),
        (
            {"id": "niv.2", "system_prompt": "", "question": "Q", "response": "A"},
            {"messages": [user("Q"), bot("A")]},
        ),
    ],
    "gsm8k": [({"question": "2+2?", "answer": "2+2=4\n#### 4"}, {"messages": [user("2+2?"), bot("2+2=4\n#### 4")]})],
    "metamath": [
        (
            {"type": "GSM_Rephrased", "query": "Q", "original_question": "O", "response": "A"},
            {"messages": [user("Q"), bot("A")]},
        )
    ],
    "prompt-response": [({"prompt": "Q", "response": "A"}, {"messages": [user("Q"), bot("A")]})],
    "lima": [
        ({"conversations": ["Q", "A"], "source": "stackexchange"}, {"messages": [user("Q"), bot("A")]}),
        (
            {"conversations": ["Q", "A", "R", "B"], "source": "multi_turn"},
            {"messages": [user("Q"), bot("A"), user("R"), bot("B")]},
        ),
        ({"conversations": ["Q"], "source": "test"}, "a question without an answer"),
    ],
    "capybara": [
        (
            {"source": "x", "conversation": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}]},
            {"messages": [user("Q"), bot("A"), user("R"), bot("B")]},
        )
    ],
    "xlam": [
        (
            {
                "id": 1,
                "query": "Rome?",
                "answers": '[{"name": "weather", "arguments": {"city": "Rome"}}]',
                "tools": json.dumps([WEATHER]),
            },
            {"messages": [user("Rome?"), call("weather", city="Rome")], "tools": TOOLS},
        )
    ],
    "glaive-v1": [({"sample": f"SYSTEM: S\n{GLAIVE}"}, {"messages": [system("S"), *GLAIVE_TURNS]})],
    "glaive-v2": [
        (
            {
                "system": "SYSTEM: You are an assistant with access to functions. Use them if required -\n"
                + json.dumps(WEATHER, indent=4),
                "chat": GLAIVE,
            },
            {"messages": [system("You are an assistant with access to functions."), *GLAIVE_TURNS], "tools": TOOLS},
        ),
        (
            {"system": "SYSTEM: No functions.\n", "chat": "USER: a\n\n\nASSISTANT: b <|endoftext|>\n\n\n"},
            {"messages": [system("No functions."), user("a"), bot("b")]},
        ),
    ],
    "hh-rlhf-sft": [
        (
            {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
            {"messages": [user("hi"), bot("ho"), user("and?"), bot("yes")]},
        ),
        ({"chosen": f"{HH} ", "rejected": f"{HH} no"}, "the answer is empty"),
    ],
}
PREFERENCES: dict[str, list[tuple[dict[str, Any], dict[str, Any] | str]]] = {
    "helpsteer": [
        (
            {"prompt": "Q", "response": "A", "helpfulness": 3, "correctness": 4, "verbosity": 1},
            {"prompt": [user("Q")], "completion": [bot("A")], "score": 3},
        )
    ],
    "helpsteer3": [
        (
            {
                "domain": "code",
                "language": "python",
                "context": [user("Q"), bot("A"), user("R")],
                "response1": "B",
                "response2": "C",
                "overall_preference": preference,
                "individual_preference": [],
            },
            expected,
        )
        for preference, expected in (
            (-2, {"prompt": [user("Q"), bot("A"), user("R")], "chosen": [bot("B")], "rejected": [bot("C")]}),
            (1, {"prompt": [user("Q"), bot("A"), user("R")], "chosen": [bot("C")], "rejected": [bot("B")]}),
            (0, "neither answer is better"),
        )
    ],
    "nectar": [
        (
            {
                "prompt": "\n\nHuman: Q\n\nAssistant: ",
                "answers": [{"answer": "A", "model": "m", "rank": 2.0}, {"answer": "B", "model": "n", "rank": 1.0}],
                "turns": 1,
            },
            {"prompt": [user("Q")], "completions": [[bot("A")], [bot("B")]], "ranks": [1, 0]},
        )
    ],
    "shp": [
        (
            {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": label, "score_A": 5, "score_B": 2},
            {"prompt": [user("Q")], "chosen": [bot("AB"[1 - label])], "rejected": [bot("AB"[label])]},
        )
        for label in (1, 0)
    ],
    "orca-dpo": [
        (
            {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
            {"prompt": [system("S"), user("Q")], "chosen": [bot("A")], "rejected": [bot("B")]},
        )
    ],
    "alpaca-dpo": [
        (
            {"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"},
            {"prompt": [user("Q\nI")], "chosen": [bot("A")], "rejected": [bot("B")]},
        ),
        (
            {"instruction": "Q", "chosen": "A", "rejected": "B", "system": "S"},
            {"prompt": [system("S"), user("Q")], "chosen": [bot("A")], "rejected": [bot("B")]},
        ),
    ],
    "ultrafeedback": [
        (
            {
                "source": "evol_instruct",
                "instruction": "Q",
                "models": ["m", "n"],
                "completions": [
                    {"model": "m", "response": "A", "overall_score": 7.5, "annotations": {}},
                    {"model": "n", "response": "B", "overall_score": 8.5, "annotations": {}},
                ],
            },
            {"prompt": [user("Q")], "completions": [[bot("A")], [bot("B")]], "scores": [7.5, 8.5]},
        ),
        ({"instruction": "Q", "completions": []}, "fewer than two answers"),
    ],
    "arena": [
        (
            {
                "question_id": "1",
                "winner": winner,
                "conversation_a": [user("Q"), bot("A")],
                "conversation_b": [user("Q"), bot("B")],
                "turn": 1,
            },
            expected,
        )
        for winner, expected in (
            ("model_a", {"chosen": [user("Q"), bot("A")], "rejected": [user("Q"), bot("B")]}),
            ("model_b", {"chosen": [user("Q"), bot("B")], "rejected": [user("Q"), bot("A")]}),
            ("tie (bothbad)", "a tie"),
        )
    ],
    "arena-55k": [
        (
            {
                "id": "1",
                "prompt": '["Q", "R"]',
                "response_a": '["A", "C"]',
                "response_b": b,
                "winner_model_a": int(not tie),
                "winner_model_b": 0,
                "winner_tie": int(tie),
            },
            expected,
        )
        for tie, b, expected in (
            (
                False,
                '["B", "D"]',
                {
                    "chosen": [user("Q"), bot("A"), user("R"), bot("C")],
                    "rejected": [user("Q"), bot("B"), user("R"), bot("D")],
                },
            ),
            (True, '["B", "D"]', "a tie"),
            (False, '["B", null]', "an answer is null"),
        )
    ],
    "openai-dpo": [
        (
            {
                "input": {"messages": [user("Q")], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [bot("A")],
                "non_preferred_output": [bot("B")],
            },
            {"prompt": [user("Q")], "chosen": [bot("A")], "rejected": [bot("B")]},
        )
    ],
    "llamafactory-kto": [
        (
            {"messages": [user("Q"), bot("A")], "label": True},
            {"prompt": [user("Q")], "completion": [bot("A")], "label": True},
        ),
        (
            {"messages": [user("Q"), bot("A")], "kto_tag": False},
            {"prompt": [user("Q")], "completion": [bot("A")], "label": False},
        ),
    ],
    "hh-rlhf": [
        (
            {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
            {
                "chosen": [user("hi"), bot("ho"), user("and?"), bot("yes")],
                "rejected": [user("hi"), bot("ho"), user("and?"), bot("no")],
            },
        ),
        ({"chosen": f"{HH} yes", "rejected": HH}, "an answer is empty"),
    ],
}
TEMPLATES: dict[str, tuple[dict[str, Any], str, str]] = {  # a row, what its prompt holds, its completion
    "templates/classification": ({"text": "Lovely!", "label": 1}, "Lovely!", "positive"),
    "templates/question_answering": (
        {"context": "It is red.", "question": "Which colour?", "answers": {"text": ["red"], "answer_start": [6]}},
        "Which colour?",
        "red",
    ),
    "templates/summarisation": ({"document": "A long text.", "summary": "Text."}, "A long text.", "Text."),
    "templates/translation": ({"source": "cat", "target": "Katze"}, "cat", "Katze"),
    "templates/extraction": (
        {"text": "Ann went to Rome.", "entities": [{"name": "Ann"}]},
        "Ann went to Rome.",
        '[{"name": "Ann"}]',
    ),
}


def read(folder: Path, preset: str, rows: list[Any], formats: RowFormats = SFT_ROWS) -> list[dict[str, Any] | str]:
    """What the rows of a file mean with a preset; the reason for a row that is left out or bad."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    meanings = []
    for row in Mapping(DataConfig(), preset).rows(str(file)):
        match row:
            case SkippedRow():
                meanings.append(row.why)
            case BadRow():
                meanings.append(row.message)
            case _:
                meanings.append(normalised(formats.parse(row.data)))
    return meanings


@pytest.mark.parametrize("preset", [*SFT, *PREFERENCES])
def test_rows_as_published(tmp_path: Path, preset: str) -> None:
    rows = SFT.get(preset) or PREFERENCES[preset]
    formats = SFT_ROWS if preset in SFT else PREFERENCE_ROWS
    assert read(tmp_path, preset, [row for row, _ in rows], formats) == [meaning for _, meaning in rows]


@pytest.mark.parametrize("template", TEMPLATES)
def test_instructions_out_of_supervised_data(tmp_path: Path, template: str) -> None:
    """Every paraphrase is used, always the same for a row, and a prompt has no answer in it."""
    row, question, completion = TEMPLATES[template]
    rows = [row | {"id": i} for i in range(60)]
    meanings = read(tmp_path, template, rows)
    assert {meaning["completion"] for meaning in meanings} == {completion}
    assert all(question in meaning["prompt"] for meaning in meanings)
    prompts = [meaning["prompt"] for meaning in meanings]
    assert len(set(prompts)) >= 2
    assert [m["prompt"] for m in read(tmp_path, template, rows[::-1])] == prompts[::-1]


def test_every_preset_has_a_test() -> None:
    assert set(data_presets()) == {*SFT, *PREFERENCES, *TEMPLATES, "oasst", "oasst-rankings"}
    assert not set(data_presets()) & set(packaged())


def tree(text: str, *replies: dict[str, Any], rank: int | None = None, role: str = "prompter") -> dict[str, Any]:
    return {"message_id": text, "text": text, "role": role, "rank": rank, "replies": list(replies)}


TREE = tree(
    "Q",
    tree("worse", tree("other?", tree("fine", role="assistant")), rank=1, role="assistant"),
    tree(
        "best",
        tree("more?", tree("2", rank=1, role="assistant"), tree("1", rank=0, role="assistant")),
        rank=0,
        role="assistant",
    ),
)
BEST = {"messages": [user("Q"), bot("best"), user("more?"), bot("1")]}
RANKINGS = [
    {"prompt": [user("Q")], "chosen": [bot("best")], "rejected": [bot("worse")]},
    {"prompt": [user("Q"), bot("best"), user("more?")], "chosen": [bot("1")], "rejected": [bot("2")]},
]


def flat(node: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    own = {key: value for key, value in node.items() if key != "replies"} | {
        "parent_id": parent,
        "message_tree_id": "Q",
    }
    return [own, *(message for reply in node["replies"] for message in flat(reply, node["message_id"]))]


@pytest.mark.parametrize("rows", [[{"message_tree_id": "Q", "prompt": TREE}], flat(TREE), flat(TREE)[::-1]])
def test_trees_of_messages(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert read(tmp_path, "oasst", rows) == [BEST]
    by_text = lambda row: len(row["prompt"])  # noqa: E731
    assert sorted(read(tmp_path, "oasst-rankings", rows, PREFERENCE_ROWS), key=by_text) == RANKINGS


def test_messages_whose_tree_is_not_there(tmp_path: Path) -> None:
    rows = [*flat(TREE)[1:], {"text": "a"}]
    bad = [message for message in read(tmp_path, "oasst", rows) if isinstance(message, str)]
    assert (
        bad
        == ['neither a tree nor a message of one: no "message_id" with "text"']
        + ["its parent Q is not in the file"] * 2
    )


def test_trees_with_gaps(tmp_path: Path) -> None:
    """Answers without a rank come last, a question without an answer is left out, ranked questions are no ranking of answers,
    and rankings stand in the order of the tree."""
    answers = lambda name: [tree(f"{name}{k}", rank=k, role="assistant") for k in (1, 0)]  # noqa: E731
    root = tree(
        "Q",
        tree("unranked", tree("first?", *answers("a")), tree("second?", *answers("b")), role="assistant"),
        tree("best", tree("open?", rank=1), tree("open too?", rank=0), rank=0, role="assistant"),
    )
    assert read(tmp_path, "oasst", [{"prompt": root}]) == [{"messages": [user("Q"), bot("best")]}]
    prompt = [user("Q"), bot("unranked")]
    assert read(tmp_path, "oasst-rankings", [{"prompt": root}], PREFERENCE_ROWS) == [
        {"prompt": [*prompt, user("first?")], "chosen": [bot("a0")], "rejected": [bot("a1")]},
        {"prompt": [*prompt, user("second?")], "chosen": [bot("b0")], "rejected": [bot("b1")]},
    ]


ROWS_OF_EVERY_FORMAT = [
    {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5},
    {"prompt": "q", "chosen": [bot("a")], "rejected": "b", "tools": TOOLS},
    {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")], "tools": TOOLS, "margin": 1.5},
    {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, 1]},
    {"prompt": [user("q")], "completions": ["a", "b"], "scores": [1, 2.5], "tools": TOOLS},
    {"prompt": [user("q")], "completion": "a", "label": False, "tools": TOOLS},
    {"prompt": [user("q")], "completion": "a", "score": 3, "tools": TOOLS},
    {"prompt": [user("q")], "completion_a": "a", "completion_b": "b", "annotator": 7, "verdict": "tie", "tools": TOOLS},
]


@pytest.mark.parametrize("row", ROWS_OF_EVERY_FORMAT)
def test_a_row_means_the_same_when_it_is_written_again(row: dict[str, Any]) -> None:
    parsed = PREFERENCE_ROWS.parse(row)
    assert vars(PREFERENCE_ROWS.parse(normalised(parsed))) == vars(parsed)


def test_ids_that_are_no_ids(tmp_path: Path) -> None:
    rows = [flat(TREE)[0] | {"message_id": [1]}, flat(TREE)[1] | {"parent_id": {}}, *flat(TREE)]
    *bad, best = read(tmp_path, "oasst", rows)
    assert best == BEST and len(bad) == 2 and all("unhashable type" in message for message in bad)


def test_columns_whose_names_are_words_of_jinja(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text('columns: {prompt: "none", completion: row}')
    assert read(tmp_path, str(tmp_path / "own.yaml"), [{"none": "Q", "row": "A"}]) == [
        {"prompt": "Q", "completion": "A"}
    ]


def test_half_a_character_in_json_within_a_row(tmp_path: Path) -> None:
    """As chats cut in the middle of an emoji have it; no file can be written with it."""
    half = r"\ud83d"
    arena = {
        "prompt": f'["{half}"]',
        "response_a": '["A"]',
        "response_b": '["B"]',
        "winner_model_a": 1,
        "winner_tie": 0,
    }
    calls = {"system": "", "chat": f'USER: a\n\nASSISTANT: <functioncall> {{"name": "{half}", "arguments": \'{{}}\'}}'}
    tools = {"system": f'{{"name": "{half}"}}', "chat": "USER: a\n\nASSISTANT: b"}
    for preset, row in (("arena-55k", arena), ("glaive-v2", calls), ("glaive-v2", tools)):
        (message,) = read(tmp_path, preset, [row])
        assert r"\ud83d is half of a surrogate pair, not a character" in message


def test_a_bad_row_of_a_preset_has_its_place(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "Q", "answr": "A"}\n')
    (bad,) = Mapping(DataConfig(), "gsm8k").rows(str(file))
    assert str(bad) == f'{file}:1: gsm8k: columns: expected "answer", found "answr"; did you mean "answer"?'


FILES = {
    "[1]": "a preset is made of keys",
    "colums: {a: b}": "there is no key colums; did you mean columns?",
    "columns: {a: 1}": "write `columns` as lines of NAME: NAME",
    "row: {a: '{{ b'}": r"row\.a: not a Jinja template",
    "row: {a: b}\nrows: [{a: b}]": "give one `row`, or several in `rows`",
    "rows: {a: b}": "`rows` is a list",
    "labels: {a: b}": "write `labels` as",
    "skip: [{when: a}]": "`skip` is a list of",
    "trees: {give: all}": "there is no all; names are",
    "a: &a [1]\nb: *a": "an alias .* is not allowed",
    "a: !!python/name:os.system": "a tag .* is not allowed",
}


@pytest.mark.parametrize("text", FILES)
def test_files_that_are_no_presets(tmp_path: Path, text: str) -> None:
    file = tmp_path / f"{abs(hash(text))}.yaml"
    file.write_text(text)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    with pytest.raises(UserError, match=FILES[text]):
        list(Mapping(DataConfig(), str(file)).rows(str(rows)))


def test_presets_of_sources() -> None:
    assert [m.preset and m.preset.name for m in mappings_of(DataConfig(preset=("dolly",)), 2)] == ["dolly", "dolly"]
    assert [m.preset and m.preset.name for m in mappings_of(DataConfig(preset=("dolly", "none")), 2)] == ["dolly", None]
    with pytest.raises(UserError, match=r"--data.preset has 2 names for 3 sources"):
        mappings_of(DataConfig(preset=("dolly", "none")), 3)
    with pytest.raises(
        UserError, match=r"there is no preset doly; did you mean dolly\? \(`lowalign data presets` names them\)"
    ):
        mappings_of(DataConfig(preset=("doly",)), 1)
    with pytest.raises(UserError, match=r"--data.preset dolly says what the columns mean; leave out --data.prompt"):
        mappings_of(PreferenceConfig(preset=("dolly",), prompt="{{a}}"), 1)
