"""What is done to a batch on the device, in the order of timm's prefetcher: normalisation, random erasing, mixup."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class Normalize:
    """(x / 255 - mean) / std with ImageNet's statistics, bit for bit as torchvision's ToTensor and Normalize give it.

    Args:
        memory_format: of the result.
    """

    def __init__(self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format):
        self.memory_format = memory_format
        # A tensor: CUDA divides by a plain number by multiplying with its reciprocal, which rounds differently.
        self.largest = torch.tensor([255.0], device=device)
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device)[:, None, None]
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) as float32, a new tensor. Images of floating point are normalised already and come
        back as they are."""
        if images.is_floating_point():
            return images
        images = images.to(torch.float32, memory_format=self.memory_format)
        return images.div_(self.largest).sub_(self.mean).div_(self.std)


def denormalize(images: Tensor) -> Tensor:
    """The inverse of `Normalize`, for pictures: (N, 3, H, W) float32 on the CPU, clipped to 0 to 1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float().cpu() * std + mean).clamp(0, 1)


class BatchTransform:
    """Training batches: uint8 images (N, 3, H, W) and labels (N,) on the device to the model's input and its targets,
    which are soft, (N, classes), with mixup.

    It draws from Python's, NumPy's and PyTorch's generators, the device's included. It does not wait for the device,
    except for mixup in the modes pair and elem. Images of floating point may be changed in place.
    """

    def __init__(self, normalize: Normalize, erasing: RandomErasing | None = None, mixup: Mixup | None = None):
        self.normalize, self.erasing, self.mixup = normalize, erasing, mixup

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images = self.normalize(images)
        if self.erasing:
            images = self.erasing(images)
        if self.mixup:
            images, targets = self.mixup(images, targets)
        return images, targets


def build_normalize(config, device: torch.device) -> Normalize:
    """The first step of training and evaluation, with the memory format that the config asks for."""
    return Normalize(device, torch.channels_last if config.TRAIN.CHANNELS_LAST else torch.contiguous_format)


def build_batch_transform(config, mixup: Mixup | None, device: torch.device) -> BatchTransform:
    """Normalisation, random erasing and mixup as the config sets them."""
    erasing = None
    if config.AUG.REPROB > 0:
        erasing = RandomErasing(config.AUG.REPROB, mode=config.AUG.REMODE, max_count=config.AUG.RECOUNT, device=device)
    return BatchTransform(build_normalize(config, device), erasing, mixup)
