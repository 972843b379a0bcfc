"""What a training step moves and computes, counted by hand for a small model, and what a cluster then waits for."""

import csv

import pytest
import scaling
from torch import nn

from tests.helpers import ROOT, python

DIGITS = ROOT / "configs/strip_mlp_pico_digits.yaml"
T = "configs/smlp_tiny_alpha3_patch4_224_imagenet1k.yaml"


class Product(nn.Module):
    """One matrix product of 12 inputs and 5 outputs, and nothing else."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 5, bias=False)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_work_of_one_product():
    work = scaling.work(Product(), (2, 2))
    assert work.parameters == 60
    assert work.flops == 3 * 2 * 60
    # bfloat16, per image. Forward: 12 read, 5 written. As float32: 5 read, and 5 of 4 bytes written; the sum reads
    # them. Backward: the same conversion, and the gradient of the weight reads 12 and 5; the images need none.
    moved = 2 * (12 + 5) + (2 + 4) * 5 + 4 * 5 + (4 + 2) * 5 + 2 * (12 + 5)
    assert work.image_bytes == moved
    # The weight is read, and its gradient written; so is the sum, and its gradient made from it; AdamW passes over all.
    assert work.step_bytes == 2 * 60 + 2 * 60 + 4 + 2 * 4 + scaling.ADAMW_BYTES * 60
    assert work.operations == 6


def table(tmp_path, *options):
    result = python("tools/scaling.py", "--csv", tmp_path / "table.csv", *options)
    with (tmp_path / "table.csv").open() as file:
        return list(csv.DictReader(file)), result.stdout


def test_table(tmp_path):
    rows, printed = table(tmp_path, "--cfg", T, "--efficiency", "0.5", "--gpus", "1", "8", "512")
    assert "share of the peaks that is assumed: 0.50" in printed
    assert "24,903,920" in printed
    assert "21.9" in printed  # GFLOP per image: 6 times the 3.648 GMACs
    one, node, many = rows[:3]
    assert [row["data set"] for row in rows] == ["ImageNet-1K"] * 3 + ["ImageNet-21K"] * 3
    assert [row["images per GPU"] for row in rows[:3]] == ["128", "128", "8"]
    assert (one["bottleneck"], one["all-reduce, ms"]) == ("GPU", "0.0")
    rate = int(one["GPUs, images/s"])
    assert rate == pytest.approx(128_000 / float(one["kernels, ms"]), rel=0.01)
    assert float(one["hours"]) == pytest.approx(1_281_167 * 300 / rate / 3600, abs=0.02)
    assert int(node["GPUs, images/s"]) == pytest.approx(8 * rate, rel=0.001)
    # 2 (n - 1) / n of 24,903,920 float32 gradients
    assert float(many["all-reduce, ms"]) == pytest.approx(2 * 511 / 512 * 24_903_920 * 4 / 368e6, abs=0.06)
    assert many["bottleneck"] == "file system"


@pytest.mark.parametrize(
    ("options", "bottleneck"),
    [
        (["--gpus", "8", "--cores", "16"], "decoding"),
        (["--gpus", "64", "--network", "1"], "all-reduce"),
        (["--gpus", "512", "--file-system", "1000"], "launches"),
        (["--gpus", "8", "--file-system", "0.1"], "file system"),
    ],
)
def test_bottleneck(tmp_path, options, bottleneck):
    rows, _ = table(tmp_path, "--cfg", T, "--efficiency", "0.8", *options)
    assert {row["bottleneck"] for row in rows} == {bottleneck}


def test_node_that_is_used_in_part(tmp_path):
    rows, _ = table(tmp_path, "--cfg", T, "--efficiency", "0.8", "--gpus", "12", "--cores", "100", "--decode", "10")
    assert {row["decoding, images/s"] for row in rows} == {"1500"}


def test_share_of_the_peaks_that_networks_reach():
    shares = scaling.published_efficiency(["resmlp_36_224", "convnext_small"])
    # Far from 1 would mean that the count is of something else than what the GPU does.
    assert all(0.5 < share < 1.3 for share in shares.values())


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--gpus", "0"], 2, "accepted: a whole number of 1 or more"),
        (["--efficiency", "0"], 2, "accepted: a number above 0"),
        (["--cfg", DIGITS, DIGITS], 1, "strip_mlp_pico_digits is another file's too"),
    ],
)
def test_bad_options(options, status, message):
    result = python("tools/scaling.py", *options, ok=False)
    assert result.returncode == status
    assert message in result.stderr
