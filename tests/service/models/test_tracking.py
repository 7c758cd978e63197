import pytest

from corun_ray.service.models.tracking import TrackingError, connect_to_mlflow


def test_credentials_in_an_address_are_refused_and_not_repeated():
    with pytest.raises(TrackingError) as caught:
        connect_to_mlflow("https://me:word@mlflow:5000")
    assert "https://***@mlflow:5000 holds credentials" in str(caught.value) and "word@" not in str(caught.value)
    assert "MLFLOW_TRACKING_TOKEN" in str(caught.value)
