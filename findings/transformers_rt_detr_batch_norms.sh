#!/usr/bin/env bash
# transformers 5.24.0: an RT-DETR or RT-DETR v2 made from its config, to be trained from scratch, has batch norms with
# weights of about 0: normally distributed around 0 with deviation 0.01. Elsewhere a batch norm begins with weights of 1,
# in PyTorch and in transformers' own D-FINE. Half of the weights even turn the sign. A map that comes out of the first
# batch norm has one hundredth of the size that it has with weights of 1. Checkpoints are not concerned: they bring
# their own weights.
# Reason, seen in transformers/models/rt_detr/modeling_rt_detr.py (_init_weights): the method of the base class sets 1,
# and a later branch of the same method sets the weights of every BatchNorm2d as it does those of linear layers.
# Output here: "RTDetr: 42 batch norms, largest weight 0.05"; "RTDetrV2: 42 batch norms, largest weight 0.04"; "DFine: ..., all weights 1".
# Installs PyTorch into a temporary folder (some GB). Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
for name in ("RTDetr", "RTDetrV2", "DFine"):
    config = getattr(transformers, f"{name}Config")()
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    weights = torch.cat([norm.weight for norm in norms])
    if name == "DFine":
        assert (weights == 1).all(), weights
        print(f"{name}: {len(norms)} batch norms, all weights 1")
        continue
    assert weights.abs().max() < 0.1, weights.abs().max()
    assert abs(weights.mean()) < 1e-3 and 0.008 < weights.std() < 0.012
    print(f"{name}: {len(norms)} batch norms, largest weight {weights.abs().max():.2f}")

rt_detr = transformers.RTDetrModel(transformers.RTDetrConfig())
first = rt_detr.encoder_input_proj[0][1]
plain = nn.BatchNorm2d(first.num_features)
x = torch.randn(8, first.num_features, 8, 8)
ratio = first.train()(x).std() / plain.train()(x).std()
assert ratio < 0.02, ratio
print(f"a map after the first batch norm has {ratio:.3f} of its usual size")
PYTHON
