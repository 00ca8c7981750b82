"""Settings: what the environment may say, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.config.settings import Settings, SourceSettings, metrics_address
from tensorserve.config.value_parsers import parse_size
from tensorserve.config.variables import VARIABLES
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret

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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ALLOWED_HOSTS", "a, http://metadata.example", "not the name or address of a host"),
        ("ALLOWED_HOSTS", "169.254.169.254:80", "not the name or address of a host"),
        ("PASS_ENV", "A, B=1", "'B=1' is not the name of a variable"),
        ("PASS_ENV", "$HOME", "is not the name of a variable"),
        ("PASS_ENV", "TENSORSERVE_KEY", "tensorserve's own"),
    ],
)
def test_lists_of_names_have_names_alone(name: str, value: str, said: str) -> None:
    """What could never match is a mistake; a key never goes to vLLM."""
    assert said in only_problem(URI | {f"TENSORSERVE_{name}": value})


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
    assert len(settings.key.reveal()) == 32
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
    assert settings.key == Secret(text)


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
    assert "TENSORSERVE_KEY_FILE=/nonexistent/key cannot be read: No such file" in message


def test_key_and_passphrase_exclude_each_other() -> None:
    """A file is sealed with one of them."""
    assert "Both a key and a passphrase" in only_problem(
        URI | {"TENSORSERVE_KEY": KEY, "TENSORSERVE_PASSPHRASE": "x"}
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TENSORSERVE_MODEL_URI", "gcs://bucket/model", "the scheme 'gcs' is not supported"),
        ("TENSORSERVE_MODEL_URI", "s3:///model", "no bucket"),
        ("TENSORSERVE_MODEL_URI", "s3://b uck/model", "s3://b uck: that is not the name"),
        ("TENSORSERVE_MODEL_URI", " ", "is empty"),
        ("TENSORSERVE_PORT", "0", "is not a port"),
        ("TENSORSERVE_FETCH_CONNECTIONS", "0", "from 1 to 512"),
        ("TENSORSERVE_HOST_MEMORY_LIMIT", "1 apple", "is not a size"),
        ("TENSORSERVE_HOST_MEMORY_LIMIT", "1MiB", "too little"),
        ("TENSORSERVE_HOST_MEMORY_LIMIT", "11000000000.5GiB", "1 EB or more"),
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
    words = list(settings.flags.words())
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
def test_the_api_key_becomes_no_argument_and_no_childs_variable(name: str) -> None:
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
    assert dict(settings.shown())["TENSORSERVE_FETCH_DEADLINE"] == "300"


def test_every_variable_is_documented() -> None:
    """docs/configuration.md is made from the settings; it must not fall behind."""
    text = (Path(__file__).parents[3] / "docs/configuration.md").read_text()
    for variable in VARIABLES:
        assert f"`{variable.name}`" in text
        assert variable.meaning in text


def test_kubernetes_service_variables_are_one_mistake() -> None:
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


# What slips in around values ---------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\u00a0"])
def test_white_space_around_values_is_none_of_them(end: str) -> None:
    """As the line's end of a _FILE form."""
    settings = Settings.from_environment(
        {
            name: f"{text}{end}"
            for name, text in {
                "TENSORSERVE_MODEL_URI": "s3://bucket/m",
                "TENSORSERVE_KEY": KEY,
                "TENSORSERVE_PORT": "8001",
                "TENSORSERVE_FETCH_DEADLINE": "8.5",
                "TENSORSERVE_VERIFY": "hashes",
                "TENSORSERVE_VLLM_DTYPE": "float16",
                "TENSORSERVE_VLLM_MAX_NUM_SEQS": "4",
                "TENSORSERVE_VLLM_API_KEY": "api",
                "AWS_ACCESS_KEY_ID": "id",
                "AWS_SECRET_ACCESS_KEY": "secret/+",
                "AWS_SESSION_TOKEN": "token==",
                "AWS_REGION": "eu-central-1",
                "AWS_ENDPOINT_URL_S3": "HTTP://127.0.0.1:9000",
            }.items()
        }
    )
    assert settings.model_uri == "s3://bucket/m"
    assert settings.key == Secret(bytes.fromhex(KEY))
    assert (settings.port, settings.fetch_deadline, settings.verify) == (8001, 8.5, "hashes")
    assert settings.flags.value("dtype") == "float16"
    assert settings.flags.value("max-num-seqs") == "4"
    assert dict(settings.secret_flags) == {"api-key": Secret("api")}
    s3 = settings.s3
    assert (s3.access_key_id, s3.secret_access_key) == (Secret("id"), Secret("secret/+"))
    assert (s3.session_token, s3.region) == (Secret("token=="), "eu-central-1")
    assert s3.endpoint_url == "http://127.0.0.1:9000"
    assert dict(settings.environment)["AWS_REGION"] == "eu-central-1"


