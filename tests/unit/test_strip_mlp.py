"""The model against the reference numbers of the released code and against the literal equations.

`reference/*.json` holds what the released models compute from the weights and images of `reference/fill.py`;
`literal.py` is the architecture as equations. The JSON files pin both down on two released variants, the literal
equations then pin the model down on everything the files do not cover: other variants, sizes and options.
"""

import json
import re
import shutil
from collections import defaultdict
from functools import cached_property, partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  (registers the variants with timm)
from config import get_default_config
from models.activation_checkpoint import frozen_running_stats
from models.build import build_strip_mlp
from models.ops import DepthwiseConv, grn_scale, mix_strips, pointwise, scaled_pointwise
from models.released import checkpoint_filter_fn
from models.strip_mlp import StripMixingOptions, StripMLP, StripMLPBlock
from optimizer import build_optimizer, param_groups
from tests import literal
from tests.reference import fill

REFERENCES = ["strip_mlp_tiny_light_64", "strip_mlp_small_64", "strip_mlp_tiny_light_224"]
VARIANTS = ["strip_mlp_tiny_light", "strip_mlp_tiny", "strip_mlp_small", "strip_mlp_base"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]

# A network of five small blocks for whatever does not need a released variant.
TOY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "patch_channels": 2, "img_size": 64, "num_classes": 7}

# Variants, sizes and options that no JSON file covers.
CASES = {
    "tiny-96": literal.Spec(**literal.VARIANTS["tiny"], img_size=96, num_classes=7),
    "base-64": literal.Spec(**literal.VARIANTS["base"], img_size=64, num_classes=7),
    "toy": literal.Spec(**TOY),
    "wide": literal.Spec(**{**TOY, "img_size": (64, 96)}),  # on these two maps the relative positions are clipped
    "tall": literal.Spec(**{**TOY, "img_size": (128, 32)}),
    "strip-width-1": literal.Spec(**TOY, strip_width=1),
    "strip-width-5": literal.Spec(**TOY, strip_width=5),
    "strip-width-7": literal.Spec(**TOY, strip_width=7),
    "one-channel-patches": literal.Spec(**{**TOY, "patch_channels": 1}),
    "one-patch": literal.Spec(**{**TOY, "patch_channels": 8}),
    "one-patch-everywhere": literal.Spec(**{**TOY, "patch_channels": -1}),
    "parallel": literal.Spec(**TOY, cgsmm_structure="parallel"),
    "parallel-wide": literal.Spec(**{**TOY, "img_size": (64, 96)}, cgsmm_structure="parallel"),
    "cgsmm-only": literal.Spec(**TOY, branches="cgsmm"),
    "lsmm-only": literal.Spec(**TOY, branches="lsmm"),
    "no-position-tables": literal.Spec(**TOY, position_tables=False),
    "no-shortcuts": literal.Spec(**TOY, multi_scale_shortcuts=False),
    "no-grn": literal.Spec(**TOY, grn=False),
    "alpha-2": literal.Spec(**TOY, alpha=2),
    "grey": literal.Spec(**TOY, in_chans=1),
    "patch-size-2": literal.Spec(**{**TOY, "img_size": 32}, patch_size=2),
}


