"""Augmentation and preprocessing of single images with timm's transforms: images to (3, H, W) uint8 tensors, and mixup.
`device.py` has what is done to batches."""

import random
from collections.abc import Callable

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio, str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_modes_mapping
from torchvision.transforms.v2 import functional as F

from config import ConfigError, image_size


def posterize(image: Image.Image, bits: int, **options) -> Image.Image:
    """timm's operation, which may ask for 0 bits. Pillow 13 made that an error; here it is black, as before."""
    return Image.new(image.mode, image.size) if bits == 0 else auto_augment.posterize(image, bits, **options)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))

# Up to this IMG_SIZE, a random resized crop or a centre crop would lose too much of the image.
SMALL_IMAGE = 32


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's, with the same draws. PyTorch does the resizing where it is faster; on photographs the result differs from
    Pillow's by at most 2 of 255 levels."""

    # With AVX2, PyTorch's antialiased resize of uint8 images, with the conversion to a tensor and back, takes half the
    # time of Pillow's. Elsewhere it may take longer. `python tools/benchmark.py --data` measures both.
    by_torch = torch.backends.cpu.get_cpu_capability().startswith("AVX")

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        method = (
            random.choice(self.interpolation) if isinstance(self.interpolation, tuple | list) else self.interpolation
        )
        crop = image.crop((left, top, left + width, top + height))
        if not self.by_torch or method == InterpolationMode.NEAREST:  # PyTorch picks other pixels
            return F.resize(crop, self.size, method)
        resized = F.resize(F.pil_to_tensor(crop), self.size, method, antialias=True)
        return Image.fromarray(resized.permute(1, 2, 0).numpy())


class Cover:
    """Resizes an image so that it covers `cover`. Of a long image only the middle is resized that a centre crop of
    `size` keeps; the result is the crop. (A picture of 1 x 30,000 pixels would become one of 256 x 7,680,000.)

    Args:
        resize: what does it for other images.
        cover, size: (height, width) in pixels.
    """

    LONG = 4  # times `cover`

    def __init__(
        self,
        resize: Callable[[Image.Image], Image.Image],
        cover: tuple[int, int],
        size: tuple[int, int],
        method: InterpolationMode,
    ):
        self.resize, self.cover, self.size, self.method = resize, cover, size, method

    def __call__(self, image: Image.Image) -> Image.Image:
        sides = image.height, image.width
        if self.cover[0] == self.cover[1]:  # as torchvision rounds, and timm
            height, width = (int(self.cover[0] * side / min(sides)) for side in sides)
        else:
            ratio = min(side / least for side, least in zip(sides, self.cover, strict=True))
            height, width = (round(side / ratio) for side in sides)
        if height <= self.LONG * self.cover[0] and width <= self.LONG * self.cover[1]:
            return self.resize(image)
        top, left = (round((whole - part) / 2) for whole, part in zip((height, width), self.size, strict=True))
        down, right = top + self.size[0], left + self.size[1]
        x, y = image.width / width, image.height / height
        # Pillow's box takes the same neighbours into account as resizing the whole.
        box = (left * x, top * y, right * x, down * y)
        return image.resize(self.size[::-1], pil_modes_mapping[self.method], box=box)


def build_transform(config, is_train: bool) -> Callable[[Image.Image], Tensor]:
    """The training transform (random crop, flip, RandAugment or colour jitter) or the evaluation one (resize to
    256 / 224 of the image size, centre crop; by Pillow, as in the released code). Images of at most 32 pixels are
    resized as a whole, and in training shifted by up to AUG.SHIFT of their size instead of cropped."""
    size = height, width = image_size(config)
    small = max(size) <= SMALL_IMAGE
    interpolation = whole_image_interpolation(config)
    whole = str_to_interp_mode(interpolation)
    if is_train:
        try:
            transform = create_transform(
                input_size=size,
                is_training=True,
                hflip=config.AUG.HFLIP,
                color_jitter=config.AUG.COLOR_JITTER or None,
                auto_augment=None if config.AUG.AUTO_AUGMENT in ("none", "") else config.AUG.AUTO_AUGMENT,
                interpolation=config.DATA.INTERPOLATION,
                normalize=False,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise ConfigError(
                f"AUG.AUTO_AUGMENT is {config.AUG.AUTO_AUGMENT!r} ({error}); accepted: timm's policies, such as "
                "rand-m9-mstd0.5-inc1, original or augmix-m5-w4-d2, or none"
            ) from error
        crop, *others = transform.transforms
        assert isinstance(crop, RandomResizedCropAndInterpolation), "timm's training transform starts with its crop"
        if small:
            resize = transforms.Resize(size, interpolation=whole)
            down, right = largest_shift(config)
            shift = transforms.RandomCrop(size, padding=(right, down))
            return transforms.Compose([resize, shift, *others])
        crop = RandomResizedCrop(crop.size, crop.scale, crop.ratio, config.DATA.INTERPOLATION)
        return transforms.Compose([crop, *others])

    if small or not config.TEST.CROP:
        resize = [transforms.Resize(size, interpolation=whole)]
    else:
        cover = int(256 / 224 * height), int(256 / 224 * width)
        # For a square, the shorter side of the image decides. For a rectangle, the side that would not cover it does.
        smallest = transforms.Resize(cover[0], interpolation=whole)
        if height != width:
            smallest = ResizeKeepRatio(cover, interpolation=interpolation)
        resize = [Cover(smallest, cover, size, whole), transforms.CenterCrop(size)]
    return transforms.Compose([*resize, transforms.PILToTensor()])


def largest_shift(config) -> tuple[int, int]:
    """Pixels, down or up and right or left, by which training shifts small images at most."""
    height, width = image_size(config)
    return int(config.AUG.SHIFT * height), int(config.AUG.SHIFT * width)


def draws_per_image(config) -> bool:
    """Whether training augments each image in a way of its own, other than by shift, crop and flip."""
    return config.AUG.AUTO_AUGMENT not in ("none", "") or config.AUG.COLOR_JITTER > 0


def whole_image_interpolation(config) -> str:
    """How images are resized as a whole. PIL resizes with one method at a time; "random" is a training option of
    timm's crop."""
    return "bicubic" if config.DATA.INTERPOLATION == "random" else config.DATA.INTERPOLATION


def build_mixup(config, num_classes: int) -> Mixup | None:
    """timm's mixup / cutmix on batches, (images, labels) -> (images, soft targets), or None if both are off. Its soft
    targets include label smoothing.

    Raises:
        ConfigError: a batch size that is odd.
    """
    if config.AUG.MIXUP <= 0 and config.AUG.CUTMIX <= 0:
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise ConfigError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}, but mixup and cutmix pair the images of a batch; accepted: "
            "an even number, or AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    return Mixup(
        mixup_alpha=config.AUG.MIXUP,
        cutmix_alpha=config.AUG.CUTMIX,
        prob=config.AUG.MIXUP_PROB,
        switch_prob=config.AUG.MIXUP_SWITCH_PROB,
        mode=config.AUG.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
    )
