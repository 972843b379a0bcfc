#!/usr/bin/env bash
# PyTorch 2.14.1, CPU: a package of torch._inductor.aoti_compile_and_package gives wrong numbers, without an error, for an
# input in another memory format than that of the example it was compiled with. Here it computes 2 x + 1. For the same
# image in torch.channels_last most results are those of other pixels. torch.compile compiles anew in this case, and
# torch.export's program itself is right. A vision model in channels_last beside a package compiled from contiguous
# images loses its accuracy in silence.
# Remedy seen: `.contiguous()` before the call. With AOTI_RUNTIME_CHECK_INPUTS=1 set while it is compiled, the call is
# refused instead.
# Installs PyTorch into a temporary folder (some GB); needs a C++ compiler. Exit status 0 while it behaves like this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cd "$folder"
cat > compile_and_run.py <<'END'
import torch
from torch import nn


class Affine(nn.Module):
    def forward(self, x):
        return 2 * x + 1


x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
y = x.to(memory_format=torch.channels_last)
assert torch.equal(x, y)
program = torch.export.export(Affine(), (x,))
package = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path="affine.pt2"))
expected = 2 * x + 1
assert torch.equal(package(x), expected)
assert torch.equal(program.module()(y), expected)
assert torch.equal(package(y.contiguous()), expected)
try:
    wrong = (package(y) != expected).float().mean().item()
except RuntimeError as error:
    print("refused:", str(error).splitlines()[0])
else:
    print(f"wrong: {100 * wrong:.0f} % of the results")
END
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
"$folder/venv/bin/python" compile_and_run.py | tee unchecked.txt
AOTI_RUNTIME_CHECK_INPUTS=1 "$folder/venv/bin/python" compile_and_run.py | tee checked.txt
grep -q '^wrong: 9[0-9] %' unchecked.txt
grep -q '^refused: ' checked.txt
