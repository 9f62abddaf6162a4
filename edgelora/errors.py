"""The exceptions of EdgeLoRA, each with the exit code that the command line gives it.

EdgeLoRAError
├── UserError          2    what the user gave is at fault
│   ├── SettingsError       a setting, flag or TOML key
│   ├── DataError           rows; lists every problem found
│   ├── ModelError          weights, config or tokenizer of a model
│   └── FolderError         a run, merged or bundle folder
├── MachineError       3    this machine cannot: budget, disk, a missing package
└── Interrupted      130    Ctrl-C or SIGTERM, after a checkpoint
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class EdgeLoRAError(Exception):
    """What is wrong, what was found, what is allowed; `hint` is the command or change that helps."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(EdgeLoRAError):
    exit_code = 2


class SettingsError(UserError):
    pass


class DataError(UserError):
    """Rows that cannot be used. `problems` holds one line for each, with its line number."""

    def __init__(self, message: str, problems: Sequence[str] = (), *, hint: str | None = None) -> None:
        shown = list(problems[:20])
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        super().__init__("\n".join([message, *(f"  {line}" for line in shown)]), hint=hint)
        self.problems = list(problems)


class ModelError(UserError):
    pass


class FolderError(UserError):
    pass


class MachineError(EdgeLoRAError):
    exit_code = 3


class Interrupted(EdgeLoRAError):
    exit_code = 130


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the closest allowed name, or an empty string."""
    import difflib  # not at the top: what opens a bundle would wait for it

    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
