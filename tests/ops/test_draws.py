"""The counter-based generator against the known answers of the Random123 distribution."""

from __future__ import annotations

import pytest
import torch

from fx_passes.ops.draws import STREAM_ENTRY, entry_words, philox, row_words

ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    seed = key[0] | key[1] << 32
    seed = torch.tensor(seed - (1 << 64) if seed >> 63 else seed)
    words = philox(seed, *(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == answer


def test_words_do_not_depend_on_the_tile() -> None:
    seed = torch.tensor(99)
    heads, rows = torch.arange(3), torch.arange(5)
    whole = entry_words(seed, 2, STREAM_ENTRY, heads, rows, torch.arange(41))
    assert torch.equal(whole[:, 2:4, 7:30], entry_words(seed, 2, STREAM_ENTRY, heads, rows[2:4], torch.arange(7, 30)))


def test_uniform() -> None:
    words = row_words(torch.tensor(1), 0, torch.arange(64)[:, None], torch.arange(4096)).double() / 2**32
    counts = torch.histc(words, 64, 0, 1)
    assert float(((counts - 4096) ** 2 / 4096).sum()) < 63 + 5 * (2 * 63) ** 0.5
