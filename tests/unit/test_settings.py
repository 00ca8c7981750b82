"""Settings: what the environment may say, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret
from tensorserve.settings import Settings, handed_over
from tensorserve.variables import VARIABLES, parse_size

URI = {"TENSORSERVE_MODEL_URI": "s3://bucket/vllm/model/v1"}
KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment(environ)
    return caught.value.problems


def only_problem(environ: dict[str, str]) -> str:
    found = problems(environ)
    assert len(found) == 1, found
    return found[0]


def test_defaults_are_those_that_are_documented() -> None:
    """With the URI alone, everything has its documented default."""
    settings = Settings.from_environment(URI)
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert (settings.metrics_host, settings.metrics_port) == ("0.0.0.0", 9400)
    assert settings.host_memory_limit is None
    assert settings.key is None
    assert settings.engine_restarts == 0


def test_a_missing_model_uri_is_named_with_an_example() -> None:
    """The one variable that must be set is asked for by name."""
    message = only_problem({})
    assert "TENSORSERVE_MODEL_URI is not set" in message
    assert "s3://" in message


def test_an_unknown_variable_names_the_nearest_known_one() -> None:
    """A typing mistake is not ignored."""
    assert "Did you mean TENSORSERVE_MODEL_NAME" in only_problem(
        URI | {"TENSORSERVE_MODLE_NAME": "x"}
    )


def test_every_mistake_is_reported_at_once() -> None:
    """A user mends all mistakes in one go."""
    found = problems({"TENSORSERVE_PORT": "http", "TENSORSERVE_HOTS": "x"})
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TENSORSERVE_MODEL_URI", "https://user:ca/nary@host/m"),
        ("TENSORSERVE_MODEL_URI", "https://user:canary@[::1/m"),
        ("TENSORSERVE_MODEL_URI", "s3://user:canary@bucket/m"),
        ("TENSORSERVE_MODEL_URI", "ftp://user:canary@host/m"),
        ("AWS_ENDPOINT_URL_S3", "https://user:canary@host"),
        ("AWS_ENDPOINT_URL_STS", "https://user:canary@host"),
        ("S3_ENDPOINT_URL", "user:canary@host"),
    ],
)
def test_a_wrong_uri_is_refused_without_its_credentials(name: str, value: str) -> None:
    """The message is printed, and stands in the container's log."""
    message = only_problem(URI | {name: value})
    assert name.replace("S3_ENDPOINT_URL", "ENDPOINT") in message or "endpoint" in message
    assert "nary" not in message


def test_a_secret_and_its_file_exclude_each_other(tmp_path: Path) -> None:
    """Which of two values would win is never guessed."""
    file = tmp_path / "key"
    file.write_text(KEY)
    message = only_problem(URI | {"TENSORSERVE_KEY": KEY, "TENSORSERVE_KEY_FILE": str(file)})
    assert "Both TENSORSERVE_KEY and TENSORSERVE_KEY_FILE are set" in message


@pytest.mark.parametrize("content", [bytes(range(32)), KEY.encode() + b"\n", bytes(31) + b"\n"])
def test_a_key_file_is_raw_or_text_with_a_newline(tmp_path: Path, content: bytes) -> None:
    """A raw key that happens to end with a newline byte is kept whole."""
    file = tmp_path / "key"
    file.write_bytes(content)
    settings = Settings.from_environment(URI | {"TENSORSERVE_KEY_FILE": str(file)})
    assert settings.key is not None
    assert len(settings.key.reveal()) in {32, 64}
    assert str(file) in settings.key.origin


@pytest.mark.parametrize("text", ["correct horse battery staple 123", "0" * 32, "é" * 16])
def test_32_characters_in_a_variable_are_no_key(tmp_path: Path, text: str) -> None:
    """A passphrase of that length would be taken for a key that everybody can guess."""
    message = only_problem(URI | {"TENSORSERVE_KEY": text})
    assert "TENSORSERVE_PASSPHRASE" in message
    assert text not in message
    file = tmp_path / "key"
    file.write_text(text)
    settings = Settings.from_environment(URI | {"TENSORSERVE_KEY_FILE": str(file)})
    environment, origins = handed_over(URI, settings)
    again = Settings.from_environment(environment, origins)
    assert again.key is not None
    assert bytes.fromhex(again.key.reveal_text()) == text.encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_32_characters_and_a_line_end_in_a_file_are_no_key(tmp_path: Path, end: str) -> None:
    """As `pack` has it: a raw key is a file of 32 bytes, and `echo` writes a passphrase so."""
    file = tmp_path / "key"
    file.write_bytes(f"correct horse battery staple 123{end}".encode())
    message = only_problem(URI | {"TENSORSERVE_KEY_FILE": str(file)})
    assert "TENSORSERVE_PASSPHRASE" in message
    assert "correct" not in message


