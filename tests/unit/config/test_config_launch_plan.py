"""The plan: settings and arguments → what will be started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorserve.bundle.location import served_name_of, split_model_uri
from tensorserve.bundle.manifest import SHARDS
from tensorserve.config.launch_plan import describe, make_plan, wants_adapters, with_adapters
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError

URI = {"TENSORSERVE_MODEL_URI": "s3://bucket/vllm/model/v1", "TENSORSERVE_STATE_DIR": "/run/ts"}


def plan_of(environ: dict[str, str] | None = None, *arguments: str):
    return make_plan(Settings.from_environment(URI | (environ or {})), arguments)


def test_the_plan_is_a_plain_vllm_serve() -> None:
    """The command that a user could have typed, with our load format."""
    plan = plan_of({"TENSORSERVE_VLLM_MAX_MODEL_LEN": "512"})
    assert plan.argv[:4] == ("vllm", "serve", "/run/ts/model", "--load-format=tensorizer")
    assert "--served-model-name=model/v1" in plan.argv
    assert "--port=8000" in plan.argv
    assert "--max-model-len=512" in plan.argv
    assert plan.health_url == "http://127.0.0.1:8000/health"


def test_caches_are_below_the_root_that_is_named() -> None:
    """But for those with a variable of the user's; without a root each library has its own."""
    given = {"XDG_CACHE_HOME": "/c", "TRITON_CACHE_DIR": "/t"}
    environment = dict(plan_of(given).environment)
    assert environment["VLLM_CACHE_ROOT"] == "/c/vllm"
    assert environment["TRITON_CACHE_DIR"] == "/t"
    assert "VLLM_CACHE_ROOT" not in dict(plan_of().environment)


def test_arguments_win_over_variables() -> None:
    """What stands on the command line is the more specific wish."""
    plan = plan_of(
        {"TENSORSERVE_VLLM_MAX_MODEL_LEN": "512"}, "--max-model-len", "1024", "--port=9001"
    )
    assert "--max-model-len=512" not in plan.argv
    assert plan.argv[-2:] == ("--max-model-len=1024", "--port=9001")
    assert plan.port == 9001
    assert plan.health_url.endswith(":9001/health")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--load-format", "auto"), "--load-format cannot be given"),
        (("--load_format=auto",), "cannot be given"),
        (("some-model",), "TENSORSERVE_MODEL_URI"),
        (("--model", "x"), "TENSORSERVE_MODEL_URI"),
        (("--model-loader-extra-config.a", "1"), "cannot be given"),
        (("--max-model-lenght", "1"), "Did you mean --max-model-len"),
        (("--port", "x"), "not a port"),
        (("--port",), "--port takes a value"),
        (("--trust-remote-code=true",), "--trust-remote-code takes no value"),
        (("--speculative-config.model",), "takes a value"),
        (("--tensor-p", "2", "--data-p", "2"), "--data-p may be --data-parallel-address"),
        (("--shutdown-timeout", "soon"), "not a whole number of seconds"),
        (("--shutdown-timeout=-1",), "not a whole number of seconds"),
    ],
)
def test_arguments_that_conflict_or_are_unknown_are_refused(
    arguments: tuple[str, ...], said: str
) -> None:
    """Before anything is started."""
    with pytest.raises(ConfigurationError) as caught:
        plan_of({}, *arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("form", [("--api-key", "canary"), ("--api-key=canary",)])
def test_an_api_key_among_the_arguments_leaves_the_argument_list(form: tuple[str, ...]) -> None:
    """vLLM's own process list would show it."""
    plan = plan_of({}, *form, "--enforce-eager")
    assert "canary" not in " ".join(plan.argv)
    assert [secret.reveal() for _, secret in plan.secret_flags] == [b"canary"]
    assert plan.argv[-2] == "--enforce-eager"


def test_api_keys_among_the_arguments_count_as_in_vllm() -> None:
    """All of the last --api-key, in the place of the variable's."""
    environ = {"TENSORSERVE_VLLM_API_KEY": "other", "TENSORSERVE_VLLM_HF_TOKEN": "token"}
    plan = plan_of(environ, "--api-key", "none", "--api_key", "a", "b")
    found = [(name, secret.reveal_text()) for name, secret in plan.secret_flags]
    assert found == [("hf-token", "token"), ("api-key", "a"), ("api-key", "b")]


def test_short_flags_and_negative_numbers_are_understood() -> None:
    """-tp is vLLM's own short form; -1 is a value."""
    plan = plan_of({}, "-tp", "2", "--max-logprobs", "-1")
    assert plan.tensor_parallel_size == 2
    assert plan.argv[-1] == "--max-logprobs=-1"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/vllm/model/v1", "model/v1"),
        ("s3://bucket/models/my-model", "my-model"),
        ("/models/my-model/model.tensors", "my-model"),
        ("/models/my-model", "my-model"),
        ("https://host/a/vllm/org/model/v2?sig=secret", "org/model/v2"),
        ("s3://bucket", "bucket"),
        ("weights.tensors", "weights"),
        ("https://user:PW@host", "host"),
        ("https://user:PW@host:8443/", "host"),
        ("https://PW@host/?sig=PW", "host"),
        ("https://user:PW@host/org/model", "model"),
        ("https://user:1/PW@host", "host"),
        ("https://user:1/PW/vllm/PW@host/m", "m"),
        ("gs://bucket/vllm/model/v1", "model/v1"),
        ("az://container/my-model", "my-model"),
        ("hf://org/my-model@main", "my-model"),
        ("hf://org/my-model/v1/model.tensors", "v1"),
    ],
)
def test_the_served_name_comes_from_the_uri(uri: str, name: str) -> None:
    """A readable name without configuration."""
    assert served_name_of(uri) == name