@pytest.mark.parametrize("content", [b"id\n", b"\xef\xbb\xbfid\r\n", b" id "])
def test_a_secrets_file_is_stripped_as_its_variable_is(tmp_path: Path, content: bytes) -> None:
    """Editors leave more than line ends."""
    (tmp_path / "id").write_bytes(content)
    environ = {"AWS_ACCESS_KEY_ID_FILE": str(tmp_path / "id"), "AWS_SECRET_ACCESS_KEY": "s"}
    assert Settings.from_environment(URI | environ).s3.access_key_id == Secret("id")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ACCESS_KEY_ID", "can\nary"),
        ("AWS_SECRET_ACCESS_KEY", "can\r\nary"),
        ("AWS_SECRET_ACCESS_KEY", "can ary"),
        ("AWS_SESSION_TOKEN", "can\x00ary"),
        ("AWS_SESSION_TOKEN", "canäry"),
        ("AWS_REGION", "eu\ncentral-1"),
        ("AWS_REGION", "x/y@host"),
        ("AWS_DEFAULT_REGION", "eu central"),
        ("AWS_PROFILE", "a\nb"),
        ("AWS_ENDPOINT_URL_S3", "http://ho st"),
        ("AWS_ENDPOINT_URL", "http://a\nb"),
        ("TENSORSERVE_MODEL_URI", "s3://bucket/a\nb"),
        ("TENSORSERVE_KEY_FILE", "/run/a\nb"),
        ("TENSORSERVE_VLLM_API_KEY", "can\nary"),
        ("TENSORSERVE_VLLM_CHAT_TEMPLATE", "a\x1b[2Jb"),
        ("TENSORSERVE_VLLM_DTYPE", "float\n16"),
    ],
)
def test_what_no_value_can_hold_is_refused_by_name(name: str, value: str) -> None:
    """Inside, white space is no slip; libraries would say it with the credentials beside it."""
    pair = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}
    messages = [m for m in problems(URI | pair | {name: value}) if name in m]
    assert len(messages) == 1
    assert "can" not in messages[0].replace("cannot", "").replace("character", "")


def test_json_may_have_line_breaks() -> None:
    """A block of YAML has them."""
    text = '{\n "a":\t1\n}\n'
    settings = Settings.from_environment(URI | {"TENSORSERVE_VLLM_HF_OVERRIDES": text})
    assert settings.flags.value("hf-overrides") == '{\n "a":\t1\n}'


