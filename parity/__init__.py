"""The PyTorch reference, written out file by file beside fixmatch/, and the proof that the two agree."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before Paddle loads: one order of summation, run after run

import fixmatch  # noqa: F401, sets BLAS before paddle loads
