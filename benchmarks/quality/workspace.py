"""Where the bench keeps what it makes, so that a second run goes on where the first one stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARAMETERS = 134_515_008
"""Values in SmolLM2-135M's tensors; the head, tied to the embedding, is counted once."""

ROWS, LENGTH = 8, 512
"""Evaluation texts and the tokens of each."""


@dataclass(frozen=True)
class Workspace:
    """The files below one folder; `environments` is another folder for the peers' environments."""

    root: Path
    environments: Path | None = None

    @property
    def source(self) -> Path:
        """The model off its grid: a Hugging Face folder with float32 weights."""
        return self.root / "source"

    @property
    def gguf(self) -> Path:
        """The same weights as one GGUF file, float32."""
        return self.root / "source.gguf"

    @property
    def model_facts(self) -> Path:
        """What the move off the grid did to the logits."""
        return self.root / "source.json"

    @property
    def tokens(self) -> Path:
        """The evaluation tokens [ROWS, LENGTH]."""
        return self.root / "tokens.npy"

    @property
    def reference(self) -> Path:
        """The log-probabilities of transformers in float32 [ROWS, LENGTH, vocabulary]."""
        return self.root / "reference.npy"

    @property
    def questions(self) -> Path:
        """The questions as token ids, and the original's answers."""
        return self.root / "questions.json"

    @property
    def texts(self) -> Path:
        """The folder of the calibration texts."""
        return self.root / "texts"

    @property
    def imatrix(self) -> Path:
        """Mean square of each input channel of each matrix, by GGUF name."""
        return self.root / "imatrix.npz"

    @property
    def venvs(self) -> Path:
        """An environment for each peer."""
        return self.environments or self.root / "venvs"

    def model(self, name: str) -> Path:
        """The package, file or folder of a row."""
        return self.root / "models" / name

    def result(self, name: str) -> Path:
        """What was measured of a row."""
        return self.root / "results" / f"{name}.json"
