"""From uint8 images to the network's input, as torchvision's ToTensor and Normalize. Mirrors fixmatch/normalize.py."""

import torch


class Normalize:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in Torch's default dtype."""

    def __init__(self, mean, std):
        self.mean = torch.tensor(mean, dtype=torch.get_default_dtype()).view(1, 3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.get_default_dtype()).view(1, 3, 1, 1)

    def __call__(self, images):
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div(255)
        return pixels.sub(self.mean).div(self.std)
