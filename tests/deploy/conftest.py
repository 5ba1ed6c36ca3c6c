"""Fixtures of the tests of `deploy`."""

import pytest
from check_edits import SIZE
from deploy_networks import SmallDetector

from deploy import export_onnx


@pytest.fixture
def good(tmp_path):
    return export_onnx(SmallDetector(), tmp_path / "good.onnx", SIZE, "trt10").path
