"""Which texts hold credentials, and what is left of them."""

import pytest

from corun_ray.config.credentials import holds_credentials, mask_credentials


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("s3://AKIA:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("https://me:word@mlflow:5000/x", "https://***@mlflow:5000/x"),
        ("postgresql://me:word@db/mlflow", "postgresql://***@db/mlflow"),
        ("s3://bucket/a?region=x&secret_key=abc&scheme=http", "s3://bucket/a?region=x&secret_key=***&scheme=http"),
        ("https://h/a?X-Amz-Signature=abc", "https://h/a?X-Amz-Signature=***"),
        ("no s3://K:S@b here", "no s3://***@b here"),
    ],
)
def test_credentials_are_seen_and_taken_out(text: str, rest: str) -> None:
    assert holds_credentials(text) and mask_credentials(text) == rest
    assert not holds_credentials(rest.replace("=***", "="))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "s3://bucket/key",
            "http://mlflow:5000/a@b",
            "http://mlflow:5000",
            "models:/corun@champion",
            "/a:b@c/d",
            "runs",
        ),
        *("abfs://container@account.dfs.core.windows.net/a", "s3://b/a?endpoint_override=127.0.0.1:9000&scheme=http"),
    ],
)
def test_places_without_credentials_stay_as_they_are(text: str) -> None:
    assert not holds_credentials(text) and mask_credentials(text) == text
