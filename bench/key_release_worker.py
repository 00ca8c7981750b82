"""One sample of key_release.py: seconds from the settings to the key, as `tensorserve up` gets it.

A program of its own that imports nothing of bench/: what a start has not imported yet is a part of
what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> int:
    """Print the sample as JSON; 1 if there is no key."""
    # What a start has imported by then.
    import tensorserve.launch.preflight  # noqa: F401
    from tensorserve.config.settings import SourceSettings
    from tensorserve.config.unwrapping import with_key

    settings = SourceSettings.from_environment(os.environ)
    before = time.perf_counter()
    if settings.key_uri is not None and settings.key_uri.startswith("vault:"):
        import hvac
        import hvac.exceptions  # noqa: F401
    imported = time.perf_counter()
    found = with_key(settings, sys.argv[1])
    seconds = time.perf_counter() - before
    if found.key is None or len(found.key.reveal()) != 32:
        return 1
    print(json.dumps({"seconds": seconds, "import_seconds": imported - before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
