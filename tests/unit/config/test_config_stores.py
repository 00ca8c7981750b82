"""How Google's, Azure's and the hub's variables are read, checked and handed on."""

from __future__ import annotations

import json

import pytest

from tensorserve.config.access import access_for
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.codec import decode, encode
from tensorserve.secret import Secret, without_secrets
from tensorserve.sources import AzureAccess, GcsAccess, HubAccess

URI = {"TENSORSERVE_MODEL_URI": "az://container/m"}
CANARIES = {
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=canary=",
    "AZURE_STORAGE_KEY": "canary1=",
    "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=canary2",
    "AZURE_CLIENT_SECRET": "canary3",
    "HF_TOKEN": "hf_canary4",
}


def test_each_store_gets_what_its_variables_say() -> None:
    """Also for a command that names its URI, and tidied as others are."""
    environ = CANARIES | {
        "AZURE_STORAGE_ACCOUNT": ' "acc"\r\n',
        "AZURE_TENANT_ID": "tenant",
        "AZURE_CLIENT_ID": "client",
        "HF_ENDPOINT": "https://hub.example/",
        "STORAGE_EMULATOR_HOST": "localhost:4443",
        "TENSORSERVE_GCS_UNSIGNED": "true",
    }
    for read in (
        Settings.from_environment(URI | environ),
        SourceSettings.from_environment(environ),
    ):
        access = access_for(read)
        assert access.azure == AzureAccess(
            account="acc",
            connection_string=Secret(CANARIES["AZURE_STORAGE_CONNECTION_STRING"]),
            account_key=Secret("canary1="),
            sas_token=Secret("sv=1&sig=canary2"),
            tenant_id="tenant",
            client_id="client",
            client_secret=Secret("canary3"),
        )
        assert access.hub == HubAccess("https://hub.example", Secret("hf_canary4"))
        assert access.gcs == GcsAccess(unsigned=True, emulator_host="http://localhost:4443")


def test_their_secrets_go_to_other_processes_in_memory_alone() -> None:
    """Not into their environment, nor into what `plan` prints."""
    settings = Settings.from_environment(URI | CANARIES | {"IDENTITY_HEADER": "canary5"})
    names = dict(settings.environment)
    assert not names.keys() & CANARIES.keys()
    plan = make_plan(settings)
    shown = json.dumps(describe(plan, settings))
    assert "canary" not in shown
    assert "azure credentials" in shown
    assert decode(Settings, json.loads(json.dumps(encode(settings)))) == settings


def test_what_googles_and_azures_libraries_read_is_passed_on() -> None:
    """The engine's processes ask them again."""
    given = {
        "GOOGLE_APPLICATION_CREDENTIALS": "/run/secrets/key.json",
        "AZURE_CLIENT_ID": "client",
        "AZURE_FEDERATED_TOKEN_FILE": "/var/run/token",
        "IDENTITY_ENDPOINT": "http://127.0.0.1/msi",
    }
    passed = dict(Settings.from_environment(URI | given).environment)
    assert {name: passed.get(name) for name in given} == given


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"AZURE_STORAGE_KEY": "a", "AZURE_STORAGE_ACCOUNT_KEY": "b"}, "both set and differ"),
        ({"AZURE_STORAGE_ACCOUNT": "a", "AZURE_STORAGE_ACCOUNT_NAME": "b"}, "both set and differ"),
        ({"AZURE_STORAGE_KEY": "a", "AZURE_STORAGE_KEY_FILE": "/b"}, "Both AZURE_STORAGE_KEY and"),
        ({"AZURE_STORAGE_SAS_TOKEN": "sig=canary x"}, "AZURE_STORAGE_SAS_TOKEN has a character"),
        ({"HF_TOKEN": "hf_canary x"}, "HF_TOKEN has a character"),
        ({"AZURE_TENANT_ID": "a\nb"}, "AZURE_TENANT_ID has a character"),
        ({"STORAGE_EMULATOR_HOST": "http://h:99999"}, "is not a URL"),
        ({"HF_ENDPOINT": "huggingface.co"}, "is not a URL"),
        ({"HF_ENDPOINT": "https://u:canary@h"}, "has an @ in it"),
        ({"TENSORSERVE_GCS_UNSIGNED": "maybe"}, "TENSORSERVE_GCS_UNSIGNED"),
    ],
)
@pytest.mark.parametrize("read", [Settings, SourceSettings])
def test_a_mistake_is_said_once(
    read: type[SourceSettings], environ: dict[str, str], said: str
) -> None:
    """78, without a secret."""
    with pytest.raises(ConfigurationError, match="1 mistake") as caught:
        read.from_environment(URI | environ)
    assert said in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_traceback_shows_none_of_their_secrets() -> None:
    """As values of the environment, and as parts of a connection string."""
    environ = CANARIES | {"IDENTITY_HEADER": "canary5"}
    text = "".join(f"{value!r} " for value in environ.values()) + "AccountKey=canary6;"
    assert "canary" not in without_secrets(text, environ)