@pytest.mark.parametrize(
    ("uri", "directory", "names"),
    [
        ("s3://b/m", "s3://b/m", ("model.tensors", "model-rank-%03d.tensors")),
        ("s3://b/m/x.tensors", "s3://b/m", ("x.tensors",)),
        ("/m/x.tensors", "/m", ("x.tensors",)),
        ("https://h/m/x.tensors?sig=1", "https://h/m?sig=1", ("x.tensors",)),
        ("s3://b/m/r-%03d.tensors", "s3://b/m", ("r-%03d.tensors",)),
        ("https://h/m/r-%03d.tensors", "https://h/m", ("r-%03d.tensors",)),
        ("https://h/a%20b/x%20%23%25%3F-%03d.tensors", "https://h/a%20b", ("x #%?-%03d.tensors",)),
        ("file:///a%20b/x%20y.tensors", "file:///a%20b", ("x y.tensors",)),
        ("file:///a?b#c/x.tensors", "file:///a?b#c", ("x.tensors",)),
        ("s3://b/m?#%20/x%20y.tensors", "s3://b/m?#%20", ("x%20y.tensors",)),
        ("/x.tensors", "/", ("x.tensors",)),
        ("x.tensors", ".", ("x.tensors",)),
        ("https://u:p@h.tensors", "https://u:p@h.tensors", ("model.tensors", SHARDS)),
        ("s3://b.tensors", "s3://b.tensors", ("model.tensors", SHARDS)),
        ("https://h/x.tensors#f", "https://h", ("x.tensors",)),
        ("file:///x.tensors", "file://", ("x.tensors",)),
        ("s3://b/x.tensors", "s3://b", ("x.tensors",)),
        ("gs://bucket/x.tensors", "gs://bucket", ("x.tensors",)),
        ("hf://o/x.tensors", "hf://o/x.tensors", ("model.tensors", SHARDS)),
        ("hf://o/m@r/x.tensors", "hf://o/m@r", ("x.tensors",)),
    ],
)
def test_a_uri_names_a_bundle_or_one_file_of_it(
    uri: str, directory: str, names: tuple[str, ...]
) -> None:
    """Both forms lead to the same bundle."""
    assert split_model_uri(uri) == (directory, names)


