"""Every error a user can cause, in one tree.

Each class is also the built-in it resembles, so that callers of the Python API may catch either. A message says what
was found and where; ``hint`` says what to do next. ``rlhfkit.cli`` turns them into exit text; nothing else prints them.
"""

from __future__ import annotations


class RlhfkitError(Exception):
    """Base of all errors that are the input's fault, not ours.

    Args:
        message: what is wrong, what was found, and where.
        hint: the next thing to do, one line; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling of exceptions; worker processes need them.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[RlhfkitError], message: str, hint: str) -> RlhfkitError:
    return cls(message, hint=hint)


class ConfigError(RlhfkitError, ValueError):
    """A recipe, flag or ``--set`` that is unknown, out of range, or without effect."""

    exit_code = 2


class DataError(RlhfkitError, ValueError):
    """A data file or row that cannot be used; names file, line and field."""


class FamilyError(RlhfkitError, LookupError):
    """No family, several families, or the wrong family for a model."""


class TemplateError(RlhfkitError, ValueError):
    """A chat template that is missing, does not parse, or refuses a conversation."""


class ModelError(RlhfkitError, ValueError):
    """A model or tokenizer folder that cannot be loaded or does not fit its use."""


class CheckpointError(RlhfkitError, RuntimeError):
    """A run folder that cannot be resumed, or a checkpoint that is damaged."""


class RewardError(RlhfkitError, RuntimeError):
    """A reward source that failed or returned something that is not one number per answer."""


class RepairRefusedError(RlhfkitError, ValueError):
    """Two folders that do not belong together; nothing was written."""


class NonFiniteError(RlhfkitError, FloatingPointError):
    """A loss, gradient or reward that is NaN or infinite; names the step."""


class Interrupted(RlhfkitError):
    """Ctrl-C: the state was saved; the hint holds the command that goes on."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