class Case:
    """A network given by its spec, with the weights, images and labels of fill.py."""

    def __init__(self, spec, dtype=torch.float32):
        self.spec = spec
        self.dtype = dtype

    @cached_property
    def shapes(self):
        return dict(literal.state_dict_shapes(self.spec))

    @cached_property
    def weights(self):
        """The state dict under the released names."""
        weights = {name: torch.as_tensor(fill.weight(name, shape)) for name, shape in self.shapes.items()}
        return {name: w.to(self.dtype) if w.is_floating_point() else w for name, w in weights.items()}

    def batch(self, size):
        height, width = self.spec.maps[0]
        shape = (size, self.spec.in_chans, height * self.spec.patch_size, width * self.spec.patch_size)
        if self.spec.in_chans == 3 and shape[2] == shape[3]:
            images = fill.images(size, shape[2])
        else:
            images = 1.5 * fill.uniform(f"images-{shape}", shape)
        return torch.as_tensor(images, dtype=self.dtype), torch.as_tensor(fill.labels(size, self.spec.num_classes))

    def leaves(self):
        """The weights for `literal.forward`: fresh leaves, those that are trained asking for a gradient."""
        return {name: w.clone().requires_grad_(self.is_trained(name)) for name, w in self.weights.items()}

    def model(self, **kwargs):
        model = StripMLP(**{**vars(self.spec), "drop_path_rate": 0.0, **kwargs}).to(self.dtype)
        model.load_state_dict(checkpoint_filter_fn(self.weights, model))
        return model

    @staticmethod
    def is_trained(name):
        return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))

    @staticmethod
    def is_decayed(name, shape):
        """The weight decay rule of the released recipe."""
        return len(shape) > 1 and not name.endswith(".bias")

    def is_free(self, name):
        """Whether the loss in training mode does not depend on this entry: a shift right before a BatchNorm."""
        last = f"blocks4.{self.spec.depths[3] - 1}.channel_mixing"
        return name.endswith("smlp_block.mlp.0.bias") or name in (f"{last}.grn.beta", f"{last}.fc2.bias")


class Reference(Case):
    """A case of which the released code's numbers are known."""

    def __init__(self, name):
        self.name = name
        self.variant = name.rsplit("_", 1)[0]
        self.data = json.loads((Path(__file__).parents[1] / "reference" / f"{name}.json").read_text())
        arguments = literal.VARIANTS[self.variant.removeprefix("strip_mlp_")]
        super().__init__(
            literal.Spec(**arguments, img_size=self.data["img_size"], num_classes=self.data["num_classes"])
        )

    def model(self):
        spec = self.spec
        model = timm.create_model(
            self.variant, num_classes=spec.num_classes, img_size=spec.img_size, drop_path_rate=0.0
        )
        model.load_state_dict(checkpoint_filter_fn(self.weights, model))
        return model

    def check_eval(self, outputs):
        expected = self.data["eval"]
        for stage, numbers in expected["stages"].items():
            y = outputs[stage]
            assert list(y.shape) == numbers["shape"]
            assert y.mean().item() == pytest.approx(numbers["mean"], abs=1e-5)
            assert y.std().item() == pytest.approx(numbers["std"], rel=1e-5)
            assert y.flatten()[:8].tolist() == pytest.approx(numbers["first8"], abs=1e-4)
        assert outputs["pooled"][0, :16].tolist() == pytest.approx(expected["pooled_first16"], abs=1e-4)
        torch.testing.assert_close(outputs["logits"], torch.tensor(expected["logits"]), rtol=0, atol=1e-4)

    def check_train(self, loss, gradients):
        """Loss and gradient norms; `gradients` holds a tensor for every released name."""
        expected = self.data["train"]
        norms = expected["grad_norms"]
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-3)
        assert list(norms) == [name for name in self.shapes if self.is_trained(name)]
        assert gradients.keys() == norms.keys()
        # What is zero by construction comes out as rounding noise, 1e-7 of the total norm and less in the reference,
        # while the smallest of the others is above 1e-4 of it.
        floor = 1e-6 * sum(norm**2 for norm in norms.values()) ** 0.5
        for name, norm in norms.items():
            actual = gradients[name].norm().item()
            if self.is_free(name):
                assert norm < floor
                assert actual < floor, name
            else:
                assert actual == pytest.approx(norm, rel=1e-3), name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of small operations: on a machine with other work, threads waiting for each other take 20 times as
    long as one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slow_if(condition):
    return [pytest.mark.slow] if condition else []


@pytest.fixture(scope="module", params=[pytest.param(n, marks=slow_if(n.endswith("_224"))) for n in REFERENCES])
def reference(request):
    return Reference(request.param)


@pytest.fixture(scope="module", params=[name for name in REFERENCES if name.endswith("_64")])
def small_reference(request):
    return Reference(request.param)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=slow_if(n in ("tiny-96", "base-64"))) for n in CASES])
def case(request):
    # In float64 the two implementations agree to about 1e-12, so that no error hides in a tolerance for rounding.
    return Case(CASES[request.param], torch.float64)


@pytest.fixture(scope="module")
def toy():
    return Case(CASES["toy"])


