#!/usr/bin/env bash
# torchao 0.18.0 (PyTorch 2.14.1): prepare_pt2e changes what a network computes, before anything is quantised. It folds a
# BatchNorm into the convolution before it also where others use the output of that convolution. In
#     y = conv(x);  return y + norm(y)
# both terms become norm(y): the prepared network returns exactly 2 norm(y). No warning. Networks of this form: patch
# merging whose output is normalised by the next block and carried past it by a residual connection.
# `convert_pt2e` then quantises the wrong network, so it looks like a loss of accuracy by int8.
# Installs PyTorch and torchao into a temporary folder (some GB). Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchao==0.18.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON_END'
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


@torch.no_grad()
def compare():
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(2, 4, 8, 8)
    block.norm.running_var.fill_(4.0)  # so that the norm changes something
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(block, (x,)).module()
    expected, normalised = block(x), block.norm(block.conv(x))
    torch.testing.assert_close(exported(x), expected)
    prepared = prepare_pt2e(exported, quantizer)(x)
    error = (prepared - expected).abs().max()
    print(f"largest output {expected.abs().max():.3f}, largest error of the prepared network {error:.3f}")
    print(f"largest difference from 2 norm(y): {(prepared - 2 * normalised).abs().max():.1e}")
    torch.testing.assert_close(prepared, 2 * normalised)
    assert error > 0.5, "it computes the network now"


compare()
PYTHON_END
