"""Detectors of torchvision and transformers on our backbones."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from config import load_config
from detection.models import build_detector, load_backbone
from models import build_model, compile_model, freeze
from models.build import ModelError
from optimizer import param_groups
from runtime.checkpoint import CheckpointError
from runtime.distributed import wrap
from tests.helpers import ROOT

SIZE = (64, 96)
SMALL = [
    *("DATA.IMG_SIZE", "[64, 96]"),
    *("MODEL.STRIP_MLP.EMBED_DIM", "8"),
    *("MODEL.STRIP_MLP.LAYERS", "[1, 1, 1, 1]"),
    *("DETECTION.HEAD.CHANNELS", "32"),
    *("DETECTION.HEAD.PROPOSALS", "20"),
    *("DETECTION.HEAD.QUERIES", "20"),
    *("DETECTION.HEAD.DECODER_LAYERS", "2"),
    *("DETECTION.HEAD.HIDDEN_CHANNELS", "32"),
    *("DETECTION.HEAD.DENOISING_QUERIES", "8"),
]
BUCKETS = ["DETECTION.SIZES", "[64, 96, 96, 64, 64, 64]"]
TORCHVISION = ["retinanet", "fcos", "faster_rcnn"]
DETRS = ["deformable_detr", "rt_detr", "d_fine"]


def small_config(*opts):
    return load_config(ROOT / "configs/strip_mlp_pico_digits.yaml", [*SMALL, *opts])[0]


def small_detector(*opts, num_classes=3):
    torch.manual_seed(0)
    return build_detector(small_config(*opts), num_classes)


def library(name):
    if name in DETRS:
        pytest.importorskip("transformers", "5.24")
        pytest.importorskip("scipy")


def batch(height=64, width=96):
    """An image with two boxes, a crowd and a box of no width, and one without any."""
    boxes = torch.tensor([[5.0, 5, 40, 30], [10, 10, 60, 60], [0, 0, 64, 64], [7, 7, 7, 9]])
    labels, crowd = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 0])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    return images, [{"boxes": boxes, "labels": labels, "iscrowd": crowd}, empty]


@pytest.mark.parametrize("name", [*TORCHVISION, *DETRS])
def test_training_step_and_what_is_found(name):
    library(name)
    detector = small_detector("DETECTION.DETECTOR", name, "DETECTION.MAX_DETECTIONS", "7")
    images, targets = batch()
    losses = detector(images, targets)
    sum(losses.values()).backward()
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert trained["backbone.body.model.patch_embed.weight"].grad.any()
    # Without any box: the same losses; only what is said to be unused has no gradient.
    detector.zero_grad()
    without = detector(images, [targets[1]] * 2)
    assert without.keys() == losses.keys()
    sum(without.values()).backward()
    unused = [n for n, p in trained.items() if p.grad is None]
    assert detector.has_unused_parameters == bool(unused)

    detector.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = detector(images)
    assert len(found) == 2
    for image in found:
        assert set(image) == {"boxes", "scores", "labels"}
        assert 0 < len(image["scores"]) <= 7
        assert image["boxes"].dtype == image["scores"].dtype == torch.float32
        assert (image["scores"].diff() <= 0).all()
        assert set(image["labels"].tolist()) <= {0, 1, 2}
        left, top, right, bottom = image["boxes"].unbind(1)
        assert (left >= 0).all() and (top >= 0).all() and (right <= 96).all() and (bottom <= 64).all()
    sum(detector.train()(images, targets).values()).backward()  # also with what it kept of an evaluation
    # A moving average of the weights goes as far with each: a state dict has none of them twice.
    pointers = [value.data_ptr() for value in detector.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


class Perfect(torch.nn.Module):
    """A library's network that finds what it was to learn: its labels and boxes, in its own conventions."""

    def forward(self, images=None, targets=None, pixel_values=None, labels=None):
        if targets is not None:
            self.targets = targets
            return {"loss": torch.zeros(())}
        if labels is not None:
            self.targets = labels
            return SimpleNamespace(loss_dict={"loss_bbox": torch.ones(()), "cardinality_error": torch.ones(())})
        if images is not None:
            return [{**target, "scores": torch.ones(len(target["labels"]))} for target in self.targets]
        logits = torch.full((len(self.targets), 5, 3), -9.0)
        boxes = torch.full((len(self.targets), 5, 4), 0.5)
        for image, target in enumerate(self.targets):
            for query, (label, box) in enumerate(zip(target["class_labels"], target["boxes"], strict=True)):
                logits[image, query, label], boxes[image, query] = 9.0, box
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


