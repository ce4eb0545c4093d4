"""Data sources by name."""

from fixmatch.config import DataConfig
from fixmatch.data.dataset import DataError, Dataset, Source

__all__ = ["NUM_CLASSES", "DataError", "Dataset", "Source", "load_source"]

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


def load_source(config: DataConfig) -> Source:
    """Reads the data set that `config` names, downloading it first where that is allowed. Raises DataError."""
    if config.name == "digits":
        from fixmatch.data.digits import load_digits  # scikit-learn takes a second to import

        return load_digits()
    from fixmatch.data.cifar import load_cifar

    return load_cifar(config.name, config.root, config.download)
