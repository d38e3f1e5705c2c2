"""Ten questions with known answers that the model gives in full precision.

Only those that the original itself answers count, should another machine's arithmetic lose one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question and words of which an answer must have one."""

    text: str
    answers: tuple[str, ...]
    most_tokens: int = 24

    def holds(self, answer: str) -> bool:
        """Whether a known answer is in `answer` as a whole word.

        >>> Question("What is 2 + 2?", ("4", "four")).holds("It is 4.")
        True
        >>> Question("What is 2 + 2?", ("4", "four")).holds("It is 40.")
        False
        """
        return any(
            re.search(rf"(?<!\w){re.escape(known)}(?!\w)", answer, re.IGNORECASE)
            for known in self.answers
        )


QUESTIONS = (
    Question("What is the capital of France?", ("Paris",)),
    Question("What is the capital of Japan?", ("Tokyo",)),
    Question("What is the capital of Germany?", ("Berlin",)),
    Question("What is the chemical formula of water?", ("H2O", "H₂O")),
    Question("How many days are in a week?", ("7", "seven")),
    Question("What is 2 + 2?", ("4", "four")),
    Question("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    Question("What is the opposite of hot?", ("cold",)),
    Question("What color is the sky on a clear day?", ("blue",)),
    Question("Which ocean is the largest?", ("Pacific",)),
)