def outputs_of(model, images):
    """The model's counterpart of what `literal.forward` returns."""
    outputs = {}
    modules = {"patch_embed": model.patch_embed, **dict(zip(STAGES, model.stages, strict=True))}
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, module in modules.items()
    ]
    features = model.forward_features(images)
    outputs["pooled"] = model.forward_head(features, pre_logits=True)
    outputs["logits"] = model.forward_head(features)
    for hook in hooks:
        hook.remove()
    return outputs


def by_released_name(model, case, tensors):
    """What `tensors` (a dict under the model's parameter names) holds for each entry of a released checkpoint.

    A checkpoint in which entry k is filled with k shows where each entry goes, whatever the model's layout is.
    The elements of an entry come as one vector, in the model's order.
    """
    names = list(case.shapes)
    numbered = {name: torch.full(shape, k, dtype=torch.int32) for k, (name, shape) in enumerate(case.shapes.items())}
    numbered = checkpoint_filter_fn(numbered, model)
    found = defaultdict(list)
    for name, tensor in tensors.items():
        number = numbered[name]
        for k in range(int(number.min()), int(number.max()) + 1):
            found[names[k]].append(tensor[number == k])
    found = {name: torch.cat(parts) for name, parts in found.items() if sum(map(len, parts))}
    for name, values in found.items():
        assert values.numel() == torch.Size(case.shapes[name]).numel(), name
    return found


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(actual, expected):
    """Norm of the difference over the norm of what was expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def adamw_losses(loss_of, parameters, optimizer, clip_grad, steps=4):
    """Losses of training steps on one batch, and the gradient norms before clipping."""
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip_grad).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


# The literal equations against the released code


@torch.no_grad()
def test_literal_eval(reference):
    images, _ = reference.batch(reference.data["eval"]["batch"])
    reference.check_eval(literal.forward(reference.weights, images, reference.spec))


@pytest.mark.slow
def test_literal_train(reference):
    images, labels = reference.batch(reference.data["train"]["batch"])
    params = reference.leaves()
    loss = F.cross_entropy(literal.forward(params, images, reference.spec, training=True)["logits"], labels)
    loss.backward()
    reference.check_train(loss, {name: p.grad for name, p in params.items() if p.requires_grad})


# How it is computed


@pytest.mark.parametrize("m", [1, 3, 7])
@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mix_strips(m, axis, dtype):
    """Each form against the einsum of its docstring, gradients included, on a map that is not square; and the literal
    equation too."""
    torch.manual_seed(0)
    n, q, patches, height, width = 2, 3, 2, 5, 4
    length = width if axis == "row" else height
    tensors = [torch.randn(n, q * patches, height, width), torch.randn(patches, length, length, m)]
    tensors.append(torch.randn(patches, length))

    def equation(x, weight, bias):
        x = x.unflatten(1, (q, patches)) if axis == "row" else x.unflatten(1, (q, patches)).transpose(-1, -2)
        strips = F.pad(x, (0, 0, m // 2, m // 2)).unfold(-2, m, 1)  # (n, q, patches, i, w, m)
        y = torch.einsum("pvwd,njpiwd->njpiv", weight, strips) + bias[:, None, :]
        return (y if axis == "row" else y.transpose(-1, -2)).flatten(1, 2)

    def literally(x, weight, bias):
        params = {"proj.weight": weight.flatten(0, 1)[:, :, None], "proj.bias": bias.flatten()}
        return {"row": literal.strip_mlp_rows, "column": literal.strip_mlp_columns}[axis](params, "proj", x, q)

    forms = [partial(mix_strips, axis=axis, q=q, form=form) for form in ("conv", "matmul")]
    results = []
    for mix in (equation, literally, *forms):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        y = mix(*leaves)
        (y * y).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert actual.shape == expected.shape
            assert relative_error(actual, expected) < (1e-12 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("form", ["conv", "matmul", None])
def test_mix_strips_on_a_map_narrower_than_the_strip(size, axis, form):
    torch.manual_seed(0)
    length = size[1] if axis == "row" else size[0]
    x = torch.randn(2, 6, *size).double()
    weight, bias = torch.randn(2, length, length, 7).double(), torch.randn(2, length).double()
    # Further rows (columns) of zeros change nothing.
    wider = F.pad(x, (0, 0, 3, 3) if axis == "row" else (3, 3, 0, 0))
    expected = mix_strips(wider, weight, bias, axis, 3, form="conv")
    expected = expected[..., 3:-3, :] if axis == "row" else expected[..., 3:-3]
    torch.testing.assert_close(mix_strips(x, weight, bias, axis, 3, form), expected)


@pytest.mark.parametrize("kernel_size", [3, 7, (3, 7), (7, 3)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (3, 4), (8, 8)])
def test_depthwise_conv_is_that_of_the_whole_kernel(kernel_size, size):
    torch.manual_seed(0)
    conv = DepthwiseConv(4, kernel_size).double()
    results = []
    for compute in conv, partial(F.conv2d, weight=conv.weight, padding="same", groups=4):
        x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        y = compute(x)
        conv.weight.grad = None
        (y * y).sum().backward()
        results.append((y, x.grad, conv.weight.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("form", ["conv", "linear"])
def test_pointwise(form):
    x, weight, bias = torch.randn(2, 6, 3, 4).double(), torch.randn(5, 6).double(), torch.randn(5).double()
    expected = torch.einsum("oc,nchw->nohw", weight, x) + bias[:, None, None]
    torch.testing.assert_close(pointwise(x, weight[:, :, None, None], bias, form=form), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_as_on_gpus(case, checkpointing, monkeypatch):
    """What GPUs compute, in double precision on the CPU: matrix products, and what is computed again in the backward
    pass, also inside blocks that are themselves computed again. The BatchNorms' statistics are updated once."""
    images, labels = case.batch(4)
    results = []
    for on_gpu in False, True:
        monkeypatch.setattr("models.ops.on_gpu", lambda x, answer=on_gpu: answer)
        model = case.model().train()
        model.set_grad_checkpointing(checkpointing and on_gpu)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients_of(model), **dict(model.named_buffers())})
    total = sum(p.grad.norm() ** 2 for p in model.parameters()).sqrt().item()
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-7, atol=1e-10 * total, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_on_gpus_in_half_precision(toy, dtype, monkeypatch):
    images, labels = toy.batch(8)
    gradients = []
    for on_gpu in False, True:
        monkeypatch.setattr("models.ops.on_gpu", lambda x, answer=on_gpu: answer)
        model = toy.model().train()
        with torch.autocast("cpu", dtype, enabled=on_gpu):
            loss = F.cross_entropy(model(images).float(), labels)
        (1024 * loss).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_grn_keeps_one_map():
    """Only the map itself is kept for the gradient of the norms, in its own dtype."""
    for dtype in torch.float32, torch.bfloat16, torch.float16:
        kept = []
        x = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            scale = grn_scale(x, torch.zeros(3))
        maps = [t for t in kept if t.numel() >= x.numel()]
        assert [(t.data_ptr(), t.dtype) for t in maps] == [(x.data_ptr(), dtype)]
        scale.sum().backward()
        assert x.grad.dtype == dtype


