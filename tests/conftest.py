"""One thread, no network; set before anything imports torch. The Hub is a stub, for the tests that ask for it."""

import atexit
import os
import shutil
import tempfile

from tests.hub_stub import HUB, TOKEN, HubStub

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Not the user's cache. A test that looks into it sets a folder of its own.
os.environ["LOWALIGN_CACHE"] = tempfile.mkdtemp(prefix="lowalign-tests-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_ENDPOINT"] = HUB.url  # huggingface_hub reads it once, at import

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["LOWALIGN_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout that holds the real rows."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("the real rows (../shared) are not here")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The Hub of this test, empty, with a cache of its own; TOKEN is set, and retries do not wait."""
    from huggingface_hub import constants

    HUB.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HUB:
        yield HUB


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
