"""What tests hold every refusal of data to."""

import pytest

from fixmatch.data import DataError


def error_of(call, *arguments) -> str:
    """The message of the DataError that the call raises: one line that can be printed."""
    with pytest.raises(DataError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message
