"""The documentation against the code: generated pages, names of options, messages, links."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import lowalign
from lowalign.config.verbs import verbs
from lowalign.config.yaml_flags import flag_of, options

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = Path(lowalign.__file__).parent
COMING_FROM = sorted(DOCS.glob("from_*.md"))
FLAGS = {flag_of(name) for verb in verbs() if verb.config for name, _ in options(verb.config)}
FLAGS |= {"--track", "--run-name"}


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["options.md", "api.md"])
def test_generated_pages_are_up_to_date(page):
    assert reference().pages()[page] == (DOCS / page).read_text(), "run python scripts/reference.py"


def test_the_options_page_has_every_option():
    text = (DOCS / "options.md").read_text()
    missing = sorted(flag for flag in FLAGS if f"`{flag}`" not in text)
    # Arguments without a flag are shown by their metavar, sections without a prefix by their own names.
    own = {flag for flag in missing if flag.startswith("--sampling.") or flag.rpartition(".")[2] in text}
    assert set(missing) - own <= {
        "--files",
        "--name",
        "--dest",
        "--path",
        "--repo",
        "--runs",
        "--adapters",
        "--file",
        "--folder",
    }


def cells(page: Path) -> list[list[str]]:
    """The rows of all tables of a page."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.stem)
def test_our_names_on_the_pages_of_other_tools(page):
    """The second column names flags, verbs and functions that exist; values in the third belong to one of its flags."""
    rows = cells(page)
    assert len(rows) > 25
    names = {verb.name for verb in verbs()}
    for _, ours, *note in rows:
        for name in re.findall(r"`([^`]+)`", ours):
            if name.startswith("--"):
                assert name.partition(" ")[0] in FLAGS, name
            elif name.startswith("la."):
                owner, _, member = name.removeprefix("la.").partition(".")
                assert not member or hasattr(getattr(lowalign, owner), member), name
                assert owner in lowalign.__all__, name
            else:
                assert re.match(r"lowalign (\w[\w-]*(?: \w+)?)", name)[1] in names, name
        for flag in re.findall(r"`(--[\w.-]+)", " ".join(note)):
            assert flag in FLAGS, flag


def texts(node: ast.AST) -> list[str]:
    """The strings of a file, with … for what is put into them."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in part.values))
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            found.append(part.value)
    return found


def test_messages_on_the_troubleshooting_page_are_in_the_code():
    code = "\n".join(text for file in PACKAGE.rglob("*.py") for text in texts(ast.parse(file.read_text())))
    messages = [m[1] for first, *_ in cells(DOCS / "troubleshooting.md") if (m := re.fullmatch(r"`(.+)`", first))]
    assert len(messages) > 40
    for message in messages:
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 3]
        assert parts or message == "stage …: …", message
        pattern = ".*?".join(map(re.escape, parts))
        assert re.search(pattern, code), message


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages(page):
    """Files exist, and headings that are linked to."""
    for target, _, heading in re.findall(r"\]\((?!https?:)([\w./-]*)(#([\w-]+))?\)", page.read_text()):
        file = DOCS / target if target else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            ids = {re.sub(r"[^\w-]", "", re.sub(r"\s", "-", re.sub(r"[`*]", "", title.lower()))) for title in titles}
            assert heading in ids, f"{target}#{heading}"


def test_every_page_is_in_the_navigation_and_on_the_first_page():
    pages = {page.name for page in DOCS.glob("*.md")}
    assert set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text())) == pages
    assert set(re.findall(r"\((\w+\.md)\)", (DOCS / "index.md").read_text())) == pages - {"index.md"}