def test_empty_values_are_as_if_unset(tmp_path: Path) -> None:
    """Compose passes them so; where a file is named, it counts."""
    (tmp_path / "key").write_text(KEY)
    empty = [variable.name for variable in VARIABLES if variable.name not in URI]
    empty += ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"]
    empty += ["S3_ACCESS_KEY_ID", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_CA_BUNDLE"]
    empty += ["TENSORSERVE_VLLM_DTYPE", "TENSORSERVE_VLLM_ENFORCE_EAGER", "AWS_PROFILE"]
    files = {"TENSORSERVE_KEY_FILE": str(tmp_path / "key")}
    settings = Settings.from_environment(URI | dict.fromkeys(empty, "") | files)
    assert settings == Settings.from_environment(URI | files)
    assert settings.key is not None
    assert "AWS_PROFILE" not in dict(settings.environment)


def test_an_empty_model_uri_is_said_as_such() -> None:
    """`docker run -e TENSORSERVE_MODEL_URI=$NO_SUCH`."""
    assert "is not set (it is empty)" in only_problem({"TENSORSERVE_MODEL_URI": " "})


def test_an_empty_variable_that_is_none_is_still_a_mistake() -> None:
    """Otherwise it would be found when it gets a value."""
    assert "TENSORSERVE_KEI is not a variable" in only_problem(URI | {"TENSORSERVE_KEI": ""})


@pytest.mark.parametrize(
    "name", ["TENSORSERVE_KEY", "TENSORSERVE_KEY_FILE", "TENSORSERVE_VLLM_API_KEY"]
)
def test_an_empty_guard_is_said_aloud(name: str) -> None:
    """As if unset, but perhaps a secret did not arrive."""
    (warning,) = Settings.from_environment(URI | {name: ""}).warnings
    assert warning.startswith(f"{name} is set to nothing")
    assert Settings.from_environment(URI | {name: "", "VLLM_API_KEY": "k"}).warnings == (
        () if "API" in name else (warning,)
    )


@pytest.mark.parametrize("value", ["1_000", "\uff11\uff10", "1e2", "+5", "0x10", "1,5", "-3"])
@pytest.mark.parametrize(
    "name", ["FETCH_CONNECTIONS", "FETCH_DEADLINE", "PORT", "FAILURE_LINGER", "START_DEADLINE"]
)
def test_numbers_are_plain_digits(name: str, value: str) -> None:
    """For all of our variables alike; Python would take some of these."""
    assert f"TENSORSERVE_{name}=" in only_problem(URI | {f"TENSORSERVE_{name}": value})


@pytest.mark.parametrize("value", ["+2", "2 ", "0_2", "\uff12"])
def test_whole_numbers_for_vllm_become_plain_digits(value: str) -> None:
    """vLLM reads them as Python does; what else reads its arguments need not."""
    settings = Settings.from_environment(URI | {"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": value})
    assert settings.flags.words() == ("--tensor-parallel-size=2",)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("https://huggingface.co/org/model", "`tensorserve pack org/model DEST`"),
        ("HuggingFace://org/model", "Use hf://organisation/model"),
        ("gcs://bucket/m", "Use gs://bucket/prefix"),
        ("abfss://container@account.dfs.core.windows.net/m", "Use az://container/prefix"),
        ("gs://Bucket/m", "Use gs://bucket/prefix"),
        ("az://container@account/m", "AZURE_STORAGE_ACCOUNT"),
        ("hf://org", "Use hf://organisation/model"),
        ("s3a://bucket/m", "Use s3://bucket/prefix"),
        ("ftp://host/m", "file://, http://"),
        ("s3:/bucket/m", "Write s3://bucket/prefix"),
        ("s3:bucket", "Write s3://bucket/prefix"),
        ("https:/host/m", "http://host/path"),
        ("no-such-organisation/model", "pack no-such-organisation/model DEST"),
    ],
)
def test_a_model_elsewhere_gets_the_way_from_there(value: str, hint: str) -> None:
    """Not only that its scheme is not supported."""
    assert hint in only_problem({"TENSORSERVE_MODEL_URI": value})


@pytest.mark.parametrize("scheme", ["S3", "HTTP", "Https", "File"])
def test_schemes_are_not_case_sensitive(scheme: str) -> None:
    """RFC 3986, 3.1."""
    place = "/m" if scheme == "File" else "host/m"
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": f"{scheme}://{place}"})
    assert settings.model_uri == f"{scheme.lower()}://{place}"