@pytest.mark.parametrize(
    "uri", ["s3://b/%03d%03d.tensors", "https://h/a%03d-%02d.tensors", "https://h/a%2Fb.tensors"]
)
def test_a_name_that_names_no_file_is_refused(uri: str) -> None:
    """Two ranks in one name, or a slash within one."""
    with pytest.raises(ConfigurationError):
        split_model_uri(uri)


def test_shards_are_one_file_a_rank() -> None:
    """As vLLM's page writes them."""
    plan = plan_of({"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "2"})
    assert plan.shards("model-rank-%03d.tensors") == (
        "model-rank-000.tensors",
        "model-rank-001.tensors",
    )
    assert plan.shards("model.tensors") == ("model.tensors",)


@pytest.mark.parametrize(
    ("environ", "arguments", "engine"),
    [
        ({}, (), {"pipeline_parallel_size": 1, "expert_parallel": False}),
        (
            {"TENSORSERVE_VLLM_DTYPE": "auto"},
            ("-pp", "2", "-ep"),
            {"pipeline_parallel_size": 2, "expert_parallel": True},
        ),
        (
            {"TENSORSERVE_VLLM_DTYPE": "half", "TENSORSERVE_VLLM_ENABLE_EXPERT_PARALLEL": "true"},
            (),
            {"pipeline_parallel_size": 1, "expert_parallel": True, "dtype": "float16"},
        ),
        (
            {"TENSORSERVE_VLLM_DTYPE": "half"},
            ("--dtype=bfloat16",),
            {"pipeline_parallel_size": 1, "expert_parallel": False, "dtype": "bfloat16"},
        ),
    ],
)
def test_what_the_flags_say_of_the_engine(
    environ: dict[str, str], arguments: tuple[str, ...], engine: dict[str, object]
) -> None:
    """In the words of a bundle's fingerprint; what vLLM decides is not in it."""
    assert dict(plan_of(environ, *arguments).engine) == engine


def test_the_description_holds_no_secret() -> None:
    """It is printed, and pasted into tickets."""
    environ = URI | {
        "TENSORSERVE_MODEL_URI": "https://host/m?X-Amz-Signature=canary",
        "TENSORSERVE_VLLM_API_KEY": "canary",
        "TENSORSERVE_PASSPHRASE": "canary",
        "AWS_ACCESS_KEY_ID": "canary",
        "AWS_SECRET_ACCESS_KEY": "canary",
    }
    settings = Settings.from_environment(environ)
    assert "canary" not in json.dumps(describe(make_plan(settings), settings))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("COLLECTOR_LOGIN", False),  # nobody knows what it is
        ("VLLM_S3_SECRET", False),
        ("HF_ACCESS_KEY", False),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", True),
        ("TOKENIZERS_PARALLELISM", True),
    ],
)
def test_a_variable_that_may_be_a_secret_is_not_shown(name: str, shown: bool) -> None:
    """Its name is: one sees that it is handed on."""
    environ = URI | {name: "canary", "TENSORSERVE_PASS_ENV": "COLLECTOR_LOGIN"}
    settings = Settings.from_environment(environ)
    plan = make_plan(settings)
    assert dict(plan.environment)[name] == "canary"
    found = describe(plan, settings)["environment"]
    assert isinstance(found, dict)
    assert found[name] == ("canary" if shown else "***")