def test_grn_of_a_dead_channel():
    """A channel that is zero everywhere has a finite gradient; float16 does not overflow where the squares do."""
    ones, zeros = torch.ones(3), torch.zeros(3)
    x = torch.randn(2, 3, 4, 4)
    x[:, 1] = 0
    x.requires_grad_()
    scaled_pointwise(x, grn_scale(x, ones), zeros, torch.eye(3), zeros).sum().backward()
    assert x.grad.isfinite().all()
    large = torch.full((1, 3, 4, 4), 1000.0, dtype=torch.float16)
    torch.testing.assert_close(grn_scale(large, ones), torch.full((1, 3, 1, 1), 2.0), rtol=1e-5, atol=0)


# The model against the released code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "num_params", "macs"),
    [
        ("strip_mlp_tiny_light", 18_243_920, 2_518_593_280),
        ("strip_mlp_tiny", 24_903_920, 3_648_236_800),
        ("strip_mlp_small", 42_568_600, 6_803_134_464),
        ("strip_mlp_base", 57_216_480, 9_184_947_968),
    ],
)
def test_size_at_224(variant, num_params, macs):
    with torch.device("meta"):  # shapes without the arithmetic
        check_size(timm.create_model(variant), 224, num_params, macs)


# Of T* at 224 x 224, as the documentation gives them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "num_params", "macs"),
    [
        ({"strip_width": 1}, 17_052_240, 2_436_931_840),
        ({"strip_width": 5}, 19_435_600, 2_600_254_720),
        ({"strip_width": 7}, 20_627_280, 2_681_916_160),
        ({"patch_channels": 1}, 20_058_320, 2_518_593_280),
        ({"patch_channels": -1}, 16_484_736, 2_518_593_280),
        ({"cgsmm_structure": "parallel"}, 18_243_920, 2_518_593_280),
        ({"branches": "cgsmm"}, 17_411_400, 2_492_819_200),
        ({"branches": "lsmm"}, 14_817_040, 2_155_256_320),
        ({"position_tables": False}, 18_132_720, 2_518_593_280),
        ({"multi_scale_shortcuts": False}, 18_237_520, 2_518_091_520),
        ({"grn": False}, 18_221_840, 2_518_593_280),
    ],
)
def test_size_of_ablations(arguments, num_params, macs):
    with torch.device("meta"):
        check_size(timm.create_model("strip_mlp_tiny_light", **arguments), 224, num_params, macs)


