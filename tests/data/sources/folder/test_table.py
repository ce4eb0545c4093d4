"""CSV files that name images and their classes: what they may look like, and what is refused."""

import pytest
from data_errors import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import COMPLETE, TEST, TRAIN, cache_files, levels, make_csv, read_csv, save, solid
from PIL import Image

from fixmatch.data import DataError
from fixmatch.data.sources.folder.table import scan_tables


def test_csv_files(tmp_path):
    source = read_csv(make_csv(tmp_path))
    assert (source.name, source.classes, source.flip) == ("csv", ("cat", "dog"), True)
    assert (levels(source.train), source.train.labels.tolist()) == ([10, 20, 30], [0, 1, -1])
    assert (levels(source.test), source.test.labels.tolist()) == ([40], [1])
    assert source.mean == pytest.approx([20 / 255] * 3)


@pytest.mark.parametrize(("train", "values", "labels"), [
    ("path,label\nv.png,\nb.png,dog\nu.png,\na.png,cat\n", [10, 20, 30, 60], [0, 1, -1, -1]),  # sorted, labeled first
    ("label,id, path \r\ncat,1,a.png\r\n dog ,2,b.png\r\n\r\n", [10, 20], [0, 1]),
    ("\ufeffpath,label\na.png,cat\nb.png,dog", [10, 20], [0, 1]),  # as Excel writes it
    ('path,label\n"sub/c,d.png","cat"\nb.png,dog\n', [20, 50], [1, 0]),
    ("path,label\nsub/../a.png,cat\nb.png,dog\n", [20, 10], [1, 0]),
    ("path,label\na.png,cat\na.png,\nb.png,dog\nb.png,dog\n", [10, 20, 20, 10], [0, 1, 1, -1]),
    ("path,label\na.png,cat\nb.png,dog\nt.png,\n", [10, 20, 40], [0, 1, -1]),  # a test image, but without its label
])
def test_what_a_csv_file_may_look_like(tmp_path, train, values, labels):
    source = read_csv(make_csv(tmp_path, train))
    assert (levels(source.train), source.train.labels.tolist()) == (values, labels)


def test_a_csv_file_given_by_name_and_paths_that_lead_out_of_its_folder(tmp_path):
    root = make_csv(tmp_path / "data")
    outside = save(tmp_path / "o.png", solid(99))
    (root / "few.csv").write_text(f"path,label\n{outside},cat\n../o.png,dog\n")
    source = read_csv(root / "few.csv")
    assert (source.name, levels(source.train), len(source.test)) == ("csv", [99, 99], 1)
    assert len(read_csv(root).train) == 3
    assert cache_files(root) == sorted(2 * COMPLETE)  # one each


@pytest.mark.parametrize(("train", "test", "said"), [
    (None, TEST, "train.csv: cannot be read: No such file"),
    (TRAIN, None, "train.csv: class cat has 1 labeled image, so none can be held out as a test image; add one, or "
     "train without a test: data.test_fraction=0"),
    ("", TEST, "train.csv: line 1: no column label and no column path"),
    ("path;label\na.png;cat\n", TEST, "train.csv: line 1: no column"),
    ("a.png,cat\n", TEST, "train.csv: line 1: no column"),
    (TRAIN, "path,class\nt.png,dog\n", "test.csv: line 1: no column label;"),
    ("path,label\na.png\n", TEST, "train.csv: line 2: 1 fields"),
    ("path,label\na,b.png,cat\n", TEST, "train.csv: line 2: 3 fields"),
    ("path,label\na.png,cat\n,dog\n", TEST, "train.csv: line 3: no path"),
    ("path,label\na.png,cat\nx.png,dog\n", TEST, "train.csv: line 3: x.png: No such file"),
    ("path,label\na.png,cat\nsub,dog\n", TEST, "train.csv: line 3: sub: not a file"),
    (f"path,label\n{'x' * 300},cat\n", TEST, "train.csv: line 2: x"),
    ("path,label\na\0.png,cat\n", TEST, "train.csv: line 2: "),
    ("path,label\na.png,\nb.png,\n", TEST, "train.csv: no line has a label"),
    ("path,label\n", TEST, "train.csv: no line has a label"),
    ("path,label\na.png,cat\nb.png,cat\nu.png,\n", None, "train.csv: has one class only, cat, so there is nothing"),
    ("path,label\na.png,cat\nb.png,dog\na.png,dog\n", TEST, "train.csv: line 4: a.png has the label dog, but cat in "),
    ('path,label\na.png,"cat\nb.png,dog\n', TEST, "not CSV: unexpected end of data"),
    (f"path,label\na.png,{'x' * 200_000}\n", TEST, "not CSV: field larger"),
    (TRAIN.encode() + b"caf\xe9.png,cat\n", TEST, "train.csv: line 5: not UTF-8"),
    (TRAIN.encode("utf-16"), TEST, "train.csv: line 1: not UTF-8"),
    (TRAIN, "path,label\nt.png,dog\nt.png,cow\n", "test.csv: line 3: no image in train.csv has the label cow"),
    (TRAIN, "path,label\nt.png,dog\nt.png, \n", "test.csv: line 3: the label is empty"),
    (TRAIN, "path,label\n\nx.png,dog\n", "test.csv: line 3: x.png: No such file"),
    (TRAIN, "path,label\n", "test.csv: no test image"),
    (TRAIN, "path,label\nt.png,dog\na.png,cat\n",
     "test.csv: line 3: a.png is a labeled training image, too, in line 2 of train.csv"),
])
def test_a_csv_file_that_cannot_be_used(tmp_path, train, test, said):
    assert said in error_of(read_csv, make_csv(tmp_path, train, test))


def test_a_broken_image_in_a_csv_file(tmp_path, logged):
    root = make_csv(tmp_path, TRAIN + "v.png,cat\n")
    (root / "v.png").write_bytes(b"x")
    assert "v.png (not an image" in error_of(read_csv, root)
    assert levels(read_csv(root, 1).train) == [10, 20, 30]
    assert "v.png: left out: not an image" in logged()


def test_other_labels_need_no_decoding(tmp_path, monkeypatch):
    root = make_csv(tmp_path)
    read_csv(root)
    (root / "train.csv").write_text("path,label\nb.png,cow\nu.png,\na.png,dog\n")
    monkeypatch.setattr(Image, "open", None)
    source = read_csv(root)
    assert (source.classes, source.train.labels.tolist()) == (("cow", "dog"), [1, 0, -1])


_FIELDS = st.sampled_from(["path", "label", "a.png", "b.png", "cat", "dog", "", " ", "\0", "..", "/", "x", '"', "é"])
_LINES = st.lists(st.one_of(_FIELDS, st.text(max_size=5)), max_size=4).map(",".join)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(_LINES, max_size=5), headed=st.booleans(), encoding=st.sampled_from(["utf-8", "latin-1"]))
def test_any_text_is_read_or_refused(tmp_path_factory, lines, headed, encoding):
    root = tmp_path_factory.getbasetemp() / "csv"
    if not root.exists():
        make_csv(root)
    text = "\n".join(["path,label"] * headed + lines)
    (root / "any.csv").write_bytes(text.encode(encoding, "replace"))
    try:
        listing = scan_tables(root / "any.csv")
    except DataError as error:
        message = str(error)
    else:
        assert set(listing.files.labels()) <= set(range(-1, len(listing.classes)))
        return
    assert message.startswith(str(root))
    assert message.isprintable()
