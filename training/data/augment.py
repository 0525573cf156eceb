"""Images on the device, and augmentation of whole batches without a Python loop over images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.image_folders import Pixels
from training.distributed import Noise


def to_device(image: Pixels, device: torch.device) -> Tensor:
    """Return uint8 images (N, H, W, 3) as a uint8 tensor (N, 3, H, W) on ``device``."""
    return torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(device)


def to_float(image: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0,1]."""
    return image.float() / 255.0


def crop(image: Tensor, noise: Noise, *, padding: int, flip: bool) -> Tensor:
    """Return random crops after reflection padding, mirrored half of the time; (N, 3, H, W) of any dtype."""
    n, channels, height, width = image.shape
    device = image.device
    padded = F.pad(image.float(), (padding,) * 4, mode="reflect").to(image.dtype)
    corner = noise.integers(2 * padding + 1, n, 2)
    rows = corner[:, :1] + torch.arange(height, device=device)
    columns = corner[:, 1:] + torch.arange(width, device=device)
    if flip:
        columns = torch.where(noise.uniform(n, 1) < 0.5, columns.flip(1), columns)
    batch = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]


def recolour(image: Tensor, noise: Noise, strength: float = 0.4) -> Tensor:
    """Return the images (N, 3, H, W) in [0,1] with brightness, contrast and saturation each scaled by U(1 - s, 1 + s)."""
    brightness, contrast, saturation = (1.0 + strength * (2.0 * noise.uniform(len(image), 3, 1, 1, 1) - 1.0)).unbind(dim=1)
    x = image * brightness
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + contrast * (x - mean)
    grey = x.mean(dim=1, keepdim=True)
    return (grey + saturation * (x - grey)).clamp(0.0, 1.0)


def cutout(image: Tensor, noise: Noise, share: float = 0.5) -> Tensor:
    """Return the images (N, 3, H, W) with a square of ``share`` of the side set to 0, centred anywhere (DeVries & Taylor 2017)."""
    n, _, height, width = image.shape
    half = share * min(height, width) / 2
    centre = noise.uniform(n, 2)
    rows = (torch.arange(height, device=image.device) + 0.5 - height * centre[:, :1]).abs() < half
    columns = (torch.arange(width, device=image.device) + 0.5 - width * centre[:, 1:]).abs() < half
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def augment(image: Tensor, noise: Noise, *, kind: str, padding: int, flip: bool) -> Tensor:
    """Return uint8 images (N, 3, H, W) as float32 in [0,1], augmented: none | crop | strong (crop, recolour, cutout)."""
    if kind == "none":
        return to_float(image)
    cropped = to_float(crop(image, noise, padding=padding, flip=flip))
    return cutout(recolour(cropped, noise), noise) if kind == "strong" else cropped
