"""Fixtures and markers of all tests."""

from pathlib import Path

import pytest
import torch

from tests.helpers import write_image_folder


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """16 training and 7 validation images of 2 classes; 7 divides by neither 2 nor 3 processes."""
    return write_image_folder(tmp_path_factory.mktemp("imagenet"), train=16, val=7)