def test_a_key_of_the_wrong_length_is_refused_without_showing_it() -> None:
    """The message helps, and does not leak."""
    message = only_problem(URI | {"TENSORSERVE_KEY": "hunter2hunter2"})
    assert "32" in message
    assert "hunter2" not in message


def test_an_unreadable_secret_file_says_which_and_why() -> None:
    """The usual mistake: the secret is not mounted."""
    message = only_problem(URI | {"TENSORSERVE_KEY_FILE": "/nonexistent/key"})
    assert "TENSORSERVE_KEY_FILE=/nonexistent/key: No such file or directory" in message


def test_key_and_passphrase_exclude_each_other() -> None:
    """A file is sealed with one of them."""
    assert "Both a key and a passphrase" in only_problem(
        URI | {"TENSORSERVE_KEY": KEY, "TENSORSERVE_PASSPHRASE": "x"}
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TENSORSERVE_MODEL_URI", "gs://bucket/model", "the scheme 'gs' is not supported"),
        ("TENSORSERVE_MODEL_URI", "s3:///model", "no bucket"),
        ("TENSORSERVE_MODEL_URI", "s3://b uck/model", "s3://b uck: that is not the name"),
        ("TENSORSERVE_MODEL_URI", " ", "is empty"),
        ("TENSORSERVE_PORT", "0", "is not a port"),
        ("TENSORSERVE_FETCH_CONNECTIONS", "0", "from 1 to 512"),
        ("TENSORSERVE_HOST_MEMORY_LIMIT", "1 apple", "is not a size"),
        ("TENSORSERVE_HOST_MEMORY_LIMIT", "1MiB", "too little"),
        ("TENSORSERVE_VERIFY", "maybe", "not one of auto, hashes"),
        ("TENSORSERVE_STATE_DIR", "relative", "not an absolute path"),
        ("TENSORSERVE_FETCH_DEADLINE", "soon", "seconds"),
        ("TENSORSERVE_ENGINE_RESTARTS", "-1", "whole number"),
    ],
)
def test_a_bad_value_is_explained(name: str, value: str, said: str) -> None:
    """Each message names the variable and what it takes."""
    message = only_problem(URI | {name: value})
    assert name in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1024**3), ("512m", 512 * 10**6), ("64Mi", 64 * 1024**2), ("1073741824", 1024**3)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    """Binary and decimal units are told apart."""
    assert parse_size(text, "X") == size


def test_vllm_flags_become_arguments() -> None:
    """Values, switches and lists take the forms that argparse wants."""
    settings = Settings.from_environment(
        URI
        | {
            "TENSORSERVE_VLLM_MAX_MODEL_LEN": "4096",
            "TENSORSERVE_VLLM_ENFORCE_EAGER": "true",
            "TENSORSERVE_VLLM_ENABLE_PREFIX_CACHING": "false",
            "TENSORSERVE_VLLM_HF_OVERRIDES": '{"a": "b c"}',
            "TENSORSERVE_VLLM_CHAT_TEMPLATE": "--looks-like-a-flag %(ENV_HOME)s\n'x'",
        }
    )
    words = [word for _, words in settings.flags for word in words]
    assert "--max-model-len=4096" in words
    assert "--enforce-eager" in words
    assert "--no-enable-prefix-caching" in words
    assert '--hf-overrides={"a": "b c"}' in words
    assert "--chat-template=--looks-like-a-flag %(ENV_HOME)s\n'x'" in words


def test_an_unknown_vllm_flag_suggests_a_known_one() -> None:
    """Checked before vLLM is imported."""
    message = only_problem(URI | {"TENSORSERVE_VLLM_MAX_MODEL_LENGHT": "1"})
    assert "Did you mean TENSORSERVE_VLLM_MAX_MODEL_LEN?" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LOAD_FORMAT", "cannot be set"),
        ("MODEL", "TENSORSERVE_MODEL_URI"),
        ("PORT", "TENSORSERVE_PORT"),
        ("MODEL_LOADER_EXTRA_CONFIG", "cannot be set"),
    ],
)
def test_flags_that_we_own_are_refused(name: str, said: str) -> None:
    """A flag that the bundle decides is a conflict, not a preference."""
    assert said in only_problem(URI | {f"TENSORSERVE_VLLM_{name}": "x"})


def test_a_whole_number_is_wanted_where_vllm_wants_one() -> None:
    """Found before vLLM's imports."""
    message = only_problem(URI | {"TENSORSERVE_VLLM_PIPELINE_PARALLEL_SIZE": "two"})
    assert "not a whole number" in message


@pytest.mark.parametrize("name", ["TENSORSERVE_VLLM_API_KEY", "VLLM_API_KEY"])
def test_the_api_key_never_becomes_an_argument_or_a_childs_variable(name: str) -> None:
    """Both spellings are taken, neither is passed on in the open."""
    settings = Settings.from_environment(URI | {name: "canary"})
    assert dict(settings.secret_flags)["api-key"] == Secret("canary")
    assert "canary" not in repr(settings)
    assert "canary" not in str(settings.flags) + str(settings.environment)