def check_size(model, img_size, num_params, macs):
    assert sum(parameter.numel() for parameter in model.parameters()) == num_params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, img_size, img_size, device=next(model.parameters()).device))
    assert counter.get_total_flops() == 2 * macs


@torch.no_grad()
def test_eval(reference):
    images, _ = reference.batch(reference.data["eval"]["batch"])
    model = reference.model().eval()
    outputs = outputs_of(model, images)
    reference.check_eval(outputs)
    assert torch.equal(model(images), outputs["logits"])


@pytest.mark.slow
def test_train(reference):
    images, labels = reference.batch(reference.data["train"]["batch"])
    model = reference.model().train()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    reference.check_train(loss, by_released_name(model, reference, gradients_of(model)))


@pytest.mark.slow
def test_adamw(small_reference):
    expected = small_reference.data["train"]["adamw"]
    images, labels = small_reference.batch(small_reference.data["train"]["batch"])
    model = small_reference.model().train()
    config = get_default_config()
    assert config.TRAIN.OPTIMIZER.NAME.lower() == "adamw"
    optimizer = build_optimizer(config, model, expected["lr"])
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, not_decayed = optimizer.param_groups
    for group in decayed, not_decayed:
        assert (group["lr"], list(group["betas"]), group["eps"]) == (expected["lr"], expected["betas"], expected["eps"])
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (expected["weight_decay"], 0)
    assert sum(p.numel() for p in decayed["params"]) == expected["num_params_decayed"]
    assert sum(p.numel() for p in not_decayed["params"]) == expected["num_params_not_decayed"]

    losses, norms = adamw_losses(
        lambda: F.cross_entropy(model(images), labels), list(model.parameters()), optimizer, expected["clip_grad"]
    )
    assert losses == pytest.approx(expected["losses"], rel=1e-3)
    assert norms == pytest.approx(expected["grad_norms_before_clip"], rel=1e-3)


# The model against the literal equations


@torch.no_grad()
def test_case_eval(case):
    images, _ = case.batch(2)
    actual = outputs_of(case.model().eval(), images)
    expected = literal.forward(case.weights, images, case.spec)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_case_train(case):
    images, labels = case.batch(4)
    model = case.model().train()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()

    params = case.leaves()
    expected = F.cross_entropy(literal.forward(params, images, case.spec, training=True)["logits"], labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)

    # The names and layout of gradients change like those of the weights.
    gradients = {name: p.grad if p.requires_grad else p for name, p in params.items()}
    gradients = checkpoint_filter_fn(gradients, model)
    total = sum(p.grad.norm() ** 2 for p in model.parameters()).sqrt().item()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(
            gradient, gradients[name], rtol=1e-7, atol=1e-10 * total, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("tiny-96", "base-64")])
