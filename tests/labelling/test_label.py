"""`lowalign label`: the page's requests over HTTP, what is on disk after each, and the rows that training reads."""

import http.client
import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import lowalign.commands.label as command
from lowalign.cli import main
from lowalign.commands.label import label
from lowalign.config.label import LabelConfig
from lowalign.config.rows import JudgedRowsConfig
from lowalign.config.sections import BaseConfig, PreferenceConfig, Sampling
from lowalign.data.chat import Chat
from lowalign.data.preferences import load_preferences
from lowalign.data.rows.answers import Answers
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.labelling.agreement import figures
from lowalign.labelling.items import make_items
from lowalign.labelling.judgements import Judgements, row_of
from lowalign.labelling.server import LabelServer
from lowalign.labelling.task import Labelling
from tests.commands.tiny_runs import load, make
from tests.tiny import tiny_tokenizer

PAIRS = [Answers(f"q{i}", [f"x{i}", f"longer y{i}"], f"f:{i}") for i in range(12)]
THREE = [Answers([{"role": "user", "content": f"q{i}"}], ["red", "green", "blue"], f"f:{i}") for i in range(3)]


class Browser:
    """What the page does, with its requests."""

    def __init__(self, server: LabelServer, name: str = "ann") -> None:
        self.server, self.name = server, name

    def request(self, path: str, body: object = None, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=10)
        origin = {"Origin": f"http://{headers.get('Host', self.server.hosts[0])}", "Content-Type": "application/json"}
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        connection.request(method, path, raw, {k: v for k, v in (origin | headers).items() if v})
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    def post(self, path: str, status: int = 200, **body: object) -> dict:
        found, raw, _ = self.request(f"/{self.server.token}/{path}", {"annotator": self.name} | body)
        assert found == status, raw
        return json.loads(raw)

    def next(self) -> dict:
        return self.post("next")

    def pick(self, text: str | None, **more: object) -> dict:
        """The answer with this text is the best of the item that is shown; None: all are equal."""
        item = self.next()["item"]
        ranks = [1 if text is None or answer["text"] == text else 2 for answer in item["answers"]]
        return self.post("judge", item=item["key"], ranks=ranks, **more)


