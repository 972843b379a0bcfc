#!/usr/bin/env bash
# NumPy 2.3.5: seeds that are tuples of different lengths can give the same random numbers. SeedSequence fills up short
# ones with zeros, so (7,), (7, 0) and (7, 0, 0, 0) are one seed, and so are 7 and [7, 0]. Code that keys its streams by
# (seed, epoch) here and (seed, epoch, rank) there draws the same numbers in both places on rank 0. Tuples whose
# difference is not a trailing zero do differ, so a test with other numbers does not show it. From five numbers on the
# zeros count. spawn_key, which is made for this, keeps streams apart whatever the numbers are.
# Exit status 0 while the behaviour is as described.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.3.5
"$folder/venv/bin/python" - <<'EOF'
import numpy as np


def draw(seed):
    return np.random.default_rng(seed).integers(2**63, size=4).tolist()


epoch_order, rank_0 = draw((7, 3)), draw((7, 3, 0))
print("(7, 3):   ", epoch_order)
print("(7, 3, 0):", rank_0)
assert epoch_order == rank_0
assert draw(7) == draw((7,)) == draw((7, 0)) == draw([7, 0, 0]) == draw((7, 0, 0, 0))
assert draw((7, 3)) != draw((7, 3, 1)) and draw((7, 3)) != draw((0, 7, 3))
assert draw((1, 2, 3, 4)) != draw((1, 2, 3, 4, 0))
spawned = [draw(np.random.SeedSequence((7, 3), spawn_key=(key,))) for key in (0, 1)]
print("spawn_key=(0,):", spawned[0])
assert spawned[0] != spawned[1] and epoch_order not in spawned
EOF
