"""fixmatch init: a configuration for a folder of images, fit for them, this machine and the time there is."""

import dataclasses
import pathlib
import shlex

from fixmatch import notes, recipe
from fixmatch.cli import Parser
from fixmatch.config import ConfigError, from_dict
from fixmatch.files import write_atomic
from fixmatch.inputs import choose_split, read_data
from fixmatch.log import LOGGER, shown
from fixmatch.models.layers import set_cpu_kernels
from fixmatch.runtime import select_device
from fixmatch.usage import command


def main(argv: list[str]) -> int:
    parser = Parser("init", description="Look at a folder of images and write a configuration that fits them, this "
                                        "machine and the time there is.")
    parser.add_argument("folder", type=pathlib.Path, help="with labeled/CLASS/ (or train/CLASS/), and where there are "
                        "any unlabeled/ and test/CLASS/ (or val/CLASS/); or with train.csv")
    parser.add_argument("--minutes", type=float, default=30.0, help="that the training may take (default: 30)")
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="FILE", help="the YAML file to write (default: "
                        "the folder's name with .yaml, here)")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    args = parser.parse_args(argv)
    target = args.output or pathlib.Path(f"{args.folder.resolve().stem or 'images'}.yaml")
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes: must be greater than 0, got {args.minutes:g}")
    if target.exists() and not args.force:
        raise ConfigError(f"{target}: is there already; name another file with -o, or overwrite it with --force")
    choice = _propose(args.folder, target, args.minutes)
    print(f"wrote {target}: {choice.steps:,} steps of {choice.seconds:.2f} s, as measured here, in "
          f"{recipe.describe_minutes(args.minutes)}")
    print(f"train with: {command('train')} -c {shlex.quote(str(target))}")
    return 0


def _propose(folder: pathlib.Path, target: pathlib.Path, minutes: float) -> recipe.Choice:
    """Looks at the images, measures, decodes them for the training, and writes the configuration."""
    on_gpu = select_device("auto") != "cpu"
    if not on_gpu:
        set_cpu_kernels("auto")
    print(f"{folder}: looking at the images and measuring the time of a step", flush=True)
    images = recipe.look(folder)  # says nothing of what will be said when the images are read
    choice = recipe.choose(images, minutes, on_gpu, recipe.measure(images.classes), recipe.memory())
    config = from_dict(recipe.settings(images, choice.rung, on_gpu, choice.steps), str(target))
    with shown():
        source = read_data(config)  # decodes them, and says what is broken, equal or held out
        split = choose_split(config, source)
        images = dataclasses.replace(images, labeled=len(split.labeled), unlabeled=len(split.unlabeled),
                                     test=len(source.test))  # broken ones were counted until here
        config = from_dict(recipe.settings(images, choice.rung, on_gpu, choice.steps), str(target))
        for line in notes.before_training(config, source, split):
            LOGGER.info(line)
        if len(split.unlabeled) == len(split.labeled):
            LOGGER.info(f"{folder}: has no unlabeled images, which FixMatch learns most from; put some in unlabeled/")
        if choice.steps < recipe.FEWEST[10]:
            LOGGER.info(f"warning: {choice.steps:,} steps are few to learn from; give it more --minutes")
    train = f"{command('train')} -c {shlex.quote(str(target))}"
    write_atomic(target, recipe.write(images, choice, minutes, on_gpu, train))
    return choice
