"""The PyTorch reference, written out file by file beside fixmatch/, and the proof that the two agree."""

import fixmatch  # noqa: F401, sets threads and BLAS before paddle loads
