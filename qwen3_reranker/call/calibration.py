"""From log-odds to scores that are shares: P = sigmoid(log-odds / temperature + bias).

Decides what a calibration file must hold and which model it fits. The map rises, so it never
changes an order. Knows nothing of how it is fitted; `qwen3-finetune calibrate` does that.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..data.jsonl import read_json
from ..errors import InputError, ModelLoadError, shown
from ..text.strings import as_string
from . import arguments
from .results import probability

if TYPE_CHECKING:
    from ..text.prompt import PromptTemplate


@dataclass(frozen=True, slots=True)
class Calibration:
    """A temperature and a bias (Platt 1999), and the model they were fitted for.

    Attributes:
        temperature: What log-odds are divided by, above 0; above 1 makes scores less extreme.
        bias: Added after that; below 0 for a model that says yes too often.
        fingerprint: Hash of the weights it was fitted for; None fits any.
        template_hash: Hash of the prompt template it was fitted for; None fits any.

    Raises:
        InputError: If the temperature is not above 0, one of the two is not finite, or a hash is
            no string.

    Example:
        >>> Calibration(temperature=2.0, bias=-1.0).probability(2.0)
        0.5
    """

    temperature: float = 1.0
    bias: float = 0.0
    fingerprint: str | None = None
    template_hash: str | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "bias"):
            value = getattr(self, name)
            number = arguments.to_float(value)
            lowest = 0 if name == "temperature" else -math.inf
            if number is None or not lowest < number < math.inf:  # also NaN
                bound = " above 0" if name == "temperature" else ""
                raise InputError(
                    f"{name} of a calibration must be a finite number{bound}, got {shown(value)}. "
                    "Fit it with qwen3-finetune calibrate."
                )
            object.__setattr__(self, name, number)
        for name in ("fingerprint", "template_hash"):
            text = arguments.check_name(f"{name} of a calibration", getattr(self, name))
            object.__setattr__(self, name, text)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `qwen3-finetune calibrate` wrote.

        Raises:
            InputError: If it cannot be read, or is no such file.
        """
        file = Path(path)
        if os.path.isdir(file):
            raise InputError(
                f"calibration '{file}' is a folder. Pass the file in it, '{file / FILE_NAME}'."
            )
        try:
            content = read_json(file)
            parts = (
                content["temperature"],
                content["bias"],
                as_string(content["model"]["fingerprint"]),
                as_string(content["template"]["hash"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            what = error if isinstance(error, ValueError) else "it lacks what such a file holds"
            raise InputError(
                f"calibration '{file}' cannot be used ({what}). Pass a file that "
                "qwen3-finetune calibrate wrote."
            ) from error
        return cls(*parts)

    def probability(self, log_odds: float) -> float:
        """Return the calibrated score of a model's log-odds."""
        return probability(log_odds / self.temperature + self.bias)

    def refuse_other(self, fingerprint: str, template: PromptTemplate) -> None:
        """Refuse a model or prompt that this was not fitted for: its scores would be wrong numbers.

        Raises:
            ModelLoadError: If the weights or the template are others.
        """
        if self.template_hash not in (None, template.hash):
            raise ModelLoadError(
                "the calibration was fitted with another prompt template "
                f"({self.template_hash:.12}) than {template.id!r} ({template.hash[:12]}), which "
                "would change its scores. Fit one with qwen3-finetune calibrate, or pass the "
                "template it was fitted with."
            )
        if self.fingerprint not in (None, fingerprint):
            raise ModelLoadError(
                "the calibration was fitted for other weights than these, whose log-odds lie "
                "elsewhere. Fit one for this model and adapter with qwen3-finetune calibrate."
            )


FILE_NAME = "calibration.json"

UNCALIBRATED = Calibration()
"""The model's own P("yes")."""


def calibration_of(value: Any) -> Calibration | None:
    """Return a calibration from itself or its file; None stays None.

    Raises:
        InputError: If it is none of these, or the file cannot be used.
    """
    kind = type(value)
    if value is None or issubclass(kind, Calibration):
        found: Calibration | None = value
        return found
    if issubclass(kind, (str, os.PathLike)):
        return Calibration.read(os.fsdecode(value))
    raise InputError(
        f"calibration must be a file, a Calibration or None, got {type(value).__name__}. Pass the "
        f"{FILE_NAME} that qwen3-finetune calibrate wrote."
    )
