"""How is one variable read, and where are the mistakes collected?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorserve.config.secret_names import BYTES, IN_HEADERS, RAW_KEYS
from tensorserve.config.tidying import has_controls, stripped, tidied
from tensorserve.config.variables import VARIABLES, Variable
from tensorserve.crypto.secret_file import read_secret
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

# Characters of a value that is sent in a request's header: printable ASCII, no space.
_SENDABLE = re.compile(r"[!-~]*")


class VariableReader:
    """Reads an environment and collects all problems, so that they are reported together."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.given = environ
        self.environ: Mapping[str, str] = tidied(environ)
        self.problems: list[str] = []

    def values(self, *attributes: str) -> dict[str, Any]:
        """What the variables of `attributes` say."""
        return {v.attribute: self.value(v) for v in VARIABLES if v.attribute in attributes}

    def raise_problems(self) -> None:
        """Raises ConfigurationError with every mistake that was found."""
        if self.problems:
            count = len(self.problems)
            head = f"{count} mistake{'s' * (count > 1)} in the configuration:"
            raise ConfigurationError(
                "\n".join((head, *self.problems)), problems=tuple(self.problems)
            )

    def problem(self, message: str, hint: str | None = None) -> None:
        """Note a mistake."""
        self.problems.append(str(ConfigurationError(message, hint=hint)))

    def value(self, variable: Variable) -> Any:
        """What the environment says of `variable`; its default, or None for a mistake."""
        if variable.secret:
            return self.secret(variable.name)
        text = self.environ.get(variable.name)
        if text is None:
            return variable.default
        if has_controls(text):
            self.bad_character(variable.name)
            return None
        try:
            return variable.parse(text, variable.name)
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None

    def secret(self, name: str) -> Secret | None:
        """The secret `name`. One that is sent as text must be UTF-8 without control characters."""
        secret = self._given_secret(name)
        if secret is None or name in BYTES:
            return secret
        try:
            text = stripped(secret.reveal().decode())
        except UnicodeDecodeError:
            self.problem(f"{secret.origin} is not UTF-8 text.", "Is it the right secret?")
            return None
        if not text:
            self.problem(f"{secret.origin} is empty.", "Write the secret into it.")
            return None
        # Credentials are sent in headers unchanged. An API key may have more characters.
        sendable = _SENDABLE.fullmatch(text) if name in IN_HEADERS else not has_controls(text)
        if not sendable:
            self.problem(
                f"{secret.origin} has a character that no such value has (white space, a line "
                "break, a letter with an accent, a quotation mark of a word processor).",
                "Copy the value alone, without quotes or spaces around it.",
            )
            return None
        return Secret(text, secret.origin)

    def _given_secret(self, name: str) -> Secret | None:
        """The value of `name`, or the content of the file that `name_FILE` names."""
        file_name = f"{name}_FILE"
        if name in self.environ and file_name in self.environ:
            self.problem(f"Both {name} and {file_name} are set.", "Set one of them.")
            return None
        if name in self.environ:
            return Secret(self.environ[name], origin=name)
        if file_name not in self.environ:
            return None
        if has_controls(self.environ[file_name]):
            self.bad_character(file_name)
            return None
        path = Path(self.environ[file_name])
        origin = f"{file_name}={path}"
        try:
            data = read_secret(path, origin).reveal()
        except ConfigurationError as error:
            self.problems.append(str(error))
            return None
        # Editors add a newline. A raw 32-byte key may end with that byte and is kept as it is.
        stripped = data if len(data) == 32 else data.rstrip(b"\r\n")
        if name in RAW_KEYS and len(stripped) == 32:
            stripped = data  # 32 characters and a line end are text, not a raw key
        if not stripped:
            self.problem(f"{origin} is empty.", "Write the secret into it.")
            return None
        return Secret(stripped, origin)

    def secrets(self, names: Mapping[str, str | None]) -> dict[str, Secret | None]:
        """{name: its secret}, which may be set under its alias instead."""
        secrets: dict[str, Secret | None] = {}
        for name, alias in names.items():
            value = self.secret(name)
            other = self.secret(alias) if alias else None
            if value is not None and other is not None and value != other:
                self.problem(f"{name} and {alias} are both set and differ.", "Set one of them.")
            secrets[name] = value or other
        return secrets

    def either(self, *names: str) -> str | None:
        """The value of the first of `names` that is set."""
        return next((self.environ[name] for name in names if name in self.environ), None)

    def is_given(self, *names: str | None) -> bool:
        """Whether one of `names` is set, valid or not, as a value or as a file."""
        return any(name in self.environ or f"{name}_FILE" in self.environ for name in names if name)

    def bad_character(self, name: str) -> None:
        """Note that the value of `name` has a control character in it."""
        self.problem(
            f"{name} has a character inside that it cannot have (a line break or another control "
            "character, or bytes that are not UTF-8).",
            "Was it copied with its line break, or are two values in it?",
        )