def test_a_relative_path_is_one_for_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a start stand in the state directory."""
    monkeypatch.chdir(tmp_path)
    for text in ("b", "./b", "b//"):
        settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": text})
        assert settings.model_uri == str(tmp_path / "b")


def test_a_command_with_its_own_uri_reads_what_it_needs(tmp_path: Path) -> None:
    """A mistake in what serves alone is none of its; a misspelt name is one everywhere."""
    (tmp_path / "key").write_text(KEY)
    environ = {
        "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
        "TENSORSERVE_VERIFY": "hashes",
        "TENSORSERVE_S3_UNSIGNED": "true",
        "AWS_REGION": "eu-central-1",
        "TENSORSERVE_PORT": "none",
        "TENSORSERVE_VLLM_NO_SUCH": "1",
    }
    read = SourceSettings.from_environment(environ)
    assert (read.key, read.verify) == (Secret(bytes.fromhex(KEY)), "hashes")
    assert (read.s3.unsigned, read.s3.region) == (True, "eu-central-1")
    with pytest.raises(ConfigurationError, match="TENSORSERVE_KYE is not a variable"):
        SourceSettings.from_environment({"TENSORSERVE_KYE": KEY})
    with pytest.raises(ConfigurationError, match="is not a 32-byte key"):
        SourceSettings.from_environment({"TENSORSERVE_KEY": "abc"})
    with pytest.raises(ConfigurationError, match="Both a key and a passphrase"):
        SourceSettings.from_environment({"TENSORSERVE_KEY": KEY, "TENSORSERVE_PASSPHRASE": "p"})


def test_a_health_check_needs_the_metrics_address_alone() -> None:
    """It is asked in the same container, whatever else is set there."""
    assert metrics_address({}) == ("0.0.0.0", 9400)
    environ = {"TENSORSERVE_METRICS_HOST": "[::1]", "TENSORSERVE_METRICS_PORT": "1"}
    assert metrics_address({**environ, "TENSORSERVE_PORT": "x"}) == ("::1", 1)
    with pytest.raises(ConfigurationError, match="TENSORSERVE_METRICS_PORT"):
        metrics_address({"TENSORSERVE_METRICS_PORT": "x"})


@pytest.mark.parametrize(
    ("given", "fetch", "start_seconds", "fetch_seconds"),
    [
        (None, None, 1800, 300),
        (None, "3600", 7200, 3600),
        ("0", "3600", 0, 3600),
        ("600.5", None, 600.5, 300),
        ("301", "300", 301, 300),
        ("120", None, 120, 60),
    ],
)
def test_a_start_waits_longer_than_for_its_source(
    given: str | None, fetch: str | None, start_seconds: float, fetch_seconds: float
) -> None:
    """By default, however long a source may be away; the one that is not given follows."""
    names = {"TENSORSERVE_START_DEADLINE": given, "TENSORSERVE_FETCH_DEADLINE": fetch}
    environ = URI | {name: text for name, text in names.items() if text is not None}
    settings = Settings.from_environment(environ)
    assert (settings.start_deadline, settings.fetch_deadline) == (start_seconds, fetch_seconds)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("200", "START_DEADLINE=200 is not more than TENSORSERVE_FETCH_DEADLINE=200"),
        ("0.5", "START_DEADLINE='0.5' is neither 0 nor a number of seconds from 1 to 86400"),
        ("86401", "START_DEADLINE='86401' is neither 0"),
        ("30m", "START_DEADLINE='30m' is neither 0"),
    ],
)
def test_a_start_deadline_that_cannot_be(given: str, said: str) -> None:
    """A source that is away for a while must not end a start."""
    deadlines = {"TENSORSERVE_START_DEADLINE": given, "TENSORSERVE_FETCH_DEADLINE": "200"}
    assert said in only_problem(URI | deadlines)


class TestCompiledCode:
    """Keys of compiled code in the bundle."""

    def test_its_key_is_32_bytes(self, tmp_path: Path) -> None:
        """As the model's: hex, base64, or raw in a file."""
        (tmp_path / "raw").write_bytes(bytes(range(10, 42)))
        for given, key in (
            ({"TENSORSERVE_COMPILED_KEY": KEY}, bytes.fromhex(KEY)),
            ({"TENSORSERVE_COMPILED_KEY_FILE": str(tmp_path / "raw")}, bytes(range(10, 42))),
        ):
            found = Settings.from_environment(URI | given).compiled_key
            assert found is not None
            assert found.reveal() == key
        assert "is not a 32-byte key" in only_problem(URI | {"TENSORSERVE_COMPILED_KEY": "abc"})
        text = "x" * 32
        assert "TENSORSERVE_COMPILED_KEY_FILE" in only_problem(
            URI | {"TENSORSERVE_COMPILED_KEY": text}
        )

    def test_its_signature_key_is_checked_at_once(self, tmp_path: Path) -> None:
        """Not when the first signed file is read."""
        (tmp_path / "bad").write_text("no key")
        given = {"TENSORSERVE_COMPILED_SIGNATURE_KEY_FILE": str(tmp_path / "bad")}
        assert "not an Ed25519 public key" in only_problem(URI | given)

    def test_what_is_wished(self) -> None:
        """`precompile` has a value of its own, which is nobody else's: it is not named."""
        assert Settings.from_environment(URI).compiled == "auto"
        said = only_problem(URI | {"TENSORSERVE_COMPILED": "always"})
        assert "not one of auto, off, required" in said
