import pytest

from corun_ray.config.loading import JobFileError, build_job
from corun_ray.config.s3_uri import parse_s3_uri


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("s3://haze", "haze"),
        ("s3://haze/", "haze"),
        ("s3://haze/a/b/", "haze/a/b"),
        ("s3://haze/my photos/Dörfer#2", "haze/my photos/Dörfer#2"),
        ("s3://haze/my%20photos/50%25/what%3F.png", "haze/my photos/50%/what?.png"),
        ("s3://haze/..a/b..", "haze/..a/b.."),
    ],
)
def test_a_key_is_what_it_says(uri, path):
    assert parse_s3_uri(uri).path == path


def test_options_follow_a_question_mark():
    uri = parse_s3_uri("s3://haze/a?region=eu-west-1&endpoint_override=http://minio:9000")
    assert (uri.path, uri.bucket) == ("haze/a", "haze")
    assert uri.options == {"region": "eu-west-1", "endpoint_override": "http://minio:9000"}


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://haze//clear", r"empty part .*; did you mean s3://haze/clear\?"),
        ("s3://haze/./clear", r"with \. .*; did you mean s3://haze/clear\?"),
        ("s3://haze/a//./b/", r"did you mean s3://haze/a/b\?"),
        ("s3://haze/a/../b", r"or with \.\. cannot be read$"),
        ("s3:///clear", "'' is no name of a bucket"),
        ("s3://minio:9000/haze", "'minio:9000' is no name of a bucket"),
    ],
)
def test_what_would_name_another_key_is_refused_by_the_key_of_the_job(uri, reason):
    with pytest.raises(ValueError, match=reason):
        parse_s3_uri(uri)

    job = {"kind": "depth", "name": "d", "depth": {"input": uri, "output": "maps", "weights": "weights"}}
    with pytest.raises(JobFileError, match=f"^depth.input: {uri}: .*{reason}"):
        build_job(job)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://haze/what?.png", "unknown option .png .*%3F is a question mark"),
        ("s3://haze/a?allow_bucket_creation=true", "unknown option allow_bucket_creation"),
    ],
)
def test_an_unknown_option_is_refused(uri, reason):
    with pytest.raises(ValueError, match=reason):
        parse_s3_uri(uri)
