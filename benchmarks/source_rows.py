"""Made rows of every format that lowalign reads, good ones and some that it must drop or refuse, for benchmarks/sources.py."""

import json
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Rows of one format. preferences: for reward and dpo. preset: what their columns mean, if they are not lowalign's."""

    rows: list[Row]
    preferences: bool = False
    preset: str = ""


def user(text: str) -> Row:
    """A question."""
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> Row:
    """An answer."""
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PLACE}}]


def calls(*cities: str) -> Row:
    """A turn that calls `weather` for each city."""
    functions = [{"name": "weather", "arguments": json.dumps({"city": city})} for city in cities]
    written = [{"id": f"c{k}", "type": "function", "function": f} for k, f in enumerate(functions)]
    return {"role": "assistant", "content": None, "tool_calls": written}


def result(call_id: str, text: str) -> Row:
    """What a function gave."""
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def tree(name: str, text: str, role: str, parent: str | None, rank: int | None) -> Row:
    """A message of OpenAssistant."""
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "message_tree_id": "q"}


TREE = [
    tree("q", "Which fox?", "prompter", None, None),
    tree("a", "The quick one.", "assistant", "q", 0),
    tree("b", "A fox.", "assistant", "q", 1),
    tree("r", "And the dog?", "prompter", "a", None),
    tree("c", "It is lazy.", "assistant", "r", 0),
    tree("d", "It sleeps.", "assistant", "r", 1),
]
HH = "\n\nHuman: Which fox?\n\nAssistant:"
SHAPES = {
    "messages": Shape(
        [
            {"messages": [user("Which fox?"), bot("The quick one.")]},
            {"messages": [SYSTEM, user("Which fox?"), bot("Quick."), user("And the dog?"), bot("Lazy.")]},
            {"messages": [user("Which fox?"), user("Tell me."), bot("The quick one.")]},
            {"messages": [bot("Hello."), user("Which fox?"), bot("The quick one.")]},
            {"messages": [user("Which fox?"), bot("The quick one.", weight=0.5)]},
            {"messages": [user("Which fox?")]},
            {"messages": [user("Which fox?"), bot("")]},
        ]
    ),
    "messages with tools": Shape(
        [
            {"messages": [user("Graz?"), calls("Graz"), result("c0", "sun"), bot("Sunny.")], "tools": TOOLS},
            {
                "messages": [
                    user("Graz, Linz?"), calls("Graz", "Linz"), result("c0", "sun"), result("c1", "rain"), bot("Mixed."),
                ],
                "tools": TOOLS,
            },
        ]
    ),
    "messages with thoughts": Shape(
        [
            {"messages": [user("2+2?"), bot("4", reasoning_content="Two and two.")]},
            {
                "messages": [
                    user("2+2?"), bot("<think>\nTwo and two.\n</think>\n\n4"), user("3+3?"), bot("<think>\nSix.\n</think>\n\n6"),
                ]
            },
        ]
    ),
    "sharegpt": Shape(
        [
            {"conversations": [{"from": "human", "value": "Which fox?"}, {"from": "gpt", "value": "The quick one."}]},
            {
                "conversations": [
                    {"from": "human", "value": "Graz?"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Graz"}}'},
                    {"from": "observation", "value": "sun"},
                    {"from": "gpt", "value": "Sunny."},
                ],
                "tools": json.dumps(TOOLS),
            },
            {"conversations": [{"from": "humn", "value": "Which fox?"}, {"from": "gpt", "value": "The quick one."}]},
        ]
    ),
    "alpaca": Shape(
        [
            {"instruction": "Which fox?", "input": "", "output": "The quick one.", "system": "Be brief."},
            {"instruction": "Sort.", "input": "b, a", "output": "a, b", "history": [["Hi", "Hello."]]},
            {"instruction": "Which fox?", "input": "", "output": ""},
        ]
    ),
    "prompt-completion": Shape(
        [{"prompt": "The quick brown", "completion": " fox"}, {"prompt": "", "completion": "A fox."}, {"prompt": "The"}]
    ),
    "prompt-completion, turns": Shape(
        [{"prompt": [SYSTEM, user("Which fox?")], "completion": [bot("The quick one.")]}]
    ),
    "text": Shape([{"text": "The quick brown fox."}, {"text": " "}]),
    "columns of dolly (preset)": Shape(
        [
            {"instruction": "Which fox?", "context": "", "response": "The quick one.", "category": "open_qa"},
            {"instruction": "Which fox?", "context": "Foxes are quick.", "response": "All.", "category": "closed_qa"},
        ],
        preset="dolly",
    ),
    "trees (preset oasst)": Shape(TREE, preset="oasst"),
    "pairs": Shape(
        [
            {"prompt": "The quick brown", "chosen": " fox", "rejected": " dog"},
            {"prompt": "The quick brown", "chosen": " fox", "rejected": " fox"},
            {"prompt": "The quick brown", "chosen": " fox", "rejected": ""},
        ],
        True,
    ),
    "pairs, turns": Shape(
        [
            {"prompt": [SYSTEM, user("Which fox?")], "chosen": [bot("Quick.")], "rejected": [bot("None.")], "margin": 0.5},
            {"prompt": [user("Which fox?")], "chosen": [bot(" Quick. ")], "rejected": [bot("Quick.")], "margin": 0.0},
        ],
        True,
    ),
    "pairs, whole conversations": Shape(
        [
            {"chosen": [user("Which fox?"), bot("Quick.")], "rejected": [user("Which fox?"), bot("None.")]},
            {"chosen": [user("Which fox?"), bot("Quick.")], "rejected": [user("Which dog?"), bot("None.")]},
        ],
        True,
    ),
    "pairs, transcripts": Shape([{"chosen": f"{HH} Quick.", "rejected": f"{HH} None."}], True),
    "pairs, sharegpt": Shape(
        [
            {
                "conversations": [{"from": "human", "value": "Which fox?"}],
                "chosen": {"from": "gpt", "value": "Quick."},
                "rejected": {"from": "gpt", "value": "None."},
            }
        ],
        True,
    ),
    "ranking": Shape(
        [
            {"prompt": "Which fox?", "completions": [" Quick.", " Red.", " None."], "ranks": [1, 2, 2]},
            {"prompt": "Which fox?", "completions": [" Quick.", " Red.", " None."], "ranks": [1, 1, 1]},
        ],
        True,
    ),
    "scores": Shape(
        [
            {"prompt": "Which fox?", "completion": " Quick.", "score": 3},
            {"prompt": "Which fox?", "completion": " None.", "score": 1},
            {"prompt": "Which dog?", "completion": " Lazy.", "score": 2},
        ],
        True,
    ),
    "thumbs": Shape(
        [
            {"prompt": "Which fox?", "completion": " Quick.", "label": True},
            {"prompt": "Which fox?", "completion": " None.", "label": False},
        ],
        True,
    ),
    "verdicts": Shape(
        [
            {"prompt": "Which fox?", "completion_a": " Quick.", "completion_b": " None.", "annotator": who, "verdict": verdict}
            for who, verdict in (("eva", "a"), ("max", "a"), ("ute", "b"))
        ],
        True,
    ),
    "trees (preset oasst-rankings)": Shape(TREE, True, "oasst-rankings"),
}  # fmt: skip
