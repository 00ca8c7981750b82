"""The compose file's OpenBao, inside containers: `vault` is the server, `rotate` rotates its key.

The server alone has the volume with its data, unseal key and root token. What the demo's other
containers get is a token each, with one policy; both tokens are in the volume that they share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from openbao import PROGRAM, OpenBao, configuration

ADDRESS = "http://vault:8200"
WRAPPING_KEY = "vault:transit/models"
# Who packs and rewraps; who serves.
POLICIES = {
    "packer": ("transit/encrypt/models", "transit/decrypt/models", "transit/keys/models/rotate"),
    "server": ("transit/decrypt/models",),
}


def serve(data: Path, shared: Path) -> None:
    """Become the server, with its state in `data`; tokens are written to `shared`."""
    config = data / "bao.hcl"
    storage = data / "storage"
    storage.mkdir(exist_ok=True)
    config.write_text(configuration(ADDRESS, "0.0.0.0:8200", directory=storage))
    if os.fork() == 0:
        set_up("http://127.0.0.1:8200", data / "owner.json", shared)
        os._exit(0)
    os.execv(PROGRAM, [PROGRAM, "server", "-config", str(config)])


def set_up(url: str, owner: Path, shared: Path) -> None:
    """Initialise the server at `url` on its first start, unseal it on each; give tokens."""
    server = OpenBao(url)
    server.wait()
    if owner.exists():
        known = json.loads(owner.read_text())
        server.token, server.unseal_key = known["token"], known["unseal_key"]
        server.unseal()
    else:
        server.set_up()
        write_secret(owner, json.dumps({"token": server.token, "unseal_key": server.unseal_key}))
    for name, paths in POLICIES.items():
        server.policy(name, *paths)
        write_secret(token_file(shared, name), server.token_for(name))
    print("unsealed; the tokens are in the volume", flush=True)


def token_file(shared: Path, policy: str) -> Path:
    """Where the token with this policy is."""
    return shared / f"{policy}-token"


def environment(shared: Path, policy: str) -> dict[str, str]:
    """The variables of a command that unwraps with this policy."""
    return {
        "VAULT_ADDR": ADDRESS,
        "VAULT_TOKEN_FILE": str(token_file(shared, policy)),
        "TENSORSERVE_KEY_URI": WRAPPING_KEY,
    }


def rotate(uri: str, shared: Path, variables: dict[str, str]) -> int:
    """A new version of the wrapping key, and the model's key wrapped with it."""
    server = OpenBao(ADDRESS)
    server.token = token_file(shared, "packer").read_text()
    server.rotate("models")
    words = [str(Path(sys.executable).with_name("tensorserve")), "rewrap", uri]
    given = os.environ | variables | environment(shared, "packer")
    return subprocess.run([*words, "--add", WRAPPING_KEY], env=given, check=False).returncode


def write_secret(path: Path, text: str) -> None:
    """Complete or absent, for this user alone: others may read it at any time."""
    half = path.with_suffix(".part")
    half.unlink(missing_ok=True)
    half.touch(mode=0o600)
    half.write_text(text)
    half.rename(path)
