"""What `--weights` says of layers and head."""

from __future__ import annotations

import pytest

from framefusion.errors import BudgetError
from framefusion.export.plan.weight_plan import parse_head, parse_weights
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.float8 import Float8Format, WeightFormat


@pytest.mark.parametrize(
    ("text", "layers", "head"),
    [
        (None, None, None),
        ("stored", None, None),
        ("int8", BlockFormat(8, 128), None),
        ("int4+head", BlockFormat(4, 32), BlockFormat(8, 128)),
        ("int4:64+zero+head", BlockFormat(4, 64, symmetric=False), BlockFormat(8, 128)),
        ("int4+head4", BlockFormat(4, 32), BlockFormat(4, 32)),
        ("int8+head4", BlockFormat(8, 128), BlockFormat(4, 128)),
        ("int4:128+zero+head4", BlockFormat(4, 128, symmetric=False), BlockFormat(4, 128)),
        ("fp8", Float8Format(), None),
        ("fp8+activations+head", Float8Format(rounds=True), Float8Format()),
    ],
)
def test_layers_and_head_have_formats_of_their_own(
    text: str | None, layers: WeightFormat | None, head: WeightFormat | None
) -> None:
    assert parse_weights(text) == layers
    assert parse_head(text) == head


@pytest.mark.parametrize("text", ["int4+head8", "int4+head4+zero", "+head4", "int4head4"])
def test_what_names_no_format_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="head4"):
        parse_weights(text)
