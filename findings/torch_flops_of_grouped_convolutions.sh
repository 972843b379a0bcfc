#!/usr/bin/env bash
# PyTorch 2.14.1: torch.utils.flop_counter counts the backward pass of grouped convolutions too high. A depthwise kernel
# of 32 channels costs as much backward as 33 times its forward pass, where 2 times is right: the gradient of the weight
# is counted as if every output channel saw every input channel. A depthwise network's training step looks several
# times as expensive as it is. Forward counts are right, and so are convolutions without groups.
# Reason, seen in torch/utils/flop_counter.py: conv_backward_flop swaps the channel dimensions of the shapes, and the
# division by the number of groups is lost on the way.
# Installs PyTorch into a temporary folder (some GB). Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'EOF'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

for groups in (1, 4, 32):
    layer = nn.Conv2d(32, 32, 3, padding=1, groups=groups, bias=False)
    images = torch.randn(1, 32, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        result = layer(images).sum()
    with FlopCounterMode(display=False) as backward:
        result.backward()
    # Two per multiply-add: 64 places, 32 outputs at each, 9 x 32 / groups inputs for each.
    assert forward.get_total_flops() == 2 * 64 * 32 * 9 * 32 // groups
    ratio = backward.get_total_flops() / forward.get_total_flops()
    print(f"{groups} groups: backward / forward = {ratio:g} (2 is right)")
    assert ratio == 1 + groups, "it counts otherwise now"
EOF
