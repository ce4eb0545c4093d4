"""From the loader's uint8 images to the network's input, on the device."""

import numpy as np
import paddle

from fixmatch.pinned import PinnedCopies

_to_gpu = PinnedCopies()


def to_device(array: np.ndarray):
    """A tensor of this array's content, shape and dtype on Paddle's current device.

    For what is called at every step: it does not wait for a GPU, and paddle.to_tensor, like any construction of a
    paddle.Tensor in Python, loses up to 112 bytes for good in Paddle 3.3.
    """
    if paddle.device.get_device().startswith("gpu"):
        return _to_gpu(array)
    tensor = paddle.empty(array.shape, dtype=array.dtype)
    tensor.set_value(array)
    return tensor


class Normalize:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in Paddle's default dtype: (pixel / 255 - mean) / std, a channel.

    The order of the operations is that of torchvision's ToTensor and Normalize, which the reference uses.
    """

    def __init__(self, mean, std):
        self.mean = paddle.to_tensor(mean, dtype=paddle.get_default_dtype()).reshape([1, 3, 1, 1])
        self.std = paddle.to_tensor(std, dtype=paddle.get_default_dtype()).reshape([1, 3, 1, 1])

    def __call__(self, images: np.ndarray):
        return self.of_tensor(to_device(images))

    def of_tensor(self, images):
        """The same for images that are a tensor already."""
        pixels = images.astype(self.mean.dtype).transpose([0, 3, 1, 2])
        return (pixels / 255.0 - self.mean) / self.std
