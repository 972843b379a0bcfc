#!/usr/bin/env bash
# timm 1.0.31: most models take arguments of their own over what their name stands for, such as another patch size. The
# MLP-Mixers, ResMLPs and gMLPs do not: the same call ends in a TypeError that names neither the model nor the reason.
# img_size works, so an image size that the name's patches of 16 do not divide cannot be had with smaller patches.
# Reason, seen in timm/models/mlp_mixer.py: the arguments of the name and those of the caller go into one dict(...) call.
# Installs PyTorch into a temporary folder (some GB). Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" - <<'EOF'
import timm
import torch

images = torch.randn(1, 3, 32, 32)
for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"):
    model = timm.create_model(name, img_size=32, patch_size=2 if "swin" in name else 8)
    assert model(images).shape == (1, 1000)
    print(f"{name}: patch_size is taken")

assert timm.create_model("mixer_s16_224", img_size=32)(images).shape == (1, 1000)
print("mixer_s16_224: img_size is taken")
for name in ("mixer_s16_224", "resmlp_12_224", "gmlp_ti16_224"):
    for argument in ("patch_size", "num_blocks", "embed_dim"):
        try:
            timm.create_model(name, img_size=32, **{argument: 8})
        except TypeError as error:
            assert str(error) == f"dict() got multiple values for keyword argument '{argument}'", error
            print(f"{name}({argument}=8): TypeError: {error}")
        else:
            raise SystemExit(f"{name} takes {argument} now")
EOF