def test_case_adamw(name):
    case = Case(CASES[name], torch.float64)
    images, labels = case.batch(4)
    # A learning rate at which a parameter in the wrong group shows in the losses.
    lr, clip_grad = 1e-3, 1.0
    config = get_default_config()

    model = case.model().train()
    optimizer = build_optimizer(config, model, lr)
    actual, norms = adamw_losses(
        lambda: F.cross_entropy(model(images), labels), list(model.parameters()), optimizer, clip_grad
    )

    params = case.leaves()
    trained = {name: p for name, p in params.items() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if case.is_decayed(name, p.shape)], "weight_decay": 0.05},
        {"params": [p for name, p in trained.items() if not case.is_decayed(name, p.shape)], "weight_decay": 0.0},
    ]
    expected, expected_norms = adamw_losses(
        lambda: F.cross_entropy(literal.forward(params, images, case.spec, training=True)["logits"], labels),
        list(trained.values()),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8),
        clip_grad,
    )
    assert max(expected_norms) > clip_grad  # or clipping would go untested
    assert actual == pytest.approx(expected, rel=1e-8)
    assert norms == pytest.approx(expected_norms, rel=1e-8)


# Parameters


def test_param_groups(toy):
    """Each parameter by its released name, not only their number."""
    model = toy.model()
    groups = param_groups(model, 0.07)
    assert [group["weight_decay"] for group in groups] == [0.07, 0.0]
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))

    decayed = set(groups[0]["params"])
    flags = {name: torch.full_like(p, p in decayed) for name, p in model.named_parameters()}
    for name, flag in by_released_name(model, toy, flags).items():
        assert flag.unique().tolist() == [toy.is_decayed(name, toy.shapes[name])], name
    assert set(model.no_weight_decay()).isdisjoint(name for name, p in model.named_parameters() if p in decayed)


def test_initialisation(toy):
    torch.manual_seed(0)
    model = StripMLP(**TOY)
    entries = by_released_name(model, toy, {name: p.detach() for name, p in model.named_parameters()})
    kinds = defaultdict(list)  # the same layer of all blocks together
    for name, values in entries.items():
        if name.endswith(("grn.gamma", "grn.beta")):
            assert not values.any(), name
        elif name.endswith("embeddings_table"):
            kinds["table"].append(values)
        elif name.removesuffix("bias") + "running_mean" in toy.shapes or "layer_norm" in name:
            assert torch.equal(values, torch.full_like(values, name.endswith("weight"))), name
        elif name.removesuffix("weight") + "running_mean" in toy.shapes:
            assert torch.equal(values, torch.ones_like(values)), name
        else:
            # PyTorch draws weights and biases of convolutions and linear layers from +- 1 / sqrt(fan in).
            fan_in = torch.Size(toy.shapes[re.sub(r"bias$", "weight", name)][1:]).numel()
            kinds[re.sub(r"^blocks\d\.\d\.", "", name)].append(values * fan_in**0.5)
    tables = torch.cat(kinds.pop("table"))
    assert tables.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(tables.mean().item()) < 0.001
    for kind, values in kinds.items():
        values = torch.cat(values)
        assert values.abs().max() <= 1 + 1e-6, kind
        # Five standard deviations of the estimate.
        if len(values) > 50:
            assert values.std().item() == pytest.approx(3**-0.5, rel=2.5 / len(values) ** 0.5), kind


# Checkpoints

WRAPPINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "config": object()},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "model-module": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("source", ["released", "ours"])
def test_checkpoint_wrapping(toy, source, wrapping):
    expected = toy.model().state_dict()
    state = toy.weights if source == "released" else expected
    model = StripMLP(**TOY)
    converted = checkpoint_filter_fn(WRAPPINGS[wrapping](state), model)
    assert list(converted) == list(expected) if source == "ours" else set(converted) == set(expected)
    model.load_state_dict(converted)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_checkpoint_with_a_missing_or_unknown_entry(toy):
    model = StripMLP(**TOY)
    # PyTorch itself tolerates a missing count of batches.
    for missing in [name for name in toy.shapes if not name.endswith("num_batches_tracked")]:
        weights = {name: value for name, value in toy.weights.items() if name != missing}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(checkpoint_filter_fn(weights, model))
    for extra in ("extra", "blocks1.7.token_mixing.smlp_block.fuse.weight", "head.fc.weight.ema"):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(checkpoint_filter_fn({**toy.weights, extra: torch.zeros(1)}, model))