@pytest.mark.parametrize("proxy", ["http://user:canary@proxy:1", "user:canary@proxy:1"])
def test_a_proxy_is_shown_without_its_password(proxy: str) -> None:
    """With a scheme and without."""
    settings = Settings.from_environment(URI | {"HTTPS_PROXY": proxy})
    plan = make_plan(settings)
    assert dict(plan.environment)["HTTPS_PROXY"] == proxy
    found = json.dumps(describe(plan, settings))
    assert "canary" not in found
    assert "proxy:1" in found


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:canary@host/vllm/m",
        "https://canary@host",
        "https://user:1/canary@host",
        "https://user:canary@host/m.tensors?sig=canary#canary",
        "HTTPS://user:canary@host/m",
    ],
)
def test_no_credential_of_a_uri_is_in_the_plan(uri: str) -> None:
    """Neither in what is printed, nor in vLLM's arguments, nor in its environment."""
    environ = {
        "TENSORSERVE_MODEL_URI": uri,
        "TENSORSERVE_VLLM_OTLP_TRACES_ENDPOINT": "http://u:canary@collector:4317",
        "TENSORSERVE_PASS_ENV": "HTTPS_PROXY",
        "HTTPS_PROXY": "http://u:canary@proxy:3128",
    }
    settings = Settings.from_environment(environ)
    plan = make_plan(settings)
    assert "canary" not in json.dumps(describe(plan, settings))
    # What the user hands to vLLM by name is the user's; the rest is ours.
    ours = [word for word in plan.argv if "collector" not in word]
    assert "canary" not in " ".join(ours)


def test_adapters_are_handed_to_vllm() -> None:
    """Named, with the rank that they need."""
    plan = with_adapters(plan_of(), [("sql", Path("/m/sql"), 8), ("tone", Path("/m/tone"), 24)])
    assert "--enable-lora" in plan.argv
    assert "--max-lora-rank=32" in plan.argv
    at = plan.argv.index("--lora-modules")
    modules = [json.loads(word) for word in plan.argv[at + 1 : at + 3]]
    assert [(m["name"], m["path"]) for m in modules] == [("sql", "/m/sql"), ("tone", "/m/tone")]
    assert with_adapters(plan_of(), []) == plan_of()


def test_a_users_own_adapter_flags_win() -> None:
    """Their rank, their modules beside ours, and none at all where they say so."""
    own = plan_of({}, "--enable-lora", "--max_lora_rank", "64", "--lora-modules", "own=/own")
    plan = with_adapters(own, [("sql", Path("/m/sql"), 24)])
    assert plan.argv.count("--enable-lora") == 1
    ranks = [word for word in plan.argv if word.startswith("--max-lora-rank")]
    assert ranks == ["--max-lora-rank=64"]
    at = plan.argv.index("--lora-modules")
    assert json.loads(plan.argv[at + 1])["name"] == "sql"
    assert plan.argv[at + 2] == "own=/own"
    assert plan.argv.count("--lora-modules") == 1
    assert wants_adapters(own)
    assert not wants_adapters(plan_of({"TENSORSERVE_VLLM_ENABLE_LORA": "false"}))
    with pytest.raises(ConfigurationError, match="rank 1000"):
        with_adapters(plan_of(), [("sql", Path("/m/sql"), 1000)])


@pytest.mark.parametrize(
    "words",
    [
        ("--api-key",),
        ("--api_key",),
        ("--api-k",),
        ("--api-key", "--port", "8000"),
        ("--api-key", "a", "--api-key"),
        ("--api-key.x=y",),
        ("--served-model-name",),
    ],
)
def test_a_list_without_a_value_is_refused(words: tuple[str, ...]) -> None:
    """An empty variable of a shell must not take the key away that another one has set."""
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_API_KEY": "s3cret"}
    with pytest.raises(ConfigurationError, match=r"takes a value|has no keys"):
        make_plan(Settings.from_environment(environ), words)


def test_a_token_flag_alone_leaves_the_variable() -> None:
    """vLLM takes --hf-token without a value, too."""
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_HF_TOKEN": "hf_x"}
    plan = make_plan(Settings.from_environment(environ), ("--hf-token",))
    assert [(name, secret.reveal_text()) for name, secret in plan.secret_flags] == [
        ("hf-token", "hf_x")
    ]
