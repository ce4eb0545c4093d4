"""The data sources by their names, as `data.name` takes them."""

import dataclasses

from fixmatch.config import DataConfig
from fixmatch.data.dataset import DataError, Dataset, Source

__all__ = ["NUM_CLASSES", "DataError", "Dataset", "Source", "load_source"]

# The sources folder and csv are not in this table, since their classes are the user's.
NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "svhn": 10, "stl10": 10}


def load_source(config: DataConfig) -> Source:
    """Reads the data set that `config` names, downloading it first where that is allowed. Raises DataError."""
    source = _read(config)
    return dataclasses.replace(source, mean=config.mean or source.mean, std=config.std or source.std)


def _read(config: DataConfig) -> Source:
    match config.name:  # a source is imported where it is asked for, with the libraries that only it needs
        case "digits":
            from fixmatch.data.sources.digits import load_digits

            return load_digits()
        case "cifar10" | "cifar100":
            from fixmatch.data.sources.cifar import load_cifar

            return load_cifar(config.name, config.root, config.download)
        case "svhn":
            from fixmatch.data.sources.svhn import load_svhn

            return load_svhn(config.root, config.download, config.extra)
        case "stl10":
            from fixmatch.data.sources.stl10 import load_stl10

            return load_stl10(config.root, config.download)
        case "folder":
            from fixmatch.data.sources.folder.load import load_folder

            return load_folder(config.root, config.image_size, config.max_broken, config.test_fraction,
                               config.split_seed or 0)
        case "csv":
            from fixmatch.data.sources.folder.load import load_csv

            return load_csv(config.root, config.image_size, config.max_broken, config.test_fraction,
                            config.split_seed or 0)