# Behaviour


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_of_the_variants(variant):
    """The released models drop every branch of every block with the same probability."""
    with torch.device("meta"):
        drop_paths = [m for m in timm.create_model(variant).modules() if isinstance(m, DropPath)]
    assert len(drop_paths) == sum(literal.VARIANTS[variant.removeprefix("strip_mlp_")]["depths"])
    assert {module.drop_prob for module in drop_paths} == {0.1}


def test_defaults_of_the_config():
    """A config that sets no option, and a model that is given none, are the same model."""
    config = get_default_config()
    with torch.device("meta"):
        config.MODEL.NUM_CLASSES = 1000
        config.MODEL.STRIP_MLP.PATCH_CHANNELS = StripMixingOptions().patch_channels  # 0: by the released rule
        assert str(build_strip_mlp(config)) == str(StripMLP())


def test_drop_path(toy):
    """With every branch dropped only the stem, the mergings, the shortcuts and the head are left."""
    images, _ = toy.batch(4)
    torch.manual_seed(0)
    logits = toy.model(drop_path_rate=1 - 1e-6).train()(images)
    no_blocks = literal.Spec(**{**TOY, "depths": (0, 0, 0, 0)})
    expected = literal.forward(toy.weights, images, no_blocks, training=True)["logits"]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_maps_are_channels_last(toy):
    """So are the outputs of all stages, whatever the images are in."""
    images, _ = toy.batch(2)
    model = toy.model()
    for training in False, True:
        outputs = outputs_of(model.train(training), images)
        for name in STAGES:
            assert outputs[name].is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("axis", ["row", "column"])
def test_gradient_of_strips_is_channels_last(axis):
    """In another layout, everything before the strips would be slow."""
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = mix_strips(x, torch.randn(4, 4, 4, 3), torch.randn(4, 4), axis, 2)
    (gradient,) = torch.autograd.grad((y * y).sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("call", [StripMLP.reparameterize, reparameterize_model], ids=["method", "timm"])
@torch.no_grad()
def test_reparameterize(case, call):
    images, _ = case.batch(2)
    model = case.model().eval()
    expected = outputs_of(model, images)
    actual = outputs_of(call(model), images)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_reparameterize_reference(small_reference):
    """In single precision, against the released code's numbers."""
    images, _ = small_reference.batch(small_reference.data["eval"]["batch"])
    model = small_reference.model().reparameterize()
    assert not model.training
    small_reference.check_eval(outputs_of(model, images))
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) == 1 + sum(
        small_reference.spec.depths
    )


