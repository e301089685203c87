"""Talk with a trained model: every message sees the conversation before it."""

from __future__ import annotations

from dataclasses import replace

from transformers import TextStreamer

from toolkit.config.data_schema import DataConfig
from toolkit.data.questions import from_prompt
from toolkit.inference.answering import Answerer
from toolkit.runtime.printable import printable
from toolkit.tasks.sample import ASSISTANT, SYSTEM, Turn


class Chat:
    """A conversation with the model of ``answerer``; ``data`` is the section of its run's recipe.

    A message is asked as a question of the run's task. Where the conversation becomes longer than the answerer's
    ``max_length``, its first exchanges are left out. Plain text, without roles, is continued by itself.
    """

    def __init__(self, answerer: Answerer, data: DataConfig) -> None:
        self._answerer, self._data = answerer, data
        self._turns: tuple[Turn, ...] = ()
        self._messages = 0

    def reply(self, message: str, prints: bool = False) -> str:
        """Return the answer to a message; with ``prints`` its tokens are printed meanwhile.

        Raises:
            DataError: the message is empty, too long, or cannot be asked by the run's task.
        """
        asked = from_prompt(message, (), self._data, self._answerer.rendering, "the message")
        if self._turns and not asked.is_text:
            asked = replace(
                asked, turns=(*self._turns, *(turn for turn in asked.turns if turn.role != SYSTEM)), arrange=None
            )
        streamer = None
        if prints:
            print(printable(self._answerer.opening), end="", flush=True)
            streamer = _Streamer(self._answerer.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer = self._answerer.answer(asked, self._messages, streamer)
        self._answerer.report_control_tokens()
        self._turns, self._messages = (*asked.turns, Turn(ASSISTANT, answer)), self._messages + 1
        return answer

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns = ()


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Prints an answer while it is given, with its control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the answer."""
        super().on_finalized_text(printable(text), stream_end)
