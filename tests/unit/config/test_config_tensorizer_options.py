"""vLLM's own options for Tensorizer: each is mapped to a setting or refused, none is ignored."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from tensorserve.config.tensorizer_options import (
    DESERIALIZATION,
    OPTIONS,
    STREAM,
    environment_for,
)
from tensorserve.errors import ConfigurationError


def test_every_option_of_vllm_is_known() -> None:
    """A later vLLM's new option fails here, not silently at a user's."""
    from vllm.model_executor.model_loader.tensorizer import TensorizerConfig
    from vllm.model_executor.model_loader.tensorizer_loader import BLACKLISTED_TENSORIZER_ARGS

    fields = {f.name for f in dataclasses.fields(TensorizerConfig) if not f.name.startswith("_")}
    earlier = {"lora_dir"}  # of revisions before 0.32.0
    assert fields | BLACKLISTED_TENSORIZER_ARGS | earlier == set(OPTIONS)


def test_every_option_of_tensorizers_readers_is_known() -> None:
    """Honoured, or refused with its own reason."""
    from tensorizer import TensorDeserializer, stream_io

    stream = set(inspect.signature(stream_io.open_stream).parameters)
    assert set(STREAM) == stream - {"path_uri"}
    reader = set(inspect.signature(TensorDeserializer.__init__).parameters)
    assert set(DESERIALIZATION) == reader - {"self", "file_obj"}


def test_inner_options_win_and_words_for_true_are_taken() -> None:
    """As in vLLM; earlier revisions of its page wrote "True" and "False" in quotes."""
    assert environment_for(
        {
            "stream_kwargs": {"s3_endpoint": "http://inner", "force_http": "False"},
            "deserialization_kwargs": {"verify_hash": "True"},
            "tensorizer_config": {
                "tensorizer_dir": "/model",
                "num_readers": 3,
                "_is_sharded": False,
            },
            "s3_endpoint": "http://outer",
        }
    ) == {
        "TENSORSERVE_MODEL_URI": "/model",
        "TENSORSERVE_FETCH_CONNECTIONS": "3",
        "AWS_ENDPOINT_URL_S3": "http://inner",
        "TENSORSERVE_VERIFY": "hashes",
    }


def test_the_pages_options_mean_what_they_say() -> None:
    """All of them at once."""
    assert environment_for(
        {
            "tensorizer_uri": "s3://bucket/vllm/m/v1/model-rank-%03d.tensors",
            "tensorizer_dir": "/elsewhere",
            "encryption_keyfile": "/keys/model.key",
            "s3_endpoint": "http://127.0.0.1:8333",
            "s3_access_key_id": "id",
            "s3_secret_access_key": "secret",
            "verify_hash": True,
            "vllm_tensorized": True,
            "stream_kwargs": {"s3_region_name": "eu-1"},
            "deserialization_kwargs": {"num_readers": 2, "plaid_mode": True, "lazy_load": False},
            "serialization_kwargs": {},
            "tensorizer_config": {"tensorizer_dir": "/model"},
        }
    ) == {
        "TENSORSERVE_MODEL_URI": "s3://bucket/vllm/m/v1/model-rank-%03d.tensors",
        "TENSORSERVE_KEY_FILE": "/keys/model.key",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-1",
        "TENSORSERVE_VERIFY": "hashes",
        "TENSORSERVE_FETCH_CONNECTIONS": "2",
    }


def test_without_options_the_models_own_directory_is_meant() -> None:
    """`vllm serve DIR --load-format tensorizer`: vLLM itself adds where that is."""
    assert environment_for({"tensorizer_config": {"tensorizer_dir": "/model"}}) == {
        "TENSORSERVE_MODEL_URI": "/model"
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensoriser_uri": "/m"}, "Did you mean 'tensorizer_uri'"),
        ({"tensorizer_uri": 7}, "not a text"),
        ({"num_readers": "two"}, "not a number above 0"),
        ({"num_readers": True}, "not a number above 0"),
        ({"verify_hash": "yes"}, "not true or false"),
        ({"device": "cuda"}, "vLLM decides"),
        ({"serialization_kwargs": {"limit_cpu_concurrency": 2}}, "for writing"),
        ({"deserialization_kwargs": {"lazy_load": True}}, "needs all tensors"),
        ({"deserialization_kwargs": {"readers": 2}}, "no meaning here"),
        ({"deserialization_kwargs": 2}, "not an object"),
        ({"stream_kwargs": {"force_http": True}}, "AWS_ENDPOINT_URL_S3"),
        ({}, "names no tensorizer_uri"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, object], said: str) -> None:
    """With the reason, or the option that may have been meant."""
    with pytest.raises(ConfigurationError) as caught:
        environment_for(options)
    assert said in str(caught.value)