@pytest.mark.slow
@torch.no_grad()
def test_reparameterize_copy(toy):
    """timm's function leaves the model alone; a second call changes nothing; the result can be exported."""
    images, _ = toy.batch(2)
    model = toy.model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = reparameterize_model(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = deployed.state_dict().keys()
    assert deployed.reparameterize().state_dict().keys() == names
    exported = torch.export.export(deployed, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@torch.inference_mode()
def test_reparameterized_with_frozen_weights():
    """Compiled with its weights for constants, for a single image: none of them changes from call to call."""
    torch.manual_seed(0)
    model = StripMLP(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_classes=3).reparameterize()
    mixing = model.stages[0][0].token_mixing
    x = torch.randn(1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = mixing(x)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(mixing, dynamic=False)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_grad_checkpointing(toy, drop_path_rate):
    """Recomputing the activations changes nothing, the running statistics of the BatchNorms included."""
    images, labels = toy.batch(8)
    results = []
    for enable in False, True:
        model = toy.model(drop_path_rate=drop_path_rate).train()
        model.set_grad_checkpointing(enable)
        calls = []
        first_norm = next(m for m in model.stages.modules() if isinstance(m, torch.nn.BatchNorm2d))
        first_norm.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        torch.manual_seed(1)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        assert len(calls) == (2 if enable else 1)  # or nothing was recomputed
        results.append({"loss": loss.detach(), **gradients_of(model), **dict(model.named_buffers())})
        # The recomputation must leave the model as it found it.
        model.zero_grad()
        torch.manual_seed(2)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        results[-1].update({f"second {name}": buffer.clone() for name, buffer in model.named_buffers()})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def whole_network():
    return timm.create_model("strip_mlp_pico", num_classes=10, drop_path_rate=0.0), (4, 3, 32, 32)


def one_block():
    return StripMLPBlock(16, (8, 6), StripMixingOptions(), 3, True, 0.0), (4, 16, 8, 6)


# Compiling the whole network to machine code takes minutes: its graph is traced and differentiated, and the code is
# generated for one block, which has nearly every operation.
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("make", "backend"), [(whole_network, "aot_eager"), (one_block, "inductor")])
def test_compile(make, backend):
    torch.manual_seed(0)
    eager, shape = make()
    compiled, _ = make()
    compiled.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    results = []
    for forward, model in (eager, eager), (torch.compile(compiled, backend=backend, fullgraph=True), compiled):
        model.train()
        x = torch.as_tensor(fill.uniform("compile", shape)).requires_grad_()
        y = forward(x)
        (y * torch.as_tensor(fill.uniform("weights", y.shape))).sum().backward()
        results.append({"output": y, "input": x.grad, **gradients_of(model), **dict(model.named_buffers())})
    # Rounding is relative to the whole gradient: the bias in front of a BatchNorm has none but rounding.
    total = sum(p.grad.norm() ** 2 for p in eager.parameters()).sqrt().item()
    for name, value in results[0].items():
        atol = 1e-4 if name == "output" else 1e-6 * total
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(toy):
    images, labels = toy.batch(8)
    model = toy.model().train()
    expected = model(images)
    F.cross_entropy(expected, labels).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    model = model.to("cuda", memory_format=torch.channels_last)
    images, labels = images.to("cuda", memory_format=torch.channels_last), labels.to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    assert relative_error(logits.cpu(), expected) < 0.05
    assert relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu(), gradients) < 0.1


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        # the offending value, then the nearest that work
        ({"img_size": 70}, [70, 64, 96]),
        ({"img_size": 20}, [20, 32]),
        ({"img_size": (64, 100)}, [100, 96, 128]),
        ({"img_size": 72, "patch_size": 2}, [72, 64, 80]),
        ({"strip_width": 4}, [4, 3, 5]),
        ({"strip_width": 0}, [0, 1]),
        ({"patch_channels": 3, "embed_dim": 80}, [3, 40, 2, 4]),
        ({"patch_channels": 7, "embed_dim": 96}, [7, 48, 6, 8]),
        ({"patch_channels": 64, "embed_dim": 80}, [64, 40]),
        ({"patch_channels": 0, "embed_dim": 80}, [0, 1]),
        ({"patch_channels": -2, "embed_dim": 80}, [-2, 1]),
    ],
)
def test_bad_arguments(arguments, numbers):
    with pytest.raises(ValueError) as error:
        StripMLP(**{"img_size": 64, "depths": (1, 1, 1, 1), **arguments})
    found = re.findall(r"-?\d+", str(error.value))
    assert {str(number) for number in numbers} <= set(found), error.value


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ({"cgsmm_structure": "serial"}, ["'serial'", "'cascade'", "'parallel'"]),
        ({"branches": "none"}, ["'none'", "'both'", "'cgsmm'", "'lsmm'"]),
        ({"branches": "lsmm", "cgsmm_structure": "serial"}, ["'serial'", "'cascade'"]),
    ],
)
def test_unknown_choices(arguments, accepted):
    with pytest.raises(ValueError) as error:
        StripMLP(**{**TOY, **arguments})
    assert all(word in str(error.value) for word in accepted), error.value


def test_frozen_statistics_of_sync_batch_norm():
    """SyncBatchNorm insists on a batch counter, which must not move either."""
    norm = torch.nn.SyncBatchNorm(4).train()
    with frozen_running_stats(norm):
        norm(torch.randn(3, 4, 2, 2) + 5)
    assert norm.num_batches_tracked == 0
    assert norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, torch.zeros(4))
    norm(torch.randn(3, 4, 2, 2) + 5)
    assert norm.num_batches_tracked == 1
    assert (norm.running_mean > 0.3).all()