@pytest.mark.parametrize("name", [*TORCHVISION, *DETRS])
def test_boxes_and_labels_of_a_perfect_network(name):
    library(name)
    detector = small_detector("DETECTION.DETECTOR", name, "DETECTION.SCORE_THRESHOLD", "0.5")
    detector.network = Perfect()
    images, targets = batch()
    losses = detector(images, targets)
    if name in DETRS:
        assert losses == {"loss_bbox": 5 if name == "deformable_detr" else 1}
    else:
        assert [t["labels"].tolist() for t in detector.network.targets] == [
            [1, 3] if name == "faster_rcnn" else [0, 2],  # without the crowd and what has no area
            [],
        ]
    found = detector.eval()(images)
    assert found[1]["labels"].numel() == 0
    order = found[0]["labels"].argsort()
    assert found[0]["labels"][order].tolist() == [0, 2]
    assert torch.allclose(found[0]["boxes"][order], targets[0]["boxes"][:2], atol=1e-3)


@pytest.mark.parametrize("name", DETRS)
def test_a_loss_that_is_no_number_does_not_end_a_run(name):
    """The library raises an exception. The engine skips the step, if it sees the loss and all gradients."""
    library(name)
    detector = small_detector("DETECTION.DETECTOR", name)
    names = detector(*batch()).keys()
    with torch.no_grad():
        next(detector.parameters()).fill_(float("nan"))
    losses = detector(*batch())
    assert losses.keys() == names
    sum(losses.values()).backward()
    assert not any(p.grad.isfinite().any() for p in detector.parameters() if p.requires_grad)


def test_learns_two_boxes_by_heart():
    detector = small_detector("DETECTION.HEAD.ANCHOR_SCALE", "2")
    images, targets = batch()
    images, targets = images[:1], targets[:1]
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        sum(detector(images, targets).values()).backward()
        optimizer.step()
    for module in detector.modules():  # the running statistics of so few steps are far behind
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        detector(images, targets)
        found = detector.eval()(images)[0]
    order = found["labels"][:2].argsort()
    assert found["labels"][order].tolist() == [0, 2]
    assert (found["boxes"][order] - targets[0]["boxes"][:2]).abs().max() < 6


# Sizes


def test_sizes_share_what_does_not_depend_on_them():
    detector = small_detector(*BUCKETS)
    backbone = detector.backbone
    first, other = (backbone.body_for(size).model for size in ((64, 96), (96, 64)))
    assert first.img_size == (64, 96) and other.img_size == (96, 64)
    assert first.stages[0][0].channel_mixing is other.stages[0][0].channel_mixing
    # As a move to a device, it replaces buffers; and this replaces modules.
    detector = torch.nn.SyncBatchNorm.convert_sync_batchnorm(detector).double()
    first, other = (backbone.body_for(size).model for size in ((64, 96), (96, 64)))
    own = {n for n, p in other.named_parameters() if p is not first.get_parameter(n)}
    assert own == {f"{n}.{p}" for n, module, _ in other.map_sized() for p in module.map_axes}
    assert all(b is first.get_buffer(n) for n, b in other.named_buffers())
    assert len({id(p) for p in detector.parameters()}) == len(list(detector.parameters()))
    groups = param_groups(detector, 0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in detector.parameters())
    # GRN's vectors are decayed as in classification; the strips' biases of every size are not.
    names = {id(p): n for n, p in detector.named_parameters()}
    decayed, not_decayed = ({names[id(p)] for p in group["params"]} for group in groups)
    assert sum(".grn.weight" in n for n in decayed) == 4
    assert sum("sized" in n and n.endswith("bias") for n in not_decayed) == 16 and not any(
        "grn" in n for n in not_decayed
    )
    # With layer decay, a layer's parameters have the same rate for all sizes.
    rates = {names[id(p)]: g["lr_scale"] for g in param_groups(detector, 0.05, 0.5) for p in g["params"]}
    classifier = build_model(small_config("MODEL.NUM_CLASSES", "3"))
    classifier_groups = param_groups(classifier, 0.05, 0.5)
    expected = {id(p): g["lr_scale"] for g in classifier_groups for p in g["params"]}
    for name, parameter in classifier.named_parameters():
        if name.startswith(("norm.", "head.")):
            continue
        assert rates[f"backbone.body.model.{name}"] == expected[id(parameter)] < 1
        if ".strip_" in name:
            assert rates[f"backbone.sized.1.{name}"] == expected[id(parameter)]
    assert all(rate == 1 for name, rate in rates.items() if name.startswith("network"))
    freeze(detector, "backbone")
    assert {n.split(".")[0] for n, p in detector.named_parameters() if p.requires_grad} == {"network"}


