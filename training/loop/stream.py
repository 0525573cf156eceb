"""The two streams of a step, resident on the device: labelled images, augmented, and images for p(x)."""

import torch

from training.config import Preset
from training.data.augment import augment, to_device
from training.data.datasets import Dataset, load_extra
from training.distributed import Noise
from training.errors import TrainingError
from training.methods import Batch


class Stream:
    """Batches of a preset's data; extra images are a fixed share of every labelled batch."""

    def __init__(self, preset: Preset, data: Dataset, device: torch.device, noise: Noise) -> None:
        self.preset, self.noise, self.flip = preset, noise, preset.flip and data.flip
        image, label = to_device(data.train.image, device), torch.from_numpy(data.train.label).to(device)
        self.images, self.extra_batch = len(label), 0
        if preset.extra:
            extra = load_extra(preset.extra, data)
            image = torch.cat([image, to_device(extra.image, device)])
            label = torch.cat([label, torch.from_numpy(extra.label).to(device)])
            self.extra_batch = round(preset.batch_size * preset.extra_fraction)
        self.image, self.label = image, label  # the data, then the extra images
        if not 0 <= self.extra_batch < preset.batch_size:
            raise TrainingError(
                f"extra_fraction={preset.extra_fraction} leaves none of the {preset.batch_size} images of a batch to the data"
            )
        if preset.padding >= min(image.shape[2:]):
            raise TrainingError(f"padding={preset.padding} must be less than the images' side of {min(image.shape[2:])}")
        noise.ranks.part("batch_size", preset.batch_size)
        self.plain = noise.ranks.part("plain_batch", preset.plain_batch)
        # an epoch is as many labelled images as the data holds, extra ones counted, as the published recipes count
        self.steps_per_epoch = steps_per_epoch(preset, self.images)
        self.cycle, self.order = -1, torch.empty(0)

    def batch(self, step: int) -> Batch:
        """Return the batch of ``step``: a cycle visits every image of the data once, in an order fixed by (seed, cycle)."""
        p, noise = self.preset, self.noise
        own = p.batch_size - self.extra_batch
        cycle, place = divmod(step, self.images // own)
        if cycle != self.cycle:
            shuffler = torch.Generator().manual_seed(1_000_003 * p.seed + cycle)
            self.cycle, self.order = cycle, torch.randperm(self.images, generator=shuffler).to(self.label.device)
        index = self.order[place * own : (place + 1) * own]
        if self.extra_batch:
            everyone = Noise(noise.generator)  # the whole batch's draws: which rank holds which row is decided below
            index = torch.cat([index, self.images + everyone.integers(len(self.label) - self.images, self.extra_batch)])
            index = index[everyone.uniform(len(index)).argsort()]  # so that the extra images are not all on one rank
        index = noise.ranks.share(index)
        image, label = self.image[index], self.label[index]
        image = augment(image, noise, kind=p.augment, padding=p.padding, flip=self.flip)
        drawn = noise.integers(self.images, self.plain)
        plain = augment(self.image[drawn], noise, kind=p.plain_augment, padding=p.padding, flip=self.flip)
        return Batch(image, label, plain, self.label[drawn])

    def saturation(self) -> float:
        """Return the share of the data's pixels at 0 or 1, which chains may reach without having diverged."""
        some = self.image[: self.images : max(1, self.images // 1000)]
        return float(((some == 0) | (some == 255)).float().mean())


def steps_per_epoch(preset: Preset, images: int) -> int:
    """Return the number of steps of an epoch; raise TrainingError when the images do not fill a batch."""
    if images < preset.batch_size:
        raise TrainingError(f"batch_size={preset.batch_size} is more than the {images} training images")
    return images // preset.batch_size