@contextmanager
def serving(out: Path, rows: list[Answers], mode: str = "pick", policies: tuple = ()) -> Iterator[Browser]:
    """The server on what is on the disk; as after a kill, nothing is closed before it starts again."""
    folder = out.with_name(f".{out.name}.run")
    folder.mkdir(exist_ok=True)
    items, _ = make_items(rows, policies)
    with LabelServer(Labelling(items, Judgements(out, folder), mode)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Browser(server)
        finally:
            server.shutdown()
            thread.join()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_judgement_is_on_disk_before_the_next_item_and_outlives_a_kill(tmp_path, monkeypatch):
    """The row and the event are written and synced when the answer with the next item leaves."""
    out = tmp_path / "prefs.jsonl"
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    rng = random.Random(0)
    expected = []
    for start in range(0, 12, 4):
        with serving(out, PAIRS) as page:
            for i in range(start, start + 4):
                assert page.next()["item"]["prompt"] == [{"role": "", "text": f"q{i}"}] and page.next()["judged"] == i
                best = rng.choice([*PAIRS[i].completions, None])
                synced.clear()
                page.pick(best)
                assert {Path(name).name for name in synced} >= {"judgements.jsonl", "prefs.jsonl"}
                expected.append("tie" if best is None else "ab"[PAIRS[i].completions.index(best)])
                assert [row["verdict"] for row in lines(out)] == expected
        with (tmp_path / ".prefs.jsonl.run" / "judgements.jsonl").open("a") as file:
            file.write('{"do": "judge", "annot')  # killed while it wrote
        with out.open("a") as file:
            file.write('{"prompt": "q')
    with serving(out, PAIRS) as page:
        assert page.next()["item"] is None and page.next()["judged"] == 12
    assert [row["verdict"] for row in lines(out)] == expected
    assert lines(out)[0] == {
        "prompt": "q0", "completion_a": "x0", "completion_b": "longer y0", "verdict": expected[0], "annotator": "ann", "source": "f:0",
    }  # fmt: skip


def test_rows_of_somebody_else_are_not_overwritten(tmp_path):
    """Also where the judgements are there and another file took the place of the rows."""
    out = tmp_path / "prefs.jsonl"
    with serving(out, PAIRS) as page:
        page.pick("x0")
        page.pick(None)
        page.post("undo")
    kept = lines(out)
    out.write_text(json.dumps(kept[0] | {"verdict": "b"}) + "\n")
    with pytest.raises(UserError, match="holds no judgements of lowalign label"), serving(out, PAIRS):
        pass
    assert lines(out)[0]["verdict"] == "b"
    out.unlink()
    with serving(out, PAIRS):
        assert lines(out) == kept


def test_order_is_random_the_same_again_and_names_are_not_sent(tmp_path):
    policies = [["runs/secret", "base"]] * 12
    with serving(tmp_path / "out.jsonl", PAIRS, policies=policies) as page:
        first = []
        for _ in range(12):
            shown = page.next()
            assert (
                shown == page.next()
                and "secret" not in json.dumps(shown)
                and shown["item"]["answers"][0].keys() == {"text", "editable"}
            )
            first.append(shown["item"]["answers"][0]["text"].startswith("x"))
            page.pick(None)
        page.name = "ben"
        other = []
        for _ in range(12):
            other.append(page.next()["item"]["answers"][0]["text"].startswith("x"))
            page.post("judge", item=page.next()["item"]["key"], skip=True)
    assert 0 < sum(first) < 12 and first != other
    assert lines(tmp_path / "out.jsonl")[0]["policies"] == ["runs/secret", "base"]


def test_undo_skip_and_a_repeated_click(tmp_path):
    out = tmp_path / "out.jsonl"
    with serving(out, PAIRS) as page:
        assert not page.next()["can_undo"]
        item = page.next()["item"]
        page.pick("x0")
        assert page.post("judge", item=item["key"], ranks=[1, 1])["repeated"]
        assert [row["verdict"] for row in lines(out)] == ["a"]
        page.post("judge", item=page.next()["item"]["key"], skip=True)
        assert page.next()["item"]["prompt"][0]["text"] == "q2" and page.next()["skipped"] == 1
        assert page.post("undo")["item"]["prompt"][0]["text"] == "q1"
        assert page.post("undo")["item"] == item and lines(out) == []
        assert page.post("undo")["item"] == item and not page.next()["can_undo"]
        page.pick("longer y0")
    with serving(out, PAIRS) as page:
        assert [row["verdict"] for row in lines(out)] == ["b"] and page.next()["item"]["prompt"][0]["text"] == "q1"
        assert page.post("undo")["item"] == item and lines(out) == []


def test_rankings_ratings_and_edits_become_rows_that_reward_and_dpo_read(tmp_path):
    out = tmp_path / "out.jsonl"
    answers = lambda row: [answer[0]["content"] for answer in row["completions"]]  # noqa: E731
    with serving(out, THREE, "rank") as page:
        item = page.next()["item"]
        shown = [answer["text"] for answer in item["answers"]]
        page.post("judge", item=item["key"], ranks=[{"blue": 1, "red": 2, "green": 2}[text] for text in shown])
        item = page.next()["item"]
        shown = [answer["text"] for answer in item["answers"]]
        scores = {"blue": 2, "red": 5, "green": 4}
        ranks = {"blue": 3, "red": 1, "green": 2}
        ratings = [scores[text] for text in shown]
        page.post("judge", item=item["key"], ranks=[ranks[text] for text in shown], ratings=ratings)
        item = page.next()["item"]
        shown = [answer["text"] for answer in item["answers"]]
        edit = {"answer": shown.index("green"), "text": "green, indeed"}
        page.post("judge", item=item["key"], ranks=[1 if text == "green" else 2 for text in shown], edit=edit)
    ranked, rated, edited = lines(out)
    assert answers(ranked)[0] == "blue" and ranked["ranks"] == [1, 2, 2] and ranked["annotator"] == "ann"
    assert answers(rated) == ["red", "green", "blue"] and (rated["ranks"], rated["ratings"]) == ([1, 2, 3], [5, 4, 2])
    assert answers(edited)[:2] == ["green, indeed", "green"] and edited["ranks"] == [1, 2, 3, 3] and edited["edited"]
    pair = make_items(PAIRS)[0][0]
    write_jsonl(tmp_path / "more.jsonl", [row_of(pair, "ann", [2, 1]), row_of(pair, "ben", [2, 1]), row_of(pair, "eve", [1, 2]), row_of(pair, "ann", [1, 1], (0, "z"))])  # fmt: skip
    files = [str(out), str(tmp_path / "more.jsonl")]
    data = load_preferences(files, Chat(tiny_tokenizer()), PreferenceConfig(cache=False))
    by_length = {tuple(example.rank) for example in data.examples}
    assert by_length == {(0, 1, 1), (0, 1, 2), (0, 1, 2, 2), (1, 0)}
    assert data.report["files"][1]["agreement"]["agreement"] == pytest.approx(1 / 3)


def test_agreement_figures(tmp_path):
    """Two annotators agree on 9 of 12; ann always takes the longer answer."""
    with serving(tmp_path / "out.jsonl", PAIRS, policies=[["p", "q"]] * 12) as page:
        for i in range(12):
            page.pick(f"longer y{i}")
        page.name = "ben"
        for i in range(12):
            page.pick(f"x{i}" if i < 3 else f"longer y{i}")
        items, judgements = page.server.labelling.items, page.server.labelling.judgements
        found = figures(items, judgements)
        status, raw, _ = page.request(f"/{page.server.token}/figures")
    assert status == 200 and json.loads(raw) == json.loads(json.dumps(found))
    assert found["all"]["agreement"] == 0.75 and found["pairs"] == [
        {"names": ["ann", "ben"], "verdicts": 12, "agreement": 0.75}
    ]
    ann, ben = found["annotators"]
    assert (ann["longer"], ben["longer"], ann["judged"], ann["ties"]) == (1.0, 0.75, 12, 0.0)
    first = sum(item.order("ann")[0] == 1 for item in items)
    assert ann["first_shown"] == first / 12
    assert found["policies"] == [
        {"name": "q", "verdicts": 24, "won": 21 / 24},
        {"name": "p", "verdicts": 24, "won": 3 / 24},
    ]
    assert [one["verdicts"] for one in found["disagreements"]] == [{"ann": "b", "ben": "a"}] * 3


def test_an_edited_answer_has_a_policy_and_no_rating():
    item = replace(make_items(THREE, [["p", "q", "r"]] * 3)[0][0], prompt="q", answers=["red", "green", "blue"])
    row = row_of(item, "ann", [2, 1, 3], (1, "lime"), [2, 3, 1])
    assert row["completions"] == ["lime", "green", "red", "blue"] and row["policies"] == ["ann", "q", "p", "r"]
    assert "ratings" not in row and row_of(item, "ann", [2, 1, 3], None, [2, 3, 1])["ratings"] == [3, 2, 1]


def test_an_answer_with_calls_is_shown_and_cannot_be_edited(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    rows = [Answers("q", ["a", [{"role": "assistant", "content": "", "tool_calls": [call]}]], "f:1")]
    with serving(tmp_path / "out.jsonl", rows) as page:
        item = page.next()["item"]
        k = next(k for k, answer in enumerate(item["answers"]) if "look" in answer["text"])
        assert [answer["editable"] for answer in item["answers"]] == [place != k for place in (0, 1)]
        error = page.post("judge", 400, item=item["key"], ranks=[1, 2], edit={"answer": k, "text": "b"})["error"]
        assert error == "an answer with tool calls or several turns cannot be edited"


def test_ties_are_a_share_of_all_comparisons(tmp_path):
    items, judgements = make_items(THREE)[0], Judgements(tmp_path / "out.jsonl", tmp_path)
    for item, ranks in zip(items, ([1, 1, 2], [1, 2, 3], [1, 1, 1]), strict=True):
        judgements.judge(item, "ann", ranks, None, ())
    assert figures(items, judgements)["annotators"][0]["ties"] == 4 / 9


def test_only_this_page_of_this_machine_is_answered(tmp_path):
    with serving(tmp_path / "out.jsonl", PAIRS) as page:
        token, port = page.server.token, page.server.server_port
        body = {"annotator": "ann"}
        assert page.server.server_address[0] == "127.0.0.1"
        assert page.request(f"/{token}/next", body, Host=f"localhost:{port}")[0] == 200
        for status, path, headers in [
            (404, "/next", {}),
            (404, f"/{token[:-1]}/next", {}),
            (404, f"/{token}", {}),
            (404, f"/{token}/../next", {}),
            (403, f"/{token}/next", {"Host": f"evil.example:{port}"}),
            (403, f"/{token}/next", {"Origin": "http://evil.example"}),
            (403, f"/{token}/next", {"Origin": ""}),
            (400, f"/{token}/next", {"Content-Type": "text/plain"}),
        ]:
            assert page.request(path, body, **headers)[0] == status, (path, headers)
        assert page.request(f"/{token}/", Host=f"evil.example:{port}")[0] == 403
        assert page.request(f"/{token}/next", b"{}", **{"Content-Length": str(2**20 + 1)})[0] == 400
        assert page.request(f"/{token}/next", b"[" * 100_000)[0] == 400
        for path in ("", "agreement", "style.css", "label.js", "agreement.js"):
            status, raw, headers = page.request(f"/{token}/{path}")
            assert status == 200 and headers["Referrer-Policy"] == "no-referrer"
            assert (
                "default-src 'none'" in headers["Content-Security-Policy"]
                and "unsafe" not in headers["Content-Security-Policy"]
            )
            assert b"http" not in raw and b"innerHTML" not in raw  # nothing from a network; no text becomes HTML
        key = page.next()["item"]["key"]
        for wrong in (
            {"item": "0" * 16, "ranks": [1, 2]},
            {"item": key, "ranks": [1]},
            {"item": key, "ranks": [1, True]},
            {"item": key, "ranks": [0, 1]},
            {"item": key, "ranks": [1, 2], "ratings": [6, 1]},
            {"item": key, "ranks": [1, 2], "edit": {"answer": 2, "text": "z"}},
            {"item": key, "ranks": [1, 2], "edit": {"answer": 0, "text": " "}},
            {"item": key, "ranks": [1, 2], "edit": {"answer": 0, "text": "x0"}},
            {"item": key, "ranks": [1, 2], "edit": {"answer": 0, "text": "\ud800"}},
            {"item": key, "skip": True, "annotator": " "},
            {"item": key, "skip": True, "annotator": "a\nb"},
            {"item": key, "skip": True, "annotator": "a" * 61},
        ):
            assert page.post("judge", 400, **wrong)["error"]
        assert page.next()["judged"] == 0 and (tmp_path / "out.jsonl").read_text() == ""


def test_a_full_disk_keeps_the_item_on_the_page(tmp_path, monkeypatch):
    with serving(tmp_path / "out.jsonl", PAIRS) as page:
        item = page.next()["item"]["key"]

        def full(fd):  # half of the line is written
            os.ftruncate(fd, os.fstat(fd).st_size - 20)
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert "No space left" in page.post("judge", 500, item=item, ranks=[1, 2])["error"]
        assert page.next()["item"]["key"] == item
        page.post("judge", item=item, ranks=[1, 2])
    with serving(tmp_path / "out.jsonl", PAIRS) as page:
        assert page.next()["judged"] == 1 and len(lines(tmp_path / "out.jsonl")) == 1


def test_a_row_that_could_not_be_written_comes_with_the_next_one(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    real = os.fsync

    def full(fd):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("out.jsonl"):
            os.ftruncate(fd, os.fstat(fd).st_size - 20)
            raise OSError(28, "No space left on device")
        real(fd)

    with serving(out, PAIRS) as page:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            page.post("judge", 500, item=page.next()["item"]["key"], ranks=[1, 2])
        page.pick("x1")
        assert [row["prompt"] for row in lines(out)] == ["q0", "q1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("label"))
    prompts = [{"prompt": [{"role": "user", "content": f"Where is {place}?"}]} for place in ("Rome", "Bonn", "Oslo")]
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_jsonl(folder / "answers.jsonl", [{"prompt": "q", "completions": ["a", "b", "a", " "]}, {"prompt": "r", "completions": ["a", "a"]}])  # fmt: skip
    return folder


def test_the_command_samples_serves_and_goes_on(world, tmp_path, monkeypatch, capsys):
    """Answers of a policy and of the base are sampled once; Ctrl-C ends with the rows on disk."""
    out = tmp_path / "prefs.jsonl"
    fast = BaseConfig(quantization="none", dtype="float32", device="cpu")
    config = LabelConfig(out, JudgedRowsConfig((str(world / "prompts.jsonl"),)), (str(world / "policy"), "base"), str(world / "model"), sampling=Sampling(max_new_tokens=8), base=fast, open=False)  # fmt: skip
    seen = []

    def one_judgement(server, open_page):
        labelling = server.labelling
        seen.append((labelling.mode, [item.answers for item in labelling.items]))
        labelling.judge(
            {"annotator": "ann", "item": labelling.next({"annotator": "ann"})["item"]["key"], "ranks": [1, 2]}
        )

    with monkeypatch.context() as patch:
        patch.setattr(command, "_serve", one_judgement)
        base = load(world / "model")
        assert label(config, base) == 0
        patch.setattr(command, "PolicyAnswers", None)  # not needed again
        assert label(config, base) == 0
        with pytest.raises(UserError, match="begun with other answers"):
            label(replace(config, sampling=Sampling(max_new_tokens=9)), base)
        assert label(LabelConfig(tmp_path / "other.jsonl", JudgedRowsConfig((str(world / "answers.jsonl"),)))) == 0
    assert seen[0] == seen[1] and seen[0][0] == "pick" and len(seen[0][1]) == 3 and seen[2][1] == [["a", "b"]]
    assert [row["policies"] for row in lines(out)] == [[str(world / "policy"), "base"]] * 2
    err = capsys.readouterr().err
    assert "2 judgements are in" in err and "left out: 1 blank answers" in err and "left out: 2 repeated answers" in err
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert (
        label(LabelConfig(tmp_path / "other.jsonl", JudgedRowsConfig((str(world / "answers.jsonl"),)), open=False)) == 0
    )
    assert "open http://127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "answers.jsonl", "--n", "3"], "--n is the number of answers of a policy"),
        (["--data", "prompts.jsonl", "--model", "m", "--n", "1"], "a judgement needs two answers"),
        (["--data", "prompts.jsonl", "--model", "m", "--sampling.temperature", "0"], "are the same"),
        (["--data", "answers.jsonl", "--port", "99999"], "--port is 99999; it must be at least 0 and at most 65,535"),
        (["--data", "one.jsonl"], "for answers of a model give --adapter POLICY"),
        (["--data", "prompts.jsonl"], 'prompts.jsonl:1: expected "completions"'),
        (["--data", "answers.jsonl", "--out", "answers.jsonl"], "holds no judgements of lowalign label"),
        (["--data", "answers.jsonl", "--out", "no/prefs.jsonl"], "give a file in a folder that exists"),
    ],
)
def test_what_is_held_wrong(words, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("answers.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "q", "completion": "a"}])
    assert main(["label", "--out", "prefs.jsonl", *words]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
