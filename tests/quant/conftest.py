"""Every test of `quant` draws the same random numbers in every run and in every order."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)