def test_training_with_one_size_moves_the_shared_weights_of_all():
    detector = small_detector(*BUCKETS)
    ema = ModelEmaV3(detector, decay=0.5)
    optimizer = torch.optim.SGD(detector.parameters(), 0.1)
    before = copy.deepcopy(detector)
    sum(detector(*batch(96, 64)).values()).backward()
    optimizer.step()
    ema.update(detector)
    changed = {n for n, p in detector.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    strips = {n for n, _ in detector.named_parameters() if "body" in n and (".strip_" in n or ".pos_" in n)}
    assert len(strips) == 24 and not changed & strips  # those of the first size
    assert {n.split(".")[2] for n in changed if "sized" in n} == {"0"}
    assert "backbone.body.model.patch_embed.weight" in changed
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            now, then = detector.state_dict()[name], before.state_dict()[name]
            assert torch.allclose(value, now.lerp(then, 0.5), atol=1e-6), name
    # Copies share as the original does, and a state dict brings back all sizes.
    for copied in (ema.module, copy.deepcopy(detector)):
        bodies = [copied.backbone.body_for(size).model for size in ((64, 96), (96, 64))]
        assert bodies[0].patch_embed is bodies[1].patch_embed
        assert bodies[0].patch_embed is not detector.backbone.body.model.patch_embed
    again = small_detector(*BUCKETS)
    again.load_state_dict(detector.state_dict())
    detector.eval(), again.eval()
    for size in detector.backbone.sizes:
        images = batch(*size)[0]
        with torch.no_grad():
            for one, two in zip(detector(images), again(images), strict=True):
                assert torch.equal(one["boxes"], two["boxes"])


def test_distributed_training_with_several_sizes(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        detector = small_detector(*BUCKETS)
        wrapped = wrap(detector, SimpleNamespace(distributed=True, device=torch.device("cpu")))
        assert wrapped.find_unused_parameters and isinstance(wrapped, DistributedDataParallel)
        for size in ((64, 96), (96, 64), (64, 64)):
            sum(wrapped(*batch(*size)).values()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_one_size_and_networks_for_any_size_need_no_copies():
    assert not small_detector().backbone.sized
    resnet = small_detector(
        "MODEL.TYPE", "timm", "MODEL.NAME", "small_resnet", "DETECTION.STRIDES", "[8, 16]", *BUCKETS
    )
    assert not resnet.backbone.sized and not resnet.has_unused_parameters
    assert resnet.backbone.body.feature_info.module_name() == ["layer3", "layer4"]
    for size in resnet.backbone.sizes:
        assert torch.stack(list(resnet(*batch(*size)).values())).isfinite().all()


def test_sizes_and_strides_that_cannot_be():
    with pytest.raises(ModelError, match=r"img_size=65 must be a multiple of .* 32; nearest that work: 64 and 96"):
        small_detector("DETECTION.SIZES", "[64, 65]")
    with pytest.raises(ModelError, match=r"DETECTION.STRIDES is \[32, 64\], but .* gives maps at strides 4, 8, 16, 32"):
        small_detector("DETECTION.STRIDES", "[32, 64]")
    with pytest.raises(ModelError, match=r"small_swin takes images of one size, but DETECTION.SIZES are 3; accepted"):
        small_detector("MODEL.TYPE", "timm", "MODEL.NAME", "small_swin", "DETECTION.STRIDES", "[8, 16]", *BUCKETS)
    with pytest.raises(ModelError, match=r"images of 60 x 64 pixels .* for maps at stride 16"):
        resnet = ("MODEL.TYPE", "timm", "MODEL.NAME", "small_resnet", "DETECTION.STRIDES", "[8, 16]")
        small_detector(*resnet, "DETECTION.SIZES", "[60, 64]")
    with pytest.raises(ValueError, match=r"images of 96 x 96 pixels; accepted: 64 x 96, 96 x 64, 64 x 64 "):
        small_detector(*BUCKETS)(torch.zeros(1, 3, 96, 96), [{}])
    library("rt_detr")
    with pytest.raises(ModelError, match=r"QUERIES is 127, but the maps of the smallest images have 126 tokens"):
        small_detector("DETECTION.DETECTOR", "rt_detr", "DETECTION.HEAD.QUERIES", "127")


# The start from a classifier


@pytest.mark.parametrize("model", ["strip_mlp", "small_sparse_mlp", "small_resnet"])
def test_starts_from_a_classifier(tmp_path, model):
    torch.manual_seed(1)
    opts = () if model == "strip_mlp" else ("MODEL.TYPE", "timm", "MODEL.NAME", model, "DETECTION.STRIDES", "[8, 16]")
    classifier = build_model(small_config("MODEL.NUM_CLASSES", "5", *opts, "DATA.IMG_SIZE", "32"))
    for p in classifier.parameters():
        torch.nn.init.normal_(p)
    path = tmp_path / "best.pth"
    torch.save({"model": classifier.state_dict()}, path)
    config = small_config(*opts, *BUCKETS)
    detector = build_detector(config, 3)
    notes = load_backbone(detector, path, config)
    assert notes[0] == f"the backbone starts from {path}: model"
    for size in detector.backbone.sizes:
        body = detector.backbone.body_for(size).model
        if model != "small_resnet":
            assert any(f"from 32 x 32 to {size[0]} x {size[1]} pixels" in note for note in notes)
            classifier.set_input_size(size)
        expected = classifier.state_dict()
        for name, value in body.state_dict().items():
            assert torch.allclose(value, expected[name], atol=1e-4), (size, name)
        if model != "small_resnet":
            classifier.set_input_size(32)
            classifier.load_state_dict(torch.load(path, weights_only=True)["model"])


def test_a_checkpoint_of_another_model_does_not_start_it(tmp_path):
    path = tmp_path / "best.pth"
    torch.save({"model": timm.create_model("small_resnet").state_dict()}, path)
    config = small_config()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_backbone(build_detector(config, 3), path, config)


@pytest.mark.parametrize("detector", ["retinanet", "rt_detr"])
def test_peers_of_the_canvases_are_as_large(detector):
    """The smallest backbone has at least 85 % of the parameters of the largest."""
    library(detector)
    counts = {}
    for name in ("strip_mlp_pico", "sparse_mlp", "resnet"):
        config, notes = load_config(ROOT / f"configs/detection/{detector}_{name}.yaml")
        assert not notes and config.DETECTION.DETECTOR == config.TAG == detector
        backbone = build_detector(config, 10).backbone
        assert backbone.strides == [8, 16, 32]
        counts[name] = sum(parameter.numel() for parameter in backbone.parameters())
    assert min(counts.values()) > 0.85 * max(counts.values())


def test_retinanet_of_photographs():
    config, _ = load_config(ROOT / "configs/detection/retinanet_strip_mlp_tiny.yaml")
    detector = build_detector(config, 80)
    assert detector.network.backbone.strides == [8, 16, 32, 64, 128]
    # RetinaNet's smallest and largest anchors of each map, but for aspect ratios: 32 to 51, ..., 512 to 813
    sizes = detector.network.anchor_generator.sizes
    assert (sizes[0], sizes[-1]) == ((32, 40, 51), (512, 645, 813))


@pytest.mark.parametrize(("unit", "compiled"), [("model", ["backbone"]), ("blocks", ["backbone.body.model.stages.2."])])
def test_backbone_alone_is_compiled(unit, compiled):
    """Not what depends on how many boxes there are."""
    detector = small_detector("MODEL.STRIP_MLP.LAYERS", "[1, 1, 2, 1]")
    compile_model(detector, unit, backend="eager")
    found = [name for name, module in detector.named_modules() if module._compiled_call_impl is not None]
    assert all(name.startswith("backbone") for name in found)
    assert [name for name in compiled if any(each.startswith(name) for each in found)] == compiled
