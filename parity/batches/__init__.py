"""Stage `data`: the batches that train, made by the production Loader.

`rows` runs the Loader under the run's own settings on images whose pixels say which image of which class they are, and
`rows_of_run` takes the very Loader that is about to train and its own images. In the order of diagnosis: shapes, split,
labels, order of the images, views against Pillow's, and the joint distribution of everything that is drawn.

What is not compared: for strong recipes other than the reference's the pixels of the operations, only that each strong
view follows its own plan and shows the same image as the weak one (tests/data/augment/test_recipes.py has Pillow's
version of each recipe); CTAugment as its rates change, only as it begins.

Error rates of `rows`: see parity/batches/draws.py. All other rows are exact and never fail by chance.
"""

from parity.batches.probed import rows
from parity.batches.run import rows_of_run

__all__ = ["rows", "rows_of_run"]
