"""A process that encodes stretches of files for another one: `lowalign.data.tokenizing` starts it and reads what it sends.

It imports no torch. It ends when the other process does.
"""

import gc
import os
import traceback
from multiprocessing.connection import Connection
from typing import Any

from lowalign.data.blocks import BlockEncoder
from lowalign.data.cache import tokenizer_hash
from lowalign.data.chat import Chat
from lowalign.data.dataset import SFT_ENCODER
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.data.report import FileStats
from lowalign.data.rows.mapping import Mapping
from lowalign.data.sources.stretches import Stretch
from lowalign.errors import UserError

ENCODERS = {encoder.name: encoder for encoder in (SFT_ENCODER, PREFERENCE_ENCODER)}


def main(handle: int) -> None:
    """Serve the process at the other end of a pipe, by its file descriptor."""
    connection = Connection(handle)
    try:
        _serve(connection)
    except (EOFError, ConnectionError):  # it has ended
        os._exit(1)


def _serve(connection: Connection) -> None:
    tokenizer, chat_arguments, mapping_arguments, config, encoder = connection.recv()
    chat, mapping = Chat(tokenizer, *chat_arguments), Mapping(*mapping_arguments)
    connection.send(("ready", [tokenizer_hash(tokenizer), chat.templates]))
    gc.freeze()
    while (stretch := connection.recv()) is not None:
        try:
            _encode(stretch, chat, mapping, config, encoder, connection)
        except (EOFError, ConnectionError):
            raise
        except UserError as error:
            connection.send(("error", str(error)))
        except BaseException:
            connection.send(("failed", traceback.format_exc()))


def _encode(stretch: Stretch, chat: Chat, mapping: Mapping, config: Any, encoder: str, connection: Connection) -> None:
    stats, before = FileStats(""), chat.notes.copy()
    part = BlockEncoder(chat, config, ENCODERS[encoder], stats)
    for block in part.encode(map(mapping.row, stretch.rows())):
        connection.send(("block", block))
    stats.notes += chat.notes - before
    connection.send(("end", (part.waiting(), stats)))