def test_aliases_for_s3_are_honoured() -> None:
    """The names that tensorizer's users know mean the same."""
    settings = Settings.from_environment(
        URI
        | {
            "S3_ACCESS_KEY_ID": "id",
            "S3_SECRET_ACCESS_KEY": "secret",
            "S3_ENDPOINT_URL": "http://127.0.0.1:9000",
        }
    )
    assert settings.s3.access_key_id == Secret("id")
    assert settings.s3.secret_access_key == Secret("secret")
    assert settings.s3.endpoint_url == "http://127.0.0.1:9000"


def test_aliases_that_contradict_are_refused() -> None:
    """Which of two would win is never guessed."""
    assert "differ" in only_problem(
        URI | {"AWS_ACCESS_KEY_ID": "a", "S3_ACCESS_KEY_ID": "b", "AWS_SECRET_ACCESS_KEY": "s"}
    )


def test_half_a_pair_of_credentials_is_refused() -> None:
    """botocore would fall through to another source in silence."""
    assert "AWS_SECRET_ACCESS_KEY is missing" in only_problem(URI | {"AWS_ACCESS_KEY_ID": "a"})


def test_children_get_an_allow_list_of_the_environment() -> None:
    """What is not known to be harmless stays with us."""
    settings = Settings.from_environment(
        URI
        | {
            "PATH": "/bin",
            "DATABASE_PASSWORD": "canary",
            "AWS_SECRET_ACCESS_KEY": "canary",
            "AWS_ACCESS_KEY_ID": "canary",
            "HF_TOKEN": "canary",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "AWS_ROLE_ARN": "arn",
            "EXTRA": "wanted",
            "TENSORSERVE_PASS_ENV": "EXTRA",
        }
    )
    names = dict(settings.environment)
    assert names == {
        "PATH": "/bin",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "AWS_ROLE_ARN": "arn",
        "EXTRA": "wanted",
    }


def test_what_is_handed_over_makes_the_same_settings(tmp_path: Path) -> None:
    """A child needs no secret file any more, and messages still name it."""
    file = tmp_path / "key"
    file.write_bytes(bytes(range(32)))
    environ = URI | {
        "TENSORSERVE_KEY_FILE": str(file),
        "TENSORSERVE_VLLM_MAX_MODEL_LEN": "512",
        "TENSORSERVE_STATE_DIR": str(tmp_path),
        "S3_ACCESS_KEY_ID": "id",
        "S3_SECRET_ACCESS_KEY": "secret",
        "VLLM_API_KEY": "api",
        "PATH": "/bin",
    }
    first = Settings.from_environment(environ)
    environment, origins = handed_over(environ, first)
    file.unlink()
    second = Settings.from_environment(environment, origins)
    assert second.key is not None
    assert bytes.fromhex(second.key.reveal_text()) == bytes(range(32))
    assert first.key is not None
    assert second.key.origin == first.key.origin
    assert second.s3 == first.s3
    assert second.secret_flags == first.secret_flags
    assert second.flags == first.flags
    assert second.environment == first.environment


def test_what_is_shown_holds_no_secret() -> None:
    """`plan` may be pasted into a ticket."""
    settings = Settings.from_environment(
        {
            "TENSORSERVE_MODEL_URI": "https://user:canary@host/m?X-Amz-Signature=canary",
            "TENSORSERVE_KEY": KEY,
        }
    )
    shown = str(settings.shown())
    assert "canary" not in shown
    assert KEY not in shown
    assert KEY not in repr(settings)


def test_every_variable_is_documented() -> None:
    """docs/configuration.md is made from the settings; it must not fall behind."""
    text = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    for variable in VARIABLES:
        assert f"`{variable.name}`" in text
        assert variable.meaning in text


def test_variables_that_kubernetes_sets_for_a_service_are_one_mistake() -> None:
    """A Service called tensorserve puts eight of our names into each pod."""
    linked = {
        "TENSORSERVE_SERVICE_HOST": "10.0.0.7",
        "TENSORSERVE_SERVICE_PORT": "8000",
        "TENSORSERVE_SERVICE_PORT_API": "8000",
        "TENSORSERVE_PORT": "tcp://10.0.0.7:8000",
        "TENSORSERVE_PORT_8000_TCP": "tcp://10.0.0.7:8000",
        "TENSORSERVE_PORT_8000_TCP_PROTO": "tcp",
        "TENSORSERVE_PORT_8000_TCP_PORT": "8000",
        "TENSORSERVE_PORT_8000_TCP_ADDR": "10.0.0.7",
    }
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **linked})
    (problem,) = caught.value.problems
    assert "and 7 more" in problem
    assert "enableServiceLinks: false" in problem
