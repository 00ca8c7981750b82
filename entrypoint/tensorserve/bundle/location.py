"""Which directory, which .tensors files and which served name does a model URI give?"""

from __future__ import annotations

import re
from urllib.parse import unquote

from tensorserve.bundle.manifest import SHARDS, SINGLE
from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_uri
from tensorserve.sources.schemes import scheme_of

# The rank in vLLM's documented name of a shard: "model-rank-%03d.tensors".
SHARD_PATTERN = re.compile(r"%0\dd")
# The served name if the URI has no name in it ("/").
_DEFAULT_NAME = "model"


def shard_name(template: str, rank: int) -> str:
    """The file of `rank`. A template without a pattern is one file for all ranks.

    The % operator is not used: a name may have other percent signs in it.
    """
    return SHARD_PATTERN.sub(lambda found: found[0] % rank, template)


def split_model_uri(uri: str) -> tuple[str, tuple[str, ...]]:
    """(URI of the bundle's directory, candidate names of its .tensors files, percent-decoded).

    Raises ConfigurationError for a template with two rank patterns and for a name with an encoded
    slash.
    """
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    kind = scheme_of(uri)
    query = ""
    if kind.has_query:
        rest, _, _ = rest.partition("#")
        rest, mark, query = rest.partition("?")
        query = mark + query
    directory, slash, name = rest.rpartition("/")
    # "https://x.tensors", "s3://x.tensors" and "hf://organisation/x.tensors" are a host, a bucket
    # and a repository.
    if not name.endswith(".tensors") or (separator and not slash):
        return uri, (SINGLE, SHARDS)
    if separator and not kind.has_query and not _is_place(f"{scheme}://{directory}"):
        return uri, (SINGLE, SHARDS)
    if len(SHARD_PATTERN.findall(name)) > 1:
        raise ConfigurationError(
            f"{redact_uri(uri)}: the name has two patterns for a rank.",
            hint="Use one pattern, for example model-rank-%03d.tensors.",
        )
    if separator and kind.encoded:
        # "%03d" stands for a rank: it is not an encoded character.
        pieces = [unquote(piece) for piece in SHARD_PATTERN.split(name)]
        name = "".join(
            part
            for pair in zip(pieces, [*SHARD_PATTERN.findall(name), ""], strict=True)
            for part in pair
        )
        if "/" in name:
            raise ConfigurationError(
                f"{redact_uri(uri)}: the file's name has an encoded slash (%2F).",
                hint="Give the directory's URL, then a slash and the file's name.",
            )
    if not separator:
        directory = directory or ("/" if slash else ".")
    return f"{scheme}{separator}{directory}{query}", (name,)


def _is_place(uri: str) -> bool:
    try:
        scheme_of(uri).check(uri)
    except ConfigurationError:
        return False
    return True


def served_name_of(uri: str) -> str:
    """The default served model name: the path after `vllm/` (vLLM's convention), or its last part.

    s3://bucket/vllm/my-model/v1 → my-model/v1; /models/my-model/model.tensors → my-model. Without
    a path it is the bucket's or host's name. Credentials before the host are never part of it.
    """
    scheme, separator, rest = redact_uri(uri).partition("://")  # a password may hold a "/"
    place, path = "", uri
    if separator:
        if scheme != "file":
            place, _, rest = rest.partition("?")[0].partition("/")
        path = unquote(rest) if unquote(rest).isprintable() else rest
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if scheme == "hf" and parts:  # hf://organisation/model@revision
        parts[0] = parts[0].partition("@")[0] or parts[0]
    if parts and parts[-1].endswith(".tensors"):
        stem = parts.pop().removesuffix(".tensors")
        if not parts:
            return stem or _DEFAULT_NAME
    if "vllm" in parts[:-1]:
        return "/".join(parts[parts.index("vllm") + 1 :])
    if parts:
        return parts[-1]
    return re.sub(r":\d*$", "", place.rpartition("@")[2]) or _DEFAULT_NAME
