"""Keys by reference and signatures with the real commands, and the pages about them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyrage
import pytest
from s3server import free_ports

from hf_samples import make_model
from key_services import moto_server, openbao
from key_stand_ins import DataHub, GoogleKms, KeyVault

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
# What this machine has no program for; the test does it.
AGE_KEYGEN = """#!{python}
import sys, pyrage
if sys.argv[1] == "-y":
    line = [l for l in open(sys.argv[2]).read().split() if l.startswith("AGE-")][0]
    print(pyrage.x25519.Identity.from_str(line).to_public())
else:
    open(sys.argv[2], "w").write("# made by the test\\n%s\\n" % pyrage.x25519.Identity.generate())
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory with a model."""
    model = make_model(tmp_path / "my-model")
    (model / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(work: Path, words: list[str], environ: dict[str, str], *, code: int = 0) -> str:
    """What a command prints; it must end with `code`."""
    done = subprocess.run(
        words,
        cwd=work,
        env=environment(work) | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def environment(work: Path) -> dict[str, str]:
    port, metrics = map(str, free_ports(2))
    return {
        "PATH": f"{work / 'bin'}:{BIN}:{os.environ['PATH']}",
        "HOME": str(work),
        "TENSORSERVE_STATE_DIR": str(work / "state"),
        "TENSORSERVE_PORT": port,
        "TENSORSERVE_METRICS_PORT": metrics,
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_METRICS_HOST": "127.0.0.1",
    }


def tensorserve(work: Path, *words: str, code: int = 0, **environ: str) -> str:
    return run(work, [str(BIN / "tensorserve"), *words], environ, code=code)


def test_a_key_is_wrapped_used_and_rotated(work: Path) -> None:
    """With OpenBao: the model's key is in no file at all, and the old recipient is refused."""
    (work / "backup").write_bytes(os.urandom(32))
    with openbao() as bao:
        owner = {"VAULT_ADDR": bao.url, "VAULT_TOKEN": bao.token}
        bao.make_key("next")
        bao.policy("old", "transit/decrypt/models")
        bao.policy("new", "transit/decrypt/next")
        old, new = ({**owner, "VAULT_TOKEN": bao.token_for(name)} for name in ("old", "new"))
        said = tensorserve(
            work, "pack", "my-model", "b", "--encrypt", "--wrap", "vault:transit/models",
            "--wrap", f"file:{work / 'backup'}", **owner,
        )  # fmt: skip
        assert "nowhere but wrapped" in said
        before = {p.name: p.read_bytes() for p in (work / "b").iterdir() if p.is_file()}
        model = {"TENSORSERVE_MODEL_URI": str(work / "b")}
        by_uri = {"TENSORSERVE_KEY_URI": "vault:transit/models"}
        for given in (model | by_uri, model):
            checked = tensorserve(work, "check", **given, **old)
            assert f"unwrapped by vault:transit/models at {bao.url}" in checked.replace("  ", " ")
            assert ("a plain bundle would be refused" in checked) == (given == model)
        planned = tensorserve(work, "plan", **model, **by_uri, **old)
        assert f"vault:transit/models (at {bao.url}, with a token)" in planned
        assert old["VAULT_TOKEN"] not in planned
        tensorserve(work, "verify", "b", **by_uri, **old)
        rewrapped = tensorserve(
            work, "rewrap", "b", "--add", "vault:transit/next", "--remove", "vault:transit/models",
            **owner,
        )  # fmt: skip
        assert "no longer for vault:transit/models" in rewrapped
        after = {p.name: p.read_bytes() for p in (work / "b").iterdir() if p.is_file()}
        assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}
        refused = tensorserve(work, "verify", "b", code=65, **by_uri, **old)
        assert "not wrapped for vault:transit/models" in refused or "does not unwrap" in refused
        assert "permission denied" in tensorserve(work, "verify", "b", code=77, **old)
        by_new = {"TENSORSERVE_KEY_URI": "vault:transit/next"}
        tensorserve(work, "check", **model, **by_new, **new)
        tensorserve(work, "verify", "b", **by_new, **new)
        # A new key for the model itself: the old recipient's key opens nothing of it.
        rekeyed = tensorserve(
            work, "rekey", "b", "c", "--wrap", "vault:transit/models", **by_new, **owner
        )
        assert "nowhere but wrapped" in rekeyed
        tensorserve(work, "verify", "c", **by_uri, **old)
        tensorserve(work, "verify", "c", code=65, **by_new, **new)
        tensorserve(work, "verify", "b", **by_new, **new)
    tensorserve(work, "verify", "b", TENSORSERVE_KEY_URI=f"file:{work / 'backup'}")


