"""Which flags of `vllm serve` do variables set?"""

from __future__ import annotations

from tensorserve.config import vllm_flags
from tensorserve.config.environment import FLAG_ALIASES
from tensorserve.config.secret_names import VLLM_PREFIX
from tensorserve.config.tidying import has_controls
from tensorserve.config.variable_reader import VariableReader
from tensorserve.config.vllm_arguments import Argument, Arguments, argument_of
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret


def read_flags(reader: VariableReader) -> tuple[Arguments, tuple[tuple[str, Secret], ...]]:
    """(flags, secret flags by their names)."""
    plain: list[Argument | None] = []
    secret: dict[str, Secret] = {}
    for alias, flag_name in FLAG_ALIASES.items():
        value = (
            reader.secret(alias)
            if f"{alias}_FILE" in reader.environ or alias in reader.environ
            else None
        )
        if value is not None:
            secret[flag_name] = value
    for name in sorted(reader.environ):
        if not name.startswith(VLLM_PREFIX):
            continue
        suffix = name.removeprefix(VLLM_PREFIX)
        flag = vllm_flags.flag_for(suffix)
        if flag is None and suffix.endswith("_FILE"):
            flag = vllm_flags.flag_for(suffix.removesuffix("_FILE"))
            if flag is not None and flag.name not in vllm_flags.SECRET:
                flag = None
        if flag is None:
            near = vllm_flags.nearest_flag(suffix)
            variable = f"{VLLM_PREFIX}{near.upper().replace('-', '_')}" if near else None
            reader.problem(
                f"{name}: `vllm serve` {vllm_flags.VLLM_VERSION} has no flag "
                f"--{suffix.lower().replace('_', '-')}.",
                f"Did you mean {variable}?" if variable else "See `vllm serve --help=all`.",
            )
        elif flag.name in vllm_flags.SECRET:
            value = reader.secret(name.removesuffix("_FILE"))
            if value is not None:
                secret[flag.name] = value
        elif flag.name in vllm_flags.OWNED:
            reader.problem(f"{name} cannot be set.", f"{vllm_flags.OWNED[flag.name]}.")
        elif flag.name in vllm_flags.RENAMED:
            reader.problem(
                f"{name} has a variable of its own.", f"Set {vllm_flags.RENAMED[flag.name]}."
            )
        else:
            if has_controls(reader.environ[name], allowed="\t\r\n"):  # JSON, a chat template
                reader.bad_character(name)
                continue
            try:
                plain.append(argument_of(flag, reader.environ[name], name))
            except ConfigurationError as error:
                reader.problems.append(str(error))
    flags = Arguments(tuple(argument for argument in plain if argument is not None))
    return flags, tuple(sorted(secret.items(), key=lambda item: item[0]))
