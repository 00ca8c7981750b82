"""Which draft model (for speculative decoding) does a bundle contain?

The draft is ``draft/NAME/model.tensors`` with the small files of its model directory beside it
(docs/bundle-format.md). NAME is kept because vLLM reads the path: "eagle3" in it selects the method
(vLLM 0.32.0, config/speculative.py, `__post_init__`).
"""

from __future__ import annotations

import re

from tensorserve.bundle.manifest import SINGLE, Manifest
from tensorserve.errors import CorruptError

DRAFTS = "draft"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def draft_file(name: str, file: str) -> str:
    """The path of `file` of draft `name`, relative to the bundle."""
    return f"{DRAFTS}/{name}/{file}"


def draft_in(manifest: Manifest | None) -> str | None:
    """The name of the bundle's draft model, or None.

    Raises CorruptError for more than one draft or an invalid name.
    """
    names = []
    for path in manifest.tensors_files if manifest else ():
        folder, _, file = path.rpartition("/")
        if file == SINGLE and folder.startswith(f"{DRAFTS}/"):
            names.append(folder.removeprefix(f"{DRAFTS}/"))
    if len(names) > 1 or not all(_NAME.fullmatch(name) for name in names):
        raise CorruptError(f"The manifest names drafts {names}; a bundle has at most one.")
    return names[0] if names else None
