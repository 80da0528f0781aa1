from __future__ import annotations

import pytest

from mosaic_ray.core.units import size


@pytest.mark.parametrize("num_bytes, unit, text", [
    (0, None, "0 B"), (1023, None, "1,023 B"), (1024, None, "1.0 KiB"), (18.6 * 2**20, None, "18.6 MiB"),
    (3 * 2**40, None, "3,072.0 GiB"), (600 * 2**20, "GiB", "0.6 GiB"),
])  # fmt: skip
def test_bytes_are_shown_in_binary_units(num_bytes, unit, text):
    assert size(num_bytes, unit) == text
