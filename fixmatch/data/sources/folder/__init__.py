"""The user's own images: folders named after classes, or CSV files that name images and their classes.

    ROOT/labeled/CLASS/...   images of a known class, at any depth below CLASS; or ROOT/train/CLASS/...
    ROOT/unlabeled/...       images of no known class, at any depth; may be missing
    ROOT/test/CLASS/...      images of a known class to measure the accuracy on; or ROOT/val/CLASS/...; may be missing

    ROOT/train.csv           columns path and label; where the label is empty, the class is not known
    ROOT/test.csv            the same, with a label on every line; may be missing

Where there are no test images, a part of the labeled ones is held out. Folders (scan.py) or CSV files (table.py) are
read into a listing of the images (listing.py). Each image file is decoded (image.py), several at a time (decode.py),
into a memory-mapped cache (load.py and the cache.py of all sources), and those with equal pixels are told
(duplicates.py).
"""
