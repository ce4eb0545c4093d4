"""Downloads: resumed, checked, and never in the place of a good file."""

import http.server
import os

import pytest
from data_errors import error_of
from file_server import Handler

from fixmatch.data.sources.download import download


def test_a_download_reports_progress_and_leaves_the_file_alone(server, tmp_path, logged):
    target = tmp_path / "new/file"
    download(server.url, target, server.md5)
    assert target.read_bytes() == server.content
    assert os.listdir(target.parent) == ["file"]
    lines = logged().splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[-1] == "file: 0.3 of 0.3 MB"


def test_a_cut_connection_keeps_the_part_and_the_next_call_resumes_it(server, tmp_path):
    target, part = tmp_path / "file", tmp_path / "file.part"
    server.mode = "cut"
    assert "150,000 of 300,000" in error_of(download, server.url, target, server.md5)
    assert part.read_bytes() == server.content[:150_000]
    server.mode = "ranges"
    download(server.url, target, server.md5)
    assert server.ranges == [None, "bytes=150000-"]
    assert target.read_bytes() == server.content
    assert not part.exists()


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.content[:1000])
    server.mode = "no ranges"
    download(server.url, tmp_path / "file", server.md5)
    assert (tmp_path / "file").read_bytes() == server.content


def test_a_part_that_is_complete_is_taken(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.content)
    download(server.url, tmp_path / "file", server.md5)  # the server answers 416
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize("size", [1000, 300_000, 400_000])
def test_a_part_of_another_file_is_discarded(server, tmp_path, size):
    (tmp_path / "file.part").write_bytes(b"x" * size)
    assert "MD5" in error_of(download, server.url, tmp_path / "file", server.md5)
    assert os.listdir(tmp_path) == []
    download(server.url, tmp_path / "file", server.md5)
    assert (tmp_path / "file").read_bytes() == server.content


@pytest.mark.parametrize("mode", ["wrong", "cut", "missing"])
def test_a_bad_download_never_replaces_a_file(server, tmp_path, mode):
    target = tmp_path / "file"
    target.write_bytes(b"good")
    server.mode = mode
    assert str(target) in error_of(download, server.url, target, "0" * 32)
    assert target.read_bytes() == b"good"


def test_no_server(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_address[1]
    assert "refused" in error_of(download, f"http://127.0.0.1:{port}/file", tmp_path / "new/file", "0" * 32)
    assert os.listdir(tmp_path) == []
