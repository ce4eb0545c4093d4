"""From the loader's uint8 images to the network's input, on the device."""

import paddle


class Normalize:
    """uint8 [N, H, W, 3] -> [N, 3, H, W] in Paddle's default dtype: (pixel / 255 - mean) / std, a channel.

    The order of the operations is that of torchvision's ToTensor and Normalize, which the reference uses.
    """

    def __init__(self, mean, std):
        self.mean = paddle.to_tensor(mean, dtype=paddle.get_default_dtype()).reshape([1, 3, 1, 1])
        self.std = paddle.to_tensor(std, dtype=paddle.get_default_dtype()).reshape([1, 3, 1, 1])

    def __call__(self, images):
        pixels = paddle.to_tensor(images).astype(self.mean.dtype).transpose([0, 3, 1, 2])
        return (pixels / 255.0 - self.mean) / self.std