def test_a_passphrase_and_a_wrapped_key_exclude_each_other(work: Path) -> None:
    """64, as options that contradict; 78, as settings that do."""
    (work / "p").write_text("passphrase")
    for words in (
        ["--wrap", "file:/k"],
        ["--encrypt", "--wrap", "file:/k", "--passphrase-file", "p"],
    ):
        assert "--wrap" in tensorserve(work, "pack", "my-model", "b", *words, code=64)
    assert "Both TENSORSERVE_KEY_URI and a key" in tensorserve(
        work, "verify", "b", code=78, TENSORSERVE_KEY_URI="file:/k", TENSORSERVE_KEY="00" * 32
    )
    assert not (work / "b").exists()


def blocks() -> dict[str, str]:
    """The block of each section of the page."""
    page = (ROOT / "docs" / "keys.md").read_text()
    found = {}
    for section in page.split("\n## ")[1:]:
        if block := re.search(r"```bash\n(.*?)```", section, re.DOTALL):
            found[section.partition("\n")[0]] = block[1]
    return found


def test_the_page_has_a_block_for_each_kind() -> None:
    """Which the tests below run."""
    assert list(blocks()) == [
        "A wrapping key in a file", "age", "Vault and OpenBao", "AWS KMS", "Google Cloud KMS",
        "Azure Key Vault", "CoCo's key broker",
    ]  # fmt: skip


def test_the_page_on_signatures(work: Path) -> None:
    """As it stands, but for pip: the last line needs nothing of ours."""
    page = (ROOT / "docs" / "signatures.md").read_text()
    found = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    ours = [line for line in lines if not line.startswith("pip install")]
    assert len(lines) - len(ours) == 1
    said = run(work, ["bash", "-euo", "pipefail", "-c", "\n".join(ours)], {})
    assert re.search(r"^ok +model\.sig +signed by key [0-9a-f]{64}$", said, re.MULTILINE)
    assert said.rstrip().endswith("Verification succeeded")


def bash(work: Path, block: str, environ: dict[str, str]) -> None:
    said = run(work, ["bash", "-euo", "pipefail", "-c", block], environ)
    assert "authenticated by the key" in said


def test_the_page_on_files(work: Path) -> None:
    """As it stands."""
    bash(work, blocks()["A wrapping key in a file"], {})


def test_the_page_on_age(work: Path) -> None:
    """As it stands; age-keygen is the test's own, over the same library."""
    (work / "bin").mkdir()
    program = work / "bin" / "age-keygen"
    program.write_text(AGE_KEYGEN.format(python=sys.executable))
    program.chmod(0o755)
    assert pyrage.x25519.Identity.generate()
    bash(work, blocks()["age"], {})
    uri = f"age:{work / 'identity.txt'}"
    shown_by_plan_and_check(work, uri, uri, printed_fingerprint(work))


def test_the_page_on_vault(work: Path) -> None:
    """As it stands, against a real OpenBao."""
    with openbao() as bao:
        bao.ask("DELETE", "sys/mounts/transit")
        block = blocks()["Vault and OpenBao"]
        bash(work, block, {"BAO_ADDR": bao.url, "BAO_TOKEN": bao.token})


