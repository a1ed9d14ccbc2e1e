"""The errors both sides share.

OllamaCoordinatorError
├── ConfigError         a setting has a value that cannot work
└── InvalidModelName    a text that Ollama does not accept as a model name
    └── ConflictingSource   a name that asks for a local and a cloud model at once
"""

from .printable import quoted


class OllamaCoordinatorError(Exception):
    """The root of every error this project raises on purpose."""


class ConfigError(OllamaCoordinatorError):
    """A setting has a value that cannot work; says which, and what would be right."""

    def __init__(self, variable: str, value: object, expected: str) -> None:
        super().__init__(f"{variable}={value!s} does not work: {expected}")
        self.variable = variable
        self.value = value


class InvalidModelName(OllamaCoordinatorError):
    """A text that Ollama does not accept as a model name."""

    def __init__(self, text: str) -> None:
        super().__init__("invalid model name")
        self.text = text


class ConflictingSource(InvalidModelName):
    """A name that asks for a local and a cloud model at once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.args = (f"use either :local or :cloud, not both: {quoted(text)}",)
