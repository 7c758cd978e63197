import re

from corun_ray.config.reference import format_reference
from corun_ray.service.environment import DROPPED, NAMED, drop_variables, name_variables


def test_what_would_take_a_job_over_is_dropped_with_a_line():
    environment = {"MLFLOW_RUN_ID": "abc", "WORLD_SIZE": "4", "RANK": "1", "RAY_TRAIN_V2_ENABLED": "0", "HOME": "/x"}
    lines = drop_variables("MLFLOW_", environment)
    assert len(lines) == 1 and "MLFLOW_RUN_ID=abc is ignored" in lines[0] and "WORLD_SIZE" in environment
    lines = drop_variables(environment=environment)
    assert environment == {"HOME": "/x"} and len(lines) == 2
    assert "RANK=1, WORLD_SIZE=4 is ignored" in lines[0] and "torchrun" in lines[0]


def test_what_changes_a_job_is_named_and_stays():
    environment = {"CUDA_VISIBLE_DEVICES": "1", "TORCH_COMPILE_DISABLE": "0", "RAY_TRAIN_V2_ENABLED": "1"}
    assert drop_variables(environment=environment) == []
    (line,) = name_variables(environment)
    assert line.startswith("environment: CUDA_VISIBLE_DEVICES=1: ") and len(environment) == 3


def test_another_store_of_artifacts_is_named_without_a_password():
    (line,) = name_variables({"MLFLOW_S3_ENDPOINT_URL": "http://ann:secret@minio:9000"})
    assert line.startswith("environment: MLFLOW_S3_ENDPOINT_URL=http://***@minio:9000: ")


def test_reasons_name_keys_that_exist():
    known = format_reference()
    for variables in (*DROPPED, *NAMED):
        for key in re.findall(r"\b(?:cluster|optim|tracking|train|tune)\.[a-z_]+", variables.reason):
            assert key in known, key