def test_the_page_on_kms(work: Path) -> None:
    """Against moto's server. The first two lines, which are for AWS's command line, by boto3."""
    lines = blocks()["AWS KMS"].splitlines()
    ours = [line for line in lines if "aws kms " not in line]
    assert len(lines) - len(ours) == 2
    with moto_server() as kms:
        kms.make_key("models")
        bash(work, "\n".join(ours), kms.environ)
        uri = "awskms:alias/models"
        shown_by_plan_and_check(work, uri, f"{uri} (in {kms.region})", kms.environ)


def without(block: str, program: str, count: int) -> str:
    """The block but for the lines of a program that this machine has not: the test does these."""
    lines = block.splitlines()
    ours = [line for line in lines if not line.startswith(f"{program} ")]
    assert len(lines) - len(ours) == count
    return "\n".join(ours)


def test_the_page_on_google(work: Path) -> None:
    """Against a stand-in, whose host the block gets; the key, which gcloud would make, is there."""
    block = without(blocks()["Google Cloud KMS"], "gcloud", 2)
    with GoogleKms(work / "kms") as kms:
        name = re.search(r"^key=(.*)$", block, re.MULTILINE)
        assert name is not None
        kms.keys[name[1]] = os.urandom(32)
        block = block.replace("gcpkms:$key", f"gcpkms://{kms.host}/$key")
        bash(work, block, kms.environ)
        uri = f"gcpkms://{kms.host}/{name[1]}"
        shown_by_plan_and_check(work, uri, f"(at {kms.host}, with Google's", kms.environ)


def test_the_page_on_azure(work: Path) -> None:
    """Against a stand-in, whose host the block gets; the key, which az would make, is there."""
    block = without(blocks()["Azure Key Vault"], "az", 1)
    with KeyVault(work / "vault") as vault:
        vault.make_key("models")
        bash(work, block.replace("//my-vault/", f"//{vault.host}/"), vault.environ)
        uri = f"azurekeyvault://{vault.host}/models"
        refused = tensorserve(
            work, "verify", "bundle", code=78, TENSORSERVE_KEY_URI=uri, **vault.environ
        )
        assert "anybody can wrap a key of his own" in refused
        given = vault.environ | printed_fingerprint(work)
        shown_by_plan_and_check(work, uri, f"(at {vault.host}, with azure-identity's", given)


def test_the_page_on_cocos_broker(work: Path) -> None:
    """Against a stand-in for the guest's hub, to which the test gives what kbs-client would."""
    block = without(blocks()["CoCo's key broker"], "kbs-client", 1)
    packing, _, guest = block.partition("\n\n")
    with DataHub() as hub:
        assert "key wrapped for file:" in run(work, ["bash", "-euo", "pipefail", "-c", packing], {})
        key = work / "wrapping.key"
        hub.resources["default/wrapping-key/models"] = key.read_bytes()
        key.unlink()
        bash(work, guest, hub.environ)
        uri = "kbs:///default/wrapping-key/models"
        shown_by_plan_and_check(work, uri, f"Data Hub at {hub.url}", hub.environ)


def printed_fingerprint(work: Path) -> dict[str, str]:
    """As the pages' blocks take it from what `pack` printed."""
    said = re.search(r"key fingerprint: (\w+)", (work / "packed.txt").read_text())
    assert said is not None
    return {"TENSORSERVE_KEY_FINGERPRINT": said[1]}


def shown_by_plan_and_check(work: Path, uri: str, where: str, environ: dict[str, str]) -> None:
    """`plan` says where it would be asked, and asks nobody; `check` says who unwrapped it."""
    given = environ | {"TENSORSERVE_MODEL_URI": str(work / "bundle"), "TENSORSERVE_KEY_URI": uri}
    assert where in tensorserve(work, "plan", **given)
    assert "unwrapped by " in tensorserve(work, "check", **given)
