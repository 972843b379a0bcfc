#!/usr/bin/env bash
# timm 1.0.31, transformers 5.24.0: transformers does not open what timm's save_for_hf writes, of any model and with any
# number of classes. timm states the number of classes at the top of config.json and again in model_args; transformers'
# TimmWrapperForImageClassification passes both to one call, which is a TypeError. Without num_classes in model_args, the
# same folder opens in both, with the same logits.
# Reason, seen in timm/models/_input.py (get_model_args) and transformers/models/timm_wrapper/modeling_timm_wrapper.py.
# Output here: "TypeError: ... got multiple values for keyword argument 'num_classes'" for each of the three models.
# Installs PyTorch into a temporary folder (some GB). Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

images = torch.randn(1, 3, 160, 160)
for name, classes in (("test_vit", 1000), ("test_vit", 3), ("test_resnet", 3)):
    model = timm.create_model(name, num_classes=classes).eval()
    folder = Path(f"{name}_{classes}")
    save_for_hf(model, folder, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    try:
        AutoModelForImageClassification.from_pretrained(folder)
    except TypeError as error:
        assert str(error).endswith("got multiple values for keyword argument 'num_classes'"), error
        print(f"{name}, {classes} classes: timm opens it; transformers: TypeError: {error}")
    else:
        raise SystemExit(f"transformers opens {name} now")

    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["num_classes"] == config["model_args"].pop("num_classes") == classes
    path.write_text(json.dumps(config))
    for opened in (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        lambda x: AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits,
    ):
        assert torch.allclose(opened(images), model(images), atol=1e-5)
    print(f"{name}, {classes} classes: without num_classes in model_args, both open it")
PYTHON
